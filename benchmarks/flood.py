"""Much output at once: from the terminal, appended durably, to a client that polls."""

import shlex
import statistics
import subprocess
import tempfile
from pathlib import Path

import psutil

from benchmarks.expected import lines_of_words, through_a_terminal
from benchmarks.processes import result_of, server
from benchmarks.product import CpuSeconds, product
from benchmarks.rows import Row, spread

_FILE_BYTES = 100_000_000
_LINES = 2_000_000


def cat_of_a_large_file(options):
    with tempfile.TemporaryDirectory(prefix="cs-bench-file-") as folder:
        file = Path(folder) / "text"
        file.write_bytes(lines_of_words(_FILE_BYTES))
        expected = through_a_terminal(file.read_bytes())
        argv = ["cat", str(file)]
        ours, cpu, bare, terminado = [], [], [], []
        for _ in range(options.runs):
            took, used = _ours(argv, expected)
            ours.append(took)
            cpu.append(used)
            bare.append(_bare(argv, expected))
            terminado.append(_terminado(argv, expected))
    return [
        _row("cat of 100 MB, bare loop", expected, ours, bare, cpu, enough=0.60, aim=0.85),
        _row("cat of 100 MB, terminado", expected, ours, terminado, [], enough=1.2, aim=1.6),
    ]


def many_short_lines(options):
    argv = ["seq", "1", str(_LINES)]
    expected = through_a_terminal(subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout)
    ours, cpu, bare = [], [], []
    for _ in range(options.runs):
        took, used = _ours(argv, expected)
        ours.append(took)
        cpu.append(used)
        bare.append(_bare(argv, expected))
    return [_row(f"seq 1 {_LINES}, bare loop", expected, ours, bare, cpu, enough=0.60, aim=0.85)]


def _row(bench, expected, ours, peer, cpu, *, enough, aim):
    ours, peer = ([expected.length / took / 1e6 for took in runs] for runs in (ours, peer))
    notes = []
    if cpu:
        each = {name: statistics.median(used[name] for used in cpu) for name in cpu[0]}
        notes.append(
            f"{bench}: CPU seconds of ours: " + ", ".join(f"{name} {value:.2f}" for name, value in each.items())
        )
    return Row(
        bench,
        spread(ours, "MB/s"),
        spread(peer, "MB/s"),
        statistics.median(ours) / statistics.median(peer),
        enough=enough,
        aim=aim,
        more_is_better=True,
        notes=notes,
    )


def _ours(argv, expected):
    """Seconds, and the CPU seconds of each process. Control plane and store are new each time."""
    with product() as running:
        session = running.create()
        after = running.run(session, "stty -echo; PS1=")
        [sidecar] = running.sidecars()
        cpu = CpuSeconds(
            serve=[psutil.Process(running.serve.process.pid)],
            store=[running.serve.store()],
            sidecar=[sidecar],
            shell=sidecar.children(),
        )
        result = result_of(
            "polling_client",
            port=running.port,
            key=running.key,
            session=session,
            after=after,
            command=shlex.join(argv),
            expected=expected.as_parameters(),
        )
        used = cpu.used() | {"client": result["cpu_s"]}
        running.delete(session)
    return result["took_s"], used


def _bare(argv, expected):
    return result_of("bare_loop", argv=argv, length=expected.length)["took_s"]


def _terminado(argv, expected):
    with server("terminado_peer") as (_, port):
        result = result_of("terminado_client", port=port, command=shlex.join(argv), expected=expected.as_parameters())
    return result["took_s"]
