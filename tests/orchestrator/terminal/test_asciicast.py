"""Recordings, held to the format's page: header, relative intervals, codes."""

import json

from orchestrator.terminal.asciicast import Asciicast
from sidecar.protocol import Record, RecordKind


def record(seq, kind, data, time_ms):
    encoded = data if isinstance(data, bytes) else json.dumps(data).encode()
    return Record(seq, 0, time_ms, kind, encoded)


LOG = [
    record(1, RecordKind.START, {"cols": 100, "rows": 30}, 1_700_000_000_500),
    record(2, RecordKind.OUTPUT, "€".encode(), 1_700_000_000_750),
    record(3, RecordKind.RESIZE, {"cols": 90, "rows": 20}, 1_700_000_001_000),
    record(4, RecordKind.EXIT, {"exitCode": 1}, 1_700_000_002_000),
    record(5, RecordKind.START, {"cols": 90, "rows": 20}, 1_700_000_001_500),
    record(6, RecordKind.OUTPUT, b"\xff\x1b[0m\n", 1_700_000_001_600),
    record(7, RecordKind.EXIT, {"signal": "SIGKILL"}, 1_700_000_004_000),
]


def lines_of(cast):
    """The lines of a recording; asserts what the format says of each."""
    assert cast.endswith(b"\n")
    lines = cast.decode().splitlines()
    header = json.loads(lines[0])
    assert header["version"] == 3
    assert {"cols", "rows"} <= set(header["term"])
    assert isinstance(header.get("timestamp", 0), int)
    events = [json.loads(line) for line in lines[1:] if not line.startswith("#")]
    for interval, code, data in events:
        assert isinstance(interval, int | float)
        assert interval >= 0
        assert code in {"o", "i", "m", "r", "x"}
        assert isinstance(data, str)
    return header, events, [line for line in lines[1:] if line.startswith("#")]


def test_events_have_intervals_since_the_one_before_and_only_the_last_exit_ends_the_recording():
    cast = Asciicast(title="demo", cols=1, rows=1)
    header, events, comments = lines_of(b"".join(cast.feed([one]) for one in LOG) + cast.end())
    assert header == {
        "version": 3,
        "timestamp": 1_700_000_000,
        "term": {"cols": 100, "rows": 30, "type": "xterm-256color"},
        "title": "demo",
    }
    assert events == [
        [0.25, "o", "€"],
        [0.25, "r", "90x20"],
        [1.0, "m", "exit 1"],
        [0.0, "o", "\ufffd\x1b[0m\n"],  # the clock was set back meanwhile
        [2.0, "x", "137"],
    ]
    assert comments == []


def test_how_the_log_is_cut_into_pages_makes_no_difference():
    one, many = Asciicast(title="t", cols=1, rows=1), Asciicast(title="t", cols=1, rows=1)
    whole = one.feed(LOG) + one.end()
    assert b"".join(many.feed(LOG[i : i + 2]) for i in range(0, len(LOG), 2)) + many.end() == whole


def test_a_trimmed_log_begins_with_the_size_it_is_given_and_says_what_is_missing():
    cast = Asciicast(title="t", cols=33, rows=11)
    header, events, comments = lines_of(cast.feed(LOG[1:2], truncated_before=2) + cast.end())
    assert (header["term"]["cols"], header["term"]["rows"]) == (33, 11)
    assert events == [[0.0, "o", "€"]]
    assert comments == ["# output before seq 2 was trimmed"]


def test_a_session_without_output_is_a_header():
    header, events, _ = lines_of(Asciicast(title="t", cols=80, rows=24).end())
    assert (header["term"]["cols"], events) == (80, [])
