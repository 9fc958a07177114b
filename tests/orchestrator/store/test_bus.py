"""Messages between processes through a real Valkey."""

import asyncio
import time

import pytest

from orchestrator.store import bus as bus_module
from orchestrator.store.bus import Bus
from orchestrator.tasks import end_tasks


@pytest.fixture
async def bus(redis):
    bus = Bus(redis)
    running = asyncio.create_task(bus.run())
    yield bus
    await end_tasks(running)


async def heard_within(messages, wanted, timeout_s=5):
    async with asyncio.timeout(timeout_s):
        while wanted not in messages:
            await asyncio.sleep(0.002)


async def test_a_confirmed_listener_misses_nothing(bus, redis):
    messages = []
    assert await bus.listen("here", messages.append)
    for number in range(100):
        assert await redis.publish("here", b"%d" % number) == 1
    await heard_within(messages, b"99")
    assert messages == [b"", *(b"%d" % number for number in range(100))]


async def test_several_listeners_of_a_channel_share_one_subscription(bus, redis):
    first, second = [], []
    assert await bus.listen("here", first.append)
    assert await bus.listen("here", second.append)
    assert await redis.publish("here", b"x") == 1
    await heard_within(second, b"x")
    bus.forget("here", first.append)


async def test_after_a_broken_connection_every_listener_is_told_to_look_again(bus, redis):
    messages = []
    assert await bus.listen("here", messages.append)
    messages.clear()
    await redis.client_kill_filter(_type="pubsub")
    await heard_within(messages, b"")
    await redis.publish("here", b"again")
    await heard_within(messages, b"again")


async def test_a_listener_that_fails_does_not_keep_others_from_their_messages(bus, redis):
    messages = []

    def broken(_message):
        raise RuntimeError("not understood")

    await bus.listen("here", broken)
    await bus.listen("here", messages.append)
    await redis.publish("here", b"x")
    await heard_within(messages, b"x")


async def test_listening_before_there_is_a_connection_is_made_good_later(redis):
    bus, messages = Bus(redis), []
    listening = asyncio.create_task(bus.listen("here", messages.append))
    await asyncio.sleep(0.05)
    running = asyncio.create_task(bus.run())
    assert await listening
    await end_tasks(running)


async def test_a_channel_that_nobody_listens_to_any_more_is_given_up_after_a_while(bus, redis, monkeypatch):
    monkeypatch.setattr(bus_module, "LINGER_S", 0.0)
    messages = []
    listener = messages.append
    await bus.listen("here", listener)
    bus.forget("here", listener)
    deadline = time.monotonic() + 10
    while (await redis.pubsub_numsub("here"))[0][1] and time.monotonic() < deadline:
        await redis.publish("cs:bus", b"")
        await asyncio.sleep(0.02)
    assert (await redis.pubsub_numsub("here"))[0][1] == 0
    assert await bus.listen("here", listener)
    await redis.publish("here", b"back")
    await heard_within(messages, b"back")
