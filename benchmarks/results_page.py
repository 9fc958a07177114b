"""benchmarks/results.md: the last full table and the machine that it is from."""

import datetime as dt
import os
import platform
from pathlib import Path

_PAGE = Path(__file__).with_name("results.md")


def write(text, *, load_before):
    """Replace the page."""
    facts = {
        "processor": _processor(),
        "cores": f"{len(os.sched_getaffinity(0))}",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        "load before": f"{load_before:.1f} (of one minute)",
    }
    lines = [
        "# Results",
        "",
        "Written by `script/bench --write`; [README.md](README.md) says what the columns mean.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        text,
    ]
    _PAGE.write_text("\n".join(lines) + "\n")


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
