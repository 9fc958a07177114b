"""Killed again and again while 100 MB go through a terminal: what was polled has the hash of what was written."""

import asyncio
import signal
import time

import psutil

from tests.end_to_end.flood import Reader, sha256, start_flood
from tests.end_to_end.harness import Serve
from tests.end_to_end.proof import keeping_all

SIZE_BYTES = 104_857_600
KILLS = 9
RATE_BYTES_S = 15_000_000  # slow enough that a tenth of it takes longer than to find a process and kill it


async def killing(flood, kill):
    """Kill at each tenth of the flood, which is under way each time."""
    for number in range(1, KILLS + 1):
        await flood.past(number * SIZE_BYTES // (KILLS + 1))
        assert flood.running, "the flood was over before the kill"
        await asyncio.to_thread(kill)


async def test_nothing_is_lost_or_doubled_when_serve_is_killed_again_and_again_in_a_flood(tmp_path):
    with keeping_all(tmp_path) as serve:
        async with serve.client() as client:
            session = await client.create("flood")
            flood = await start_flood(serve, session, SIZE_BYTES)
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(Reader(session).until_end())
                tasks.create_task(killing(flood, serve.restart))
        assert len(reading.result()) == SIZE_BYTES
        assert sha256(reading.result()) == flood.sha256


async def test_nothing_is_lost_or_doubled_when_the_store_is_killed_again_and_again_in_a_flood(tmp_path):
    with keeping_all(tmp_path) as serve:
        async with serve.client() as client:
            session = await client.create("flood")
            flood = await start_flood(serve, session, SIZE_BYTES, rate_bytes_s=RATE_BYTES_S)
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(Reader(session).until_end())
                tasks.create_task(killing(flood, lambda: serve.store().kill()))
        assert sha256(reading.result()) == flood.sha256


def lose_the_last_moments(serve: Serve, lost_bytes):
    """What a machine that loses its power does to an append-only file that is synced every second."""
    serve.process.send_signal(signal.SIGSTOP)  # or it would start the store again before the file is cut
    try:
        store = serve.store()
        store.kill()
        deadline = time.monotonic() + 10
        while store.is_running() and store.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        newest = max((serve.data_dir / "store").glob("appendonlydir/*.incr.aof"), key=_file_number)
        size = newest.stat().st_size
        with newest.open("r+b") as file:
            file.truncate(max(0, size - lost_bytes))
        return min(size, lost_bytes)
    finally:
        serve.process.send_signal(signal.SIGCONT)


def _file_number(path):
    return int(path.name.split(".")[-3])


async def test_a_store_that_loses_its_last_moments_in_a_flood_gets_them_again_from_the_sidecar(tmp_path):
    lost = []
    with keeping_all(tmp_path) as serve:
        async with serve.client() as client:
            session = await client.create("flood")
            flood = await start_flood(serve, session, SIZE_BYTES, rate_bytes_s=RATE_BYTES_S)
            reader = Reader(session, may_go_back=True)
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(reader.until_end())
                # Less than the 8 MiB of acknowledged records that a sidecar keeps.
                tasks.create_task(killing(flood, lambda: lost.append(lose_the_last_moments(serve, 3_000_000))))
        assert sha256(reading.result()) == flood.sha256
    assert len(lost) == KILLS
    assert sum(lost) > 3_000_000
