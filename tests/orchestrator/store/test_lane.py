"""Many callers of one script over one connection, against a real Valkey."""

import asyncio

import pytest
from redis.exceptions import ConnectionError as StoreGone
from redis.exceptions import ResponseError

from orchestrator.store.lane import ScriptLane

_COUNT = (
    "if ARGV[1] == 'fail' then return redis.error_reply('OOPS no') end return redis.call('INCRBY', KEYS[1], ARGV[1])"
)


@pytest.fixture
def lane(redis):
    return ScriptLane(redis, redis.register_script(_COUNT))


async def test_each_caller_gets_its_own_answer_however_many_call_at_once(lane):
    answers = await asyncio.gather(*(lane.run([f"n{place}"], [place + 1], size_bytes=1) for place in range(300)))
    assert answers == list(range(1, 301))


async def test_callers_that_come_together_share_trips(lane, redis):
    await lane.run(["n"], [1], size_bytes=1)
    connections = (await redis.info("stats"))["total_connections_received"]
    trips = []
    exchange = lane._exchange

    async def counted(commands):
        trips.append(len(commands))
        return await exchange(commands)

    lane._exchange = counted
    await asyncio.gather(*(lane.run(["n"], [1], size_bytes=1) for _ in range(200)))
    assert sum(trips) == 200
    assert len(trips) < 20
    assert (await redis.info("stats"))["total_connections_received"] <= connections + 1
    assert await redis.get("n") == b"201"


async def test_one_callers_error_is_nobody_elses(lane):
    good, bad, other = await asyncio.gather(
        lane.run(["n"], [5], size_bytes=1),
        lane.run(["n"], ["fail"], size_bytes=1),
        lane.run(["m"], [7], size_bytes=1),
        return_exceptions=True,
    )
    assert (good, other) == (5, 7)
    assert isinstance(bad, ResponseError)


async def test_a_store_that_forgot_the_script_is_given_it_again(lane, redis):
    await lane.run(["n"], [1], size_bytes=1)
    await redis.script_flush()
    answers = await asyncio.gather(*(lane.run(["n"], [1], size_bytes=1) for _ in range(5)))
    assert sorted(answers) == [2, 3, 4, 5, 6]


async def test_a_broken_connection_fails_who_used_it_and_the_next_call_works(lane, redis):
    await lane.run(["n"], [1], size_bytes=1)
    await redis.client_kill_filter(skipme=True)
    with pytest.raises(StoreGone):
        await lane.run(["n"], [1], size_bytes=1)
    assert await lane.run(["n"], [1], size_bytes=1) == 2


async def test_a_caller_that_gives_up_leaves_the_others_their_answers(lane):
    calls = [asyncio.create_task(lane.run([f"n{place}"], [1], size_bytes=1)) for place in range(50)]
    await asyncio.sleep(0)
    calls[0].cancel()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    # The one that was driving took the trip with it: those on it are told so, and no caller waits for ever.
    assert all(answer == 1 or isinstance(answer, Exception | asyncio.CancelledError) for answer in answers)
    assert await lane.run(["after"], [1], size_bytes=1) == 1
