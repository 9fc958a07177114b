"""From a key to its echo, one at a time, in a terminal whose program only reads."""

import time

from benchmarks.processes import result_of, server
from benchmarks.product import product
from benchmarks.rows import Row, number, percentile

_KEYS_PER_RUN = 200
_READER = "cat >/dev/null\n"  # the echo is the terminal's own, so that it costs no program's time


def by_polls(options):
    """POST /input and a poll that is held already when the key is sent."""
    return _compare(options, "polls", "POST + held poll", enough=4, aim=2.5)


def by_socket(options):
    return _compare(options, "socket", "our WebSocket", enough=1.5, aim=1)


def _compare(options, way, title, *, enough, aim):
    ours_ms, peer_ms = [], []
    for _ in range(options.runs):
        result = _ours(way)
        if "refused" in result:
            refusal = f"key to echo by {title}: the handshake was answered with {result['refused']}"
            return [Row(f"key to echo, {title}", notes=[refusal])]
        ours_ms += result["times_ms"]
        peer_ms += _terminado()["times_ms"]
    return [
        Row(
            f"key to echo, {title} / terminado, p{percent}",
            f"{number(percentile(ours_ms, percent))} ms",
            f"{number(percentile(peer_ms, percent))} ms",
            percentile(ours_ms, percent) / percentile(peer_ms, percent),
            # The bounds are for the median; what is rare is shown beside it.
            enough=enough if percent == 50 else None,
            aim=aim if percent == 50 else None,
            notes=[f"key to echo by {title}: {len(ours_ms)} keys each."] if percent == 50 else [],
        )
        for percent in (50, 99)
    ]


def _ours(way):
    with product() as running:
        session = running.create()
        running.run(session, "PS1=")
        running.send(session, _READER)
        time.sleep(1)
        parameters = {"port": running.port, "key": running.key, "session": session, "after": running.last_seq(session)}
        result = result_of("keystroke_client", way=way, count=_KEYS_PER_RUN, **parameters)
        running.delete(session)
    return result


def _terminado():
    with server("terminado_peer") as (_, port):
        return result_of("keystroke_client", way="terminado", count=_KEYS_PER_RUN, port=port, command=_READER)
