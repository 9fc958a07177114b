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
_OUTERMOST = 0.9  # who is there in more of the samples only calls the others
_LONGEST_SAMPLING_S = 120


@contextlib.contextmanager
def sampled(**pids):
    """Samples the named processes inside; a dict that has each name's top functions as text afterwards."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="cs-bench-profile-") as folder:
        with contextlib.ExitStack() as stack:
            for name, pid in pids.items():
                stack.enter_context(_sampler(pid, Path(folder) / name))
            yield found
        for name in pids:
            found[name] = _top((Path(folder) / name).read_text())


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
        within.update(dict.fromkeys(frames, int(count)))
        total += int(count)
    lines = [f"{total} samples at {_SAMPLES_PER_S} a second, idle ones not counted", "  own     all  function"]
    lines += [
        f"{100 * count / total:5.1f} % {100 * within[frame] / total:5.1f} %  {frame}"
        for frame, count in own.most_common(_SHOWN)
    ]
    lines += ["", "with all that they called:"]
    called = [(frame, count) for frame, count in within.most_common() if count < _OUTERMOST * total]
    lines += [f"        {100 * count / total:5.1f} %  {frame}" for frame, count in called[:_SHOWN]]
    return "\n".join(lines)
