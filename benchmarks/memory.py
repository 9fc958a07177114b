"""What somebody pays in memory for a session that does nothing."""

import statistics
import subprocess
import sys
import time

import psutil

from benchmarks.product import product
from benchmarks.rows import Row, number

_FIRST_SESSIONS = 10  # so that what is loaded and made only once is not counted as the sessions'
_SESSIONS = 100
_SETTLE_S = 3
_BARE = "import asyncio, ptyprocess, time; print(flush=True); time.sleep(1000)"
_MIB = 1024 * 1024


def idle_memory(_options):
    bare_rss, bare_pss = _bare_python()
    with product() as running:
        serve = running.serve_process()
        for _ in range(_FIRST_SESSIONS):
            running.run(running.create(), "true")
        time.sleep(_SETTLE_S)
        before = serve.memory_info().rss
        for session in [running.create() for _ in range(_SESSIONS)]:
            running.run(session, "true")
        time.sleep(_SETTLE_S)
        growth_kib = (serve.memory_info().rss - before) / _SESSIONS / 1024
        found = [_memory(sidecar) for sidecar in running.sidecars()]
    sidecar_rss, sidecar_pss = (statistics.median(column) for column in zip(*found, strict=True))
    return [
        Row(
            "idle sidecar's RSS / Python with asyncio and ptyprocess",
            f"{number(sidecar_rss)} MiB",
            f"{number(bare_rss)} MiB",
            sidecar_rss / bare_rss,
            enough=1.4,
            aim=1.25,
            notes=[f"idle sidecar: PSS {number(sidecar_pss)} MiB beside others; bare Python: {number(bare_pss)} MiB."],
        ),
        Row(
            "control plane's RSS for each idle session",
            f"{number(growth_kib)} KiB",
            compared=growth_kib,
            unit=" KiB",
            enough=60,
            aim=30,
        ),
    ]


def _bare_python():
    command = [sys.executable, "-I", "-c", _BARE]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            return _memory(psutil.Process(process.pid))
        finally:
            process.kill()


def _memory(process):
    """RSS and PSS in MiB."""
    info = process.memory_full_info()
    return info.rss / _MIB, info.pss / _MIB
