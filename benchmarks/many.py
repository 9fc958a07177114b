"""Many sessions that print a little all the time: how late what they print is delivered."""

import statistics

from benchmarks.processes import result_of
from benchmarks.product import CpuSeconds, product
from benchmarks.profiling import sampled
from benchmarks.rows import Row, number, percentile

_SESSIONS = 100
_LINES_PER_S = 10
_LINE_BYTES = 1000
_WARM_UP_S = 5
_MEASURED_S = 20
# `read` from a pipe that nobody writes to is bash's own sleep: a `sleep` would start a process for each line. Each line
# begins with the time at which it was printed.
_PRINTER = (
    "exec {quiet}<> <(:); stty -echo; PS1=; printf -v pad '%{width}s' ''; "
    "while :; do printf '%s %s\\n' $EPOCHREALTIME \"$pad\"; read -t {pause} -u $quiet; done\n"
)


def delivery_delay(options):
    command = _PRINTER.replace("{width}", str(_LINE_BYTES - 20)).replace("{pause}", f"{1 / _LINES_PER_S}")
    with product() as running:
        sessions = [running.create() for _ in range(_SESSIONS)]
        for session in sessions:
            running.send(session, command)
        serve, sidecars = running.serve_process(), running.sidecars()
        shells = [child for sidecar in sidecars for child in sidecar.children()]
        cpu = CpuSeconds(serve=[serve], store=[running.serve.store()], sidecars=sidecars, shells=shells)
        after = {session: running.last_seq(session) for session in sessions}
        parameters = {"port": running.port, "key": running.key, "after": after}
        with sampled(f"{_SESSIONS} sessions", wanted=options.profile, serve=serve.pid, sidecar=sidecars[0].pid):
            result = result_of("delay_client", **parameters, warm_up_s=_WARM_UP_S, measured_s=_MEASURED_S)
        used = cpu.used() | {"client": result["cpu_s"]}
    delays_ms = result["delays_ms"]
    bench = f"{_SESSIONS} sessions, {_LINES_PER_S * _LINE_BYTES / 1000:.0f} KB/s each: delay"
    wanted = _SESSIONS * _LINES_PER_S * _MEASURED_S
    shown = ", ".join(f"{name} {value:.1f}" for name, value in used.items())
    return [
        Row(
            bench,
            f"p50 {number(statistics.median(delays_ms))}, p99 {number(percentile(delays_ms, 99))}, "
            f"max {number(max(delays_ms))} ms",
            compared=percentile(delays_ms, 99),
            unit=" ms",
            enough=50,
            aim=20,
            notes=[
                f"{bench}: {len(delays_ms)} lines in {_MEASURED_S} s, {wanted} when no printer is held up",
                f"{bench}: CPU seconds in {_WARM_UP_S + _MEASURED_S} s: {shown}",
            ],
        )
    ]
