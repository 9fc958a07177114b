import asyncio

import pytest

from deploy_pipeline import logs
from deploy_pipeline.jobs import app_id_of_session, new_deployment_id
from deploy_pipeline.logs import Log, LogStore, LogWriter, complete_utf8, deployment_log, in_chunks

APP = app_id_of_session("cs_1")
APP_LOG = Log(APP)


@pytest.fixture
def store(redis):
    return LogStore(redis)


@pytest.fixture
async def build_log(redis):
    """A deployment's log, under a claim with the fence 7."""
    await redis.hset(f"deploy:{{{APP}}}", "fence", "7")
    return Log(APP, new_deployment_id(APP))


async def read_all(store, log, limit=1000):
    """As a client does: page by page."""
    text, seqs, after = "", [], 0
    while (page := await store.read(log, after=after, limit=limit)).chunks:
        text += "".join(chunk.text for chunk in page.chunks)
        seqs += [chunk.seq for chunk in page.chunks]
        after = seqs[-1]
    return text, seqs


async def test_a_deployments_log_is_read_whole_in_pages_with_numbers_from_one(store, build_log):
    text = "".join(f"line {number} ü€😀\n" for number in range(20_000))
    async with deployment_log(store, build_log, fence=7) as writer:
        for start in range(0, len(text.encode()), 1000):
            writer.write(text.encode()[start : start + 1000])
            if start % 50_000 == 0:
                await writer.flush()
    for limit in (1, 7, 1000):
        found, seqs = await read_all(store, build_log, limit)
        assert found == text
        assert seqs == list(range(1, len(seqs) + 1))


async def test_a_writer_whose_claim_is_lost_writes_nothing(store, build_log, redis):
    stale = LogWriter(store, build_log, fence=7)
    stale.say("mine")
    await stale.flush()
    await redis.hset(f"deploy:{{{APP}}}", "fence", "8")
    stale.say("too late")
    await stale.flush()
    fresh = LogWriter(store, build_log, fence=8)
    fresh.say("next")
    await fresh.flush()
    assert (await read_all(store, build_log))[0] == "mine\nnext\n"


async def test_a_piece_that_is_sent_again_is_stored_once(store, redis):
    for _ in range(3):
        assert await store.append(APP_LOG, [b"once\n"], source="dep_1", at="", then="5") == "5"
    assert await store.append(APP_LOG, [b"from the past\n"], source="dep_1", at="2", then="9") == "5"
    assert (await store.position(APP_LOG, "dep_1"), await store.position(APP_LOG, "dep_2")) == ("5", "")
    assert (await read_all(store, APP_LOG))[0] == "once\n"


async def test_what_is_too_much_is_trimmed_from_the_oldest_and_the_first_number_tells(store, monkeypatch):
    monkeypatch.setattr(logs, "APP_LOG_BYTES", 100)
    for number in range(10):
        await store.append(APP_LOG, [b"x" * 30], source="s", at=str(number or ""), then=str(number + 1))
    page = await store.read(APP_LOG, after=0, limit=100)
    assert [chunk.seq for chunk in page.chunks] == [8, 9, 10]
    assert (page.first_seq, page.last_seq) == (8, 10)


async def test_output_that_the_store_cannot_take_is_bounded_and_its_loss_is_said(store, build_log, monkeypatch):
    monkeypatch.setattr(logs, "_BUFFER_BYTES", 10)
    writer = LogWriter(store, build_log, fence=7)
    writer.write(b"0123456789abc")
    await writer.flush()
    assert (await read_all(store, build_log))[0] == "[3 bytes of output are missing here]\n3456789abc"


async def test_a_reader_that_waits_is_woken_by_the_next_chunk(store):
    async with asyncio.timeout(0.9):
        waiting = asyncio.create_task(store.wait(APP_LOG, after=0, wait_s=30))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await store.append(APP_LOG, [b"now"], source="s", at="", then="3")
        await waiting


async def test_an_unknown_log_is_empty(store):
    page = await store.read(APP_LOG, after=0, limit=10)
    assert (page.chunks, page.first_seq, page.last_seq) == ([], 1, 0)


def test_no_character_is_split_between_chunks():
    text = "ü€😀" * 20_000
    pieces = in_chunks(text.encode())
    assert "".join(piece.decode() for piece in pieces) == text
    assert max(map(len, pieces)) <= logs.CHUNK_BYTES


@pytest.mark.parametrize("character", ["ü", "€", "😀"])
def test_the_beginning_of_a_character_is_held_back(character):
    data = character.encode()
    for cut in range(1, len(data)):
        assert complete_utf8(b"a" + data[:cut]) == 1
    assert complete_utf8(b"a" + data) == 1 + len(data)
    assert complete_utf8(b"\xff\xff") in {1, 2}
    assert complete_utf8(b"a\x80\x80\x80\x80") == 5
