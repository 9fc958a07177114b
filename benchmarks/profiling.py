"""Where Python processes spend their time, by py-spy: nothing in the product knows of it."""

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

_SAMPLES_PER_S = 250
_SHOWN = 20
_LOOP = ("Runner.run ", "BaseEventLoop._run_once ", "Handle._run ")  # they and what is outside of them call all others
_LONGEST_SAMPLING_S = 120


@contextlib.contextmanager
def sampled(title, *, wanted, **pids):
    """Samples the named processes inside, when it is wanted, and shows each one's top functions afterwards."""
    if not wanted:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="cs-bench-profile-") as folder:
        with contextlib.ExitStack() as stack:
            for name, pid in pids.items():
                stack.enter_context(_sampler(pid, Path(folder) / name))
            yield
        for name in pids:
            print(f"== {title}: {name}\n{_top((Path(folder) / name).read_text())}\n", file=sys.stderr)


@contextlib.contextmanager
def _sampler(pid, file):
    command = [str(Path(sys.executable).with_name("py-spy")), "record", "--nonblocking", "--format", "raw"]
    command += ["--function", "--rate", str(_SAMPLES_PER_S), "--duration", str(_LONGEST_SAMPLING_S)]
    command += ["--output", str(file), "--pid", str(pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            process.stdout.readline()  # it has found its process, and samples now
            yield
        finally:
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=30)[0]
    if not file.exists():
        raise RuntimeError(f"py-spy: {said}")


def _top(raw):
    """From lines `outer;inner 12`: functions by their own samples, and by those of all they called."""
    own, within, total = Counter(), Counter(), 0
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        own[frames[-1]] += int(count)
        inside = max((at + 1 for at, frame in enumerate(frames) if frame.startswith(_LOOP)), default=0)
        within.update(dict.fromkeys(frames[inside:] or frames[-1:], int(count)))
        total += int(count)
    lines = [f"{total} samples at {_SAMPLES_PER_S} a second, idle ones not counted", "  own     all  function"]
    lines += [
        f"{100 * count / total:5.1f} % {100 * within[frame] / total:5.1f} %  {frame}"
        for frame, count in own.most_common(_SHOWN)
    ]
    lines += ["", "with all that they called:"]
    lines += [f"        {100 * count / total:5.1f} %  {frame}" for frame, count in within.most_common(_SHOWN)]
    return "\n".join(lines)
