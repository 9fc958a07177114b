"""The control plane's end of a link: acknowledgements only after the append, resumes, hostile frames, lost answers."""

import asyncio

import pytest
from redis.exceptions import ConnectionError as StoreGone

from orchestrator.terminal.link import LinkLost, RequestRefused, SidecarLink
from orchestrator.terminal.live import LiveBudget, LiveLog
from orchestrator.terminal.output_store import OutputStore
from sidecar.protocol import (
    STREAM_CREDIT_BYTES,
    ProtocolError,
    Record,
    RecordKind,
    decode_input,
    decode_json,
    encode_json,
    encode_records,
    encode_stream,
)
from tests.orchestrator.terminal.planes import session_named


class Wire:
    """A transport whose other end is the test."""

    def __init__(self):
        self.sent = asyncio.Queue()
        self.broken = False

    async def send_text(self, message):
        if self.broken:
            raise ConnectionResetError
        await self.sent.put(decode_json(message))

    async def send_binary(self, message):
        if self.broken:
            raise ConnectionResetError
        await self.sent.put(message)

    async def close(self, reason):
        self.broken = True

    async def next(self):
        return await asyncio.wait_for(self.sent.get(), 5)


@pytest.fixture
def store(redis):
    return OutputStore(redis, retention_bytes=1024 * 1024)


@pytest.fixture
async def wired(store):
    wire, appended = Wire(), []

    async def on_appended(_session_id, records):
        appended.extend(records)

    link = SidecarLink(session_named("cs_a"), wire, store, LiveLog(1, 0, LiveBudget()), on_appended=on_appended)
    appending = asyncio.create_task(link.run_appends())
    yield link, wire, appended
    link.lost()
    await asyncio.wait_for(appending, 5)


def outputs(first, count):
    return [Record(first + i, first + i - 1, 1000, RecordKind.OUTPUT, b"x") for i in range(count)]


async def test_records_are_acknowledged_when_the_store_has_them(wired, store):
    link, wire, appended = wired
    await link.receive(encode_records(outputs(1, 3)))
    assert await wire.next() == {"t": "ack", "seq": 3}
    assert (await store.bounds("cs_a"))[1] == 3
    assert [record.seq for record in appended] == [1, 2, 3]


async def test_while_the_store_is_away_nothing_is_acknowledged_and_nothing_forgotten(wired, store, monkeypatch):
    link, wire, _ = wired
    really, failures = store.append, 3

    async def failing(session_id, records):
        nonlocal failures
        if failures:
            failures -= 1
            raise StoreGone
        return await really(session_id, records)

    monkeypatch.setattr(store, "append", failing)
    await link.receive(encode_records(outputs(1, 2)))
    assert await wire.next() == {"t": "ack", "seq": 2}
    assert failures == 0


async def test_a_gap_makes_the_sidecar_send_again_and_what_was_under_way_is_passed_over(wired, store):
    link, wire, _ = wired
    await link.receive(encode_records(outputs(1, 2)))
    await wire.next()
    await link.receive(encode_records(outputs(5, 2)))
    assert await wire.next() == {"t": "resume", "after": 2}
    await link.receive(encode_records(outputs(7, 2)))  # sent before the sidecar read the resume
    await link.receive(encode_records(outputs(3, 6)))
    assert await wire.next() == {"t": "ack", "seq": 8}
    assert (await store.bounds("cs_a"))[1] == 8


async def test_an_answer_reaches_who_asked_and_a_refusal_too(wired):
    link, wire, _ = wired
    writing = asyncio.create_task(link.write_input("key", b"ls\n"))
    sent = decode_input(await wire.next())
    assert (sent.key, sent.data) == ("key", b"ls\n")
    await link.receive(encode_json({"t": "result", "id": sent.request_id, "bytes": 3}))
    assert await writing == 3
    starting = asyncio.create_task(link.request("start"))
    request = await wire.next()
    refusal = {"t": "error", "id": request["id"], "code": "terminal-running", "detail": "it runs", "facts": {}}
    await link.receive(encode_json(refusal))
    with pytest.raises(RequestRefused, match="it runs"):
        await starting


async def test_an_answer_that_is_none_is_a_refusal_and_not_a_failure_of_ours(wired):
    link, wire, _ = wired
    writing = asyncio.create_task(link.write_input("key", b"x"))
    sent = decode_input(await wire.next())
    await link.receive(encode_json({"t": "result", "id": sent.request_id, "bytes": "many"}))
    with pytest.raises(RequestRefused, match="invalid-answer"):
        await writing


async def test_whoever_waits_when_the_link_is_lost_is_told(wired):
    link, wire, _ = wired
    writing = asyncio.create_task(link.write_input("", b"x"))
    await wire.next()
    link.lost()
    with pytest.raises(LinkLost):
        await writing
    with pytest.raises(LinkLost):
        await link.request("start")


@pytest.mark.parametrize("use", [lambda link: link.write_input("", b"x"), lambda link: link.request("start")])
async def test_a_link_that_cannot_send_is_lost_for_everybody_at_once(wired, use):
    link, wire, _ = wired
    waiting = asyncio.create_task(link.write_input("", b"sent before"))
    await wire.next()
    wire.broken = True
    with pytest.raises(LinkLost):
        await use(link)
    assert link.closed.is_set(), "the next try would get it again"
    with pytest.raises(LinkLost):
        await waiting


async def test_who_stops_waiting_cancels_the_request(wired):
    link, wire, _ = wired
    asking = asyncio.create_task(link.request("archive"))
    request = await wire.next()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert await wire.next() == {"t": "cancel", "id": request["id"]}


async def test_a_stream_is_paid_for_as_it_is_read(wired):
    link, wire, _ = wired
    facts = {}
    stream = link.stream("archive", facts)
    reading = asyncio.create_task(anext(stream))
    request = await wire.next()
    await link.receive(encode_stream(request["id"], b"abc"))
    assert await reading == b"abc"
    reading = asyncio.create_task(anext(stream))
    assert await wire.next() == {"t": "credit", "id": request["id"], "bytes": 3}
    await link.receive(encode_stream(request["id"], b"d"))
    await link.receive(encode_json({"t": "result", "id": request["id"], "files": 2}))
    assert await reading == b"d"
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert facts["files"] == 2


async def test_a_stream_past_its_credit_is_a_breach_of_the_protocol(wired):
    link, wire, _ = wired
    reading = asyncio.create_task(anext(link.stream("archive", {})))
    request = await wire.next()
    for _ in range(2):
        await link.receive(encode_stream(request["id"], b"x" * STREAM_CREDIT_BYTES))
    with pytest.raises(ProtocolError, match="credit"):
        await link.receive(encode_stream(request["id"], b"x"))
    reading.cancel()


@pytest.mark.parametrize("message", ["{", b"", b"\x09abc", b"\x01abc", '{"t":"result"}', '{"t":"result","id":-1}'])
async def test_frames_of_no_protocol_are_refused(wired, message):
    with pytest.raises(ProtocolError):
        await wired[0].receive(message)
