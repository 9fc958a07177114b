"""Much output at once: from the terminal, appended durably, to a client that polls."""

import shlex
import statistics
import subprocess
import tempfile
from pathlib import Path

from benchmarks.expected import lines_of_words, through_a_terminal
from benchmarks.processes import result_of, server
from benchmarks.product import CpuSeconds, product
from benchmarks.profiling import sampled
from benchmarks.rows import Row, spread

_FILE_BYTES = 100_000_000
_LINES = 2_000_000


def cat_of_a_large_file(options):
    with tempfile.TemporaryDirectory(prefix="cs-bench-file-") as folder:
        file = Path(folder) / "text"
        file.write_bytes(lines_of_words(_FILE_BYTES))
        expected = through_a_terminal(file.read_bytes())
        ours, bare, terminado = _in_turn(options, ["cat", str(file)], expected, _ours, _bare, _terminado)
    bench = "`cat` of 100 MB"
    return [
        _row(f"{bench} / bare loop", expected, ours, bare, _costs(bench, ours), enough=0.60, aim=0.85),
        _row(f"{bench} / terminado", expected, ours, terminado, [], enough=1.2, aim=1.6),
    ]


def many_short_lines(options):
    argv = ["seq", "1", str(_LINES)]
    expected = through_a_terminal(subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout)
    ours, bare = _in_turn(options, argv, expected, _ours, _bare)
    bench = f"`{shlex.join(argv)}`"
    return [_row(f"{bench} / bare loop", expected, ours, bare, _costs(bench, ours), enough=0.60, aim=0.85)]


def _in_turn(options, argv, expected, *contenders):
    """The results of each contender. One after the other and again, so that a busy moment of the machine hits all."""
    if options.profile:
        _ours(argv, expected, profile=True)
    rounds = [[contender(argv, expected) for contender in contenders] for _ in range(options.runs)]
    return [list(results) for results in zip(*rounds, strict=True)]


def _row(bench, expected, ours, peer, notes, *, enough, aim):
    ours, peer = ([expected.length / result["took_s"] / 1e6 for result in results] for results in (ours, peer))
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


def _costs(bench, results):
    def median(name):
        return statistics.median(result[name] for result in results)

    cpu = ", ".join(f"{name} {median(name):.2f}" for name in ("serve", "store", "sidecar", "shell", "client"))
    counts = f"{median('polls'):.0f} polls, {median('chunks'):.0f} chunks"
    return [f"{bench}: CPU seconds of a run: {cpu}; {median('took_s'):.2f} s in all, {counts}."]


def _ours(argv, expected, *, profile=False):
    """Control plane and store are new each time, so that no run has to carry what an earlier one left."""
    with product() as running:
        session = running.create()
        parameters = {"port": running.port, "key": running.key, "session": session}
        parameters |= {"after": running.run(session, "stty -echo; PS1="), "command": shlex.join(argv)}
        serve, [sidecar] = running.serve_process(), running.sidecars()
        shell = sidecar.children()  # and what it starts: ended children count for their parent
        cpu = CpuSeconds(serve=[serve], store=[running.serve.store()], sidecar=[sidecar], shell=shell)
        with sampled(parameters["command"], wanted=profile, serve=serve.pid, sidecar=sidecar.pid):
            result = result_of("polling_client", **parameters, expected=expected.as_parameters())
        result |= cpu.used() | {"client": result["cpu_s"]}
        running.delete(session)
    return result


def _bare(argv, expected):
    return result_of("bare_loop", argv=argv, length=expected.length)


def _terminado(argv, expected):
    with server("terminado_peer") as (_, port):
        return result_of("terminado_client", port=port, command=shlex.join(argv), expected=expected.as_parameters())
