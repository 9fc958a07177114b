"""What a workspace made up reaches clients as what it is, and breaks no answer."""

import json

import pytest

from orchestrator.api.event_stream import event
from orchestrator.api.terminal import chunk_object
from sidecar.protocol import MAX_TIME_MS, Record, RecordKind


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        (b'{"exitCode":3,"ptyHeldOpen":true}', {"exitCode": 3, "ptyHeldOpen": True}),
        (b'{"seq":7,"offset":0,"createdAt":"","type":"x\\ndata: y","text":"rm -rf"}', {}),
        (b'{"type":5,"exitCode":true,"signal":9}', {}),
        (b'{"exitCode":NaN,"cols":1e999,"rows":9007199254740992}', {}),
        (b'{"lost":"\\ud800"}', {"lost": "?"}),
    ],
)
def test_facts_of_a_record_never_stand_in_for_what_the_control_plane_says(data, facts):
    chunk = chunk_object(Record(1, 5, 1000, RecordKind.EXIT, data), base64_data=False)
    ours = {"seq": 1, "offset": 5, "text": "", "createdAt": "1970-01-01T00:00:01.000Z", "type": "exit"}
    assert chunk == ours | facts
    lines = event(chunk, name=chunk["type"], event_id="1").decode().split("\n")
    assert lines[:2] == ["id: 1", "event: exit"]
    assert json.loads(lines[2].removeprefix("data: ")) == chunk
    assert lines[3:] == ["", ""]


def test_the_last_time_that_the_link_lets_through_has_a_date():
    chunk = chunk_object(Record(1, 0, MAX_TIME_MS, RecordKind.OUTPUT, b"x"), base64_data=False)
    assert chunk["createdAt"] == "9999-12-31T23:59:59.999Z"
