"""How output reaches those who watch, and what they can do to the terminal besides typing: real serve, real shells."""

import pytest

from tests.end_to_end.conftest import on_both_runtimes


async def test_a_resize_reaches_the_program_and_stands_in_the_log_when_it_is_answered(client):
    session = await client.create("sized")
    await session.run("true")
    answer = await client.call("POST", f"{session.path}/resize", {"cols": 132, "rows": 43})
    assert answer.status == 200, answer
    assert answer.json["sessionId"] == session.id
    assert answer.json["terminal"] == {"state": "running", "cols": 132, "rows": 43}
    output = await client.call("GET", f"{session.path}/output")
    resizes = [chunk for chunk in output.json["chunks"] if chunk.get("type") == "resize"]
    assert [(chunk["cols"], chunk["rows"]) for chunk in resizes] == [(132, 43)]
    again = await client.call("POST", f"{session.path}/resize", {"cols": 132, "rows": 43})
    assert again.json == answer.json
    text, _ = await session.run("stty size")
    assert "43 132" in text
    await session.delete()
    ended = await client.call("POST", f"{session.path}/resize", {"cols": 80, "rows": 24})
    assert (ended.status, ended.json["code"]) == (409, "session-ended")


@on_both_runtimes("shared_serve")
async def test_a_signal_reaches_the_foreground_program_and_not_the_shell(client):
    session = await client.create("signalled")
    await session.run("true")
    for name, number in (("SIGINT", 2), ("SIGTERM", 15), ("SIGKILL", 9)):
        await session.send("sh -c 'echo sleeping-now; exec sleep 1000'\n")
        await session.until(r"sleeping-now\r\n")
        answer = await client.call("POST", f"{session.path}/signal", {"signal": name})
        assert (answer.status, answer.json) == (200, {"sent": True})
        await session.send("echo ended-with=$?\n")
        assert (await session.until(r"ended-with=\d+")).endswith(f"ended-with={128 + number}")
    await session.delete()


@pytest.mark.parametrize(
    ("call", "body", "field"),
    [
        ("resize", {"cols": 0, "rows": 24}, "cols"),
        ("resize", {"cols": 80, "rows": 1001}, "rows"),
        ("resize", {"cols": 80}, "rows"),
        ("resize", {"cols": "80", "rows": 24}, "cols"),
        ("signal", {"signal": "SIGSTOP"}, "signal"),
        ("signal", {"signal": 2}, "signal"),
        ("signal", {}, "signal"),
    ],
)
async def test_a_size_or_signal_that_cannot_be_is_refused_by_the_name_of_its_field(client, call, body, field):
    session = await client.create("refusing")
    answer = await client.call("POST", f"{session.path}/{call}", body)
    assert (answer.status, answer.json["code"]) == (400, "invalid-request")
    assert answer.json["errors"][0]["field"] == field
    await session.delete()
