"""The store's own promises about the log, on a real Valkey."""

import asyncio

import pytest

from orchestrator.models import TerminalState
from orchestrator.sessions.terminals import Output
from orchestrator.terminal.output_store import LogClosed, OutputStore, events_channel, record_facts
from sidecar.protocol import MAX_SEQ, Record, RecordKind

RETENTION = 64 * 1024


@pytest.fixture
def store(redis):
    return OutputStore(redis, retention_bytes=RETENTION)


def outputs(first, count, *, size=10, offset=None):
    start = (first - 1) * size if offset is None else offset
    return [
        Record(
            first + i, start + i * size, 1000 + first + i, RecordKind.OUTPUT, b"%06d" % (first + i) + b"." * (size - 6)
        )
        for i in range(count)
    ]


def event(seq, kind, data, offset=0):
    return Record(seq, offset, 1000 + seq, kind, data)


async def test_records_are_read_back_as_they_were_appended(store):
    records = outputs(1, 50)
    assert (await store.append("cs_a", records)).last_seq == 50
    page = await store.read("cs_a", after=0, limit=1000)
    assert page.records == records
    assert (page.first_seq, page.last_seq) == (1, 50)


async def test_what_is_there_already_is_passed_over_and_never_changed(store):
    first = outputs(1, 10)
    await store.append("cs_a", first)
    changed = [record._replace(data=b"CHANGED") for record in first]
    appended = await store.append("cs_a", [*changed[5:], *outputs(11, 2)])
    assert appended.complete
    page = await store.read("cs_a", after=0, limit=1000)
    assert page.records == [*first, *outputs(11, 2)]


async def test_a_gap_is_refused_and_the_answer_says_where_the_store_stands(store):
    await store.append("cs_a", outputs(1, 3))
    appended = await store.append("cs_a", outputs(5, 3))
    assert (appended.complete, appended.last_seq) == (False, 3)
    assert (await store.bounds("cs_a"))[1] == 3


async def test_two_writers_that_both_believe_to_own_a_session_do_no_harm(store):
    records = outputs(1, 300)

    async def writer(step):
        position = 0
        while position < len(records):
            appended = await store.append("cs_a", records[position : position + step])
            position = appended.last_seq

    await asyncio.gather(writer(7), writer(11), writer(3))
    assert (await store.read("cs_a", after=0, limit=1000)).records == records


async def test_a_page_has_at_most_the_asked_number_and_about_the_asked_bytes(store, redis):
    big = OutputStore(redis, retention_bytes=64 * 1024 * 1024)
    await big.append("cs_a", outputs(1, 400, size=100))
    assert len((await big.read("cs_a", after=0, limit=7)).records) == 7
    page = await big.read("cs_a", after=0, limit=1000, max_bytes=5000)
    assert [record.seq for record in page.records] == list(range(1, 51))
    assert [record.seq for record in (await big.read("cs_a", after=390, limit=1000)).records] == list(range(391, 401))
    assert (await big.read("cs_a", after=1, limit=1, max_bytes=1)).records[0].seq == 2, (
        "one at least, whatever its size"
    )


async def test_the_oldest_are_trimmed_by_bytes_and_readers_are_told(store):
    for first in range(1, 401, 20):
        await store.append("cs_a", outputs(first, 20, size=1000))
    page = await store.read("cs_a", after=0, limit=1000)
    kept = sum(len(record.data) for record in page.records)
    assert RETENTION * 0.9 < kept <= RETENTION
    assert page.first_seq == page.records[0].seq > 1
    assert page.records[-1].seq == page.last_seq == 400


async def test_many_tiny_chunks_are_kept_as_long_as_their_bytes_allow(store):
    for first in range(1, 3001, 100):
        await store.append("cs_a", outputs(first, 100, size=6))
    assert (await store.read("cs_a", after=0, limit=1)).first_seq == 1


async def test_the_terminals_state_follows_its_records(store):
    assert await store.terminal_state("cs_a") == TerminalState()
    await store.append("cs_a", [event(1, RecordKind.START, b'{"cols":80,"rows":24}')])
    assert await store.terminal_state("cs_a") == TerminalState("running", 80, 24)
    await store.append("cs_a", [event(2, RecordKind.RESIZE, b'{"cols":100,"rows":30}')])
    await store.append("cs_a", [event(3, RecordKind.EXIT, b'{"exitCode":3}')])
    assert await store.terminal_state("cs_a") == TerminalState("exited", 100, 30, {"exitCode": 3})
    await store.append("cs_a", [event(4, RecordKind.START, b'{"cols":90,"rows":20}')])
    assert await store.terminal_state("cs_a") == TerminalState("running", 90, 20)


async def test_facts_that_a_workspace_made_up_do_not_break_a_reader(store):
    await store.append("cs_a", [event(1, RecordKind.START, b'{"cols":"wide"}'), event(2, RecordKind.EXIT, b"[[[")])
    assert await store.terminal_state("cs_a") == TerminalState("exited", 80, 24, {})


async def test_after_a_loss_that_nothing_can_heal_the_log_goes_on_and_says_what_is_missing(store):
    await store.append("cs_a", outputs(1, 5))
    await store.skip_to("cs_a", 9)
    assert (await store.append("cs_a", outputs(10, 2))).complete
    page = await store.read("cs_a", after=5, limit=10)
    assert page.records[0].seq == 10
    assert page.first_seq == 10
    before = Output(await store.read("cs_a", after=0, limit=10), 0)
    assert [record.seq for record in before.page.records] == [1, 2, 3, 4, 5], "nothing is skipped within a page"
    assert (before.truncated, before.has_more) == (False, True)
    behind = Output(await store.read("cs_a", after=5, limit=10), 5)
    assert (behind.truncated, behind.last_seq) == (True, 11)


async def test_a_loss_that_is_found_a_second_time_does_not_turn_the_log_back(store):
    await store.skip_to("cs_a", 49)
    await store.append("cs_a", outputs(50, 30))
    await store.skip_to("cs_a", 49)  # a replica that hung, or redis-py repeating a command
    assert (await store.append("cs_a", outputs(75, 10))).complete
    assert await store.bounds("cs_a") == (50, 84)


@pytest.mark.parametrize("seq", [10**14, MAX_SEQ])
async def test_numbers_that_a_workspace_made_up_can_be_appended_and_closed(store, seq):
    await store.skip_to("cs_a", seq - 1)
    assert (await store.append("cs_a", [event(seq, RecordKind.START, b"{}")])).last_seq == seq
    await store.close("cs_a", lost_reason="gone", at_ms=1)
    page = await store.read("cs_a", after=0, limit=10)
    assert [record.seq for record in page.records] == [seq, seq + 1]


@pytest.mark.parametrize("after", [2, 2**53, 2**64, 10**30])
async def test_after_the_newest_there_is_nothing_however_far(store, after):
    await store.append("cs_a", outputs(1, 1))
    page = await store.read("cs_a", after=after, limit=10)
    assert (page.records, page.last_seq) == ([], 1)


async def test_a_closed_log_takes_nothing_more_and_says_that_the_terminal_was_lost(store):
    await store.append("cs_a", [event(1, RecordKind.START, b'{"cols":80,"rows":24}'), *outputs(2, 1, offset=0)])
    for _ in range(2):
        await store.close("cs_a", lost_reason="the machine was switched off", at_ms=5)
    with pytest.raises(LogClosed):
        await store.append("cs_a", outputs(3, 1))
    page = await store.read("cs_a", after=0, limit=10)
    lost = page.records[-1]
    assert (lost.seq, lost.kind, lost.offset) == (3, RecordKind.EXIT, 10)
    assert lost.time_ms == 1002, "times never run backwards in a log"
    assert record_facts(lost.data) == {"lost": "the machine was switched off"}
    state = await store.terminal_state("cs_a")
    assert (state.state, state.exit) == ("lost", {"lost": "the machine was switched off"})


async def test_an_end_that_is_in_the_log_stays_the_only_one(store):
    await store.append("cs_a", [event(1, RecordKind.START, b"{}"), event(2, RecordKind.EXIT, b'{"exitCode":0}')])
    await store.close("cs_a", lost_reason="never said", at_ms=5)
    assert await store.bounds("cs_a") == (1, 2)
    assert (await store.terminal_state("cs_a")).state == "exited"
    await store.close("cs_never", lost_reason="no terminal ever came up", at_ms=5)
    assert await store.bounds("cs_never") == (1, 0)


async def test_days_after_the_end_the_output_goes_and_readers_are_told(redis):
    store = OutputStore(redis, retention_bytes=RETENTION, retention_days=1 / 86400)
    await store.append("cs_a", outputs(1, 5))
    await store.close("cs_a", lost_reason="", at_ms=5)
    async with asyncio.timeout(5):
        while (page := await store.read("cs_a", after=2, limit=10)).records:
            await asyncio.sleep(0.05)
    assert (page.first_seq, page.last_seq) == (6, 5)
    assert Output(page, 2).truncated
    assert not Output(await store.read("cs_a", after=5, limit=10), 5).truncated


async def test_an_append_tells_whoever_listens(store, redis):
    async with redis.pubsub() as listening:
        await listening.subscribe(events_channel("cs_a"))
        await listening.get_message(timeout=5)
        await store.append("cs_a", outputs(1, 3))
        await store.append("cs_a", outputs(1, 3))  # nothing new: nobody is woken
        await store.append("cs_a", outputs(4, 1))
        heard = [(await listening.get_message(timeout=5))["data"] for _ in range(2)]
    assert heard == [b"3", b"4"]


async def test_tiny_chunks_count_enough_that_they_cannot_fill_the_stores_memory(store, redis):
    for first in range(1, 20_001, 1000):
        await store.append("cs_a", [Record(first + i, first + i, 1000, RecordKind.OUTPUT, b"x") for i in range(1000)])
    assert await redis.memory_usage("cs:{cs_a}:log") < 8 * RETENTION
    assert (await store.bounds("cs_a"))[0] > 10_000
