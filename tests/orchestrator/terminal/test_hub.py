"""Links, wherever they are: several hubs on one real store, whose sidecars answer by themselves."""

import asyncio
import time

import pytest

from orchestrator.terminal.link import LinkLost
from sidecar.protocol import STREAM_CREDIT_BYTES, Record, RecordKind, encode_json, encode_records, encode_stream
from tests.orchestrator.terminal.planes import replicas, until


def record(seq, data=b"x"):
    return Record(seq, seq - 1, 1000, RecordKind.OUTPUT, data)


async def nobody_minds():
    pass


async def test_a_newer_link_takes_the_place_of_the_older_at_once(redis):
    async with replicas(redis, "a") as (one,):
        older = await one.link_sidecar("cs_a")
        newer = await one.link_sidecar("cs_a")
        assert one.hub.link("cs_a") is newer.link
        assert older.link.closed.is_set()
        await until(lambda: older.goodbye)
        assert await one.hub.detach(older.link) is False
        assert one.hub.link("cs_a") is newer.link
        assert await one.hub.detach(newer.link) is True
        assert one.hub.link("cs_a") is None
        assert not await one.hub.holds("cs_a")


async def test_dead_links_delay_the_end_once_and_not_each(redis):
    async with replicas(redis, "a") as (one,):

        async def slowly(_reason):
            await asyncio.sleep(0.3)

        for place in range(20):
            (await one.link_sidecar(f"cs_{place}")).close = slowly
        async with asyncio.timeout(1):
            await one.hub.close()


async def test_input_reaches_the_replica_that_holds_the_link(redis):
    async with replicas(redis, "a", "b") as (holder, other):
        sidecar = await holder.link_sidecar("cs_a")
        async with other.hub.watching("cs_a"):
            link = await other.hub.link_within("cs_a", 1, nobody_minds)
            assert await link.write_input("key", b"ls\n\xff") == 4
            assert (await link.request("resize", cols=100, rows=30))["op"] == "resize"
        assert sidecar.typed == {"key": b"ls\n\xff"}
        assert sidecar.requests == [("resize", {"cols": 100, "rows": 30})]


async def test_an_append_on_one_replica_wakes_a_waiter_on_another_within_milliseconds(redis):
    async with replicas(redis, "a", "b") as (holder, other):
        sidecar = await holder.link_sidecar("cs_a")
        delays = []
        async with other.hub.watching("cs_a") as watch:
            for seq in range(1, 101):
                watch.clear()
                sent = time.monotonic()
                await sidecar.link.receive(encode_records([record(seq)]))
                assert await watch.wait(2)
                delays.append(time.monotonic() - sent)
        assert sorted(delays)[50] < 0.02, delays


async def test_one_subscription_serves_all_waiters_of_a_replica(redis):
    async with replicas(redis, "a", "b") as (holder, other):
        sidecar = await holder.link_sidecar("cs_a")
        woken = []

        async def wait():
            async with other.hub.watching("cs_a") as watch:
                woken.append(await watch.wait(4))

        waiting = [asyncio.create_task(wait()) for _ in range(50)]
        await asyncio.sleep(0.2)
        (channel, subscribers) = (await redis.pubsub_numsub("cs:{cs_a}:events"))[0]
        assert (channel, subscribers) == (b"cs:{cs_a}:events", 1)
        await sidecar.link.receive(encode_records([record(1)]))
        await asyncio.gather(*waiting)
        assert woken == [True] * 50


async def test_a_request_that_waits_elsewhere_is_told_when_the_sidecar_has_moved(redis):
    async with replicas(redis, "a", "b", "c") as (holder, other, third):
        sidecar = await holder.link_sidecar("cs_a")
        sidecar.silent = True
        async with other.hub.watching("cs_a"):
            link = await other.hub.link_within("cs_a", 1, nobody_minds)
            typing = asyncio.create_task(link.write_input("key", b"x"))
            await until(lambda: sidecar.typed)
            moved_to = await third.link_sidecar("cs_a")
            with pytest.raises(LinkLost):
                async with asyncio.timeout(2):
                    await typing
            again = await other.hub.link_within("cs_a", 1, nobody_minds)
            assert await again.write_input("key", b"x") == 1
        assert moved_to.typed == {"key": b"x"}
        await until(lambda: sidecar.goodbye)  # the replica that held it was told, too
        assert holder.hub.link("cs_a") is None


async def test_a_holder_that_died_is_noticed_by_its_silence(redis):
    async with replicas(redis, "b") as (other,):
        async with replicas(redis, "a") as (holder,):
            await holder.link_sidecar("cs_a")
        async with other.hub.watching("cs_a"):
            link = await other.hub.link_within("cs_a", 1, nobody_minds)
            with pytest.raises(LinkLost):
                async with asyncio.timeout(4):
                    await link.write_input("key", b"x")
            sidecar = await other.link_sidecar("cs_a")
            assert await other.hub.find("cs_a") is sidecar.link


async def test_a_replica_that_missed_messages_lets_go_of_links_that_moved_meanwhile(redis):
    async with replicas(redis, "a", "b") as (one, two):
        stale = await one.link_sidecar("cs_a")
        await redis.set("cs:{cs_a}:link", "b:other")  # as when the message about it was lost
        assert one.hub.link("cs_a") is stale.link
        await redis.client_kill_filter(_type="pubsub")
        await until(lambda: one.hub.link("cs_a") is None)
        assert two.hub.link("cs_a") is None


async def test_what_a_lost_link_had_brought_is_still_appended(redis):
    async with replicas(redis, "a") as (one,):
        sidecar = await one.link_sidecar("cs_a")
        await sidecar.link.receive(encode_records([record(1), record(2)]))
        sidecar.link.lost()
        await until(lambda: not sidecar.link._queue)
        await asyncio.sleep(0.1)
        assert await one.store.bounds("cs_a") == (1, 2)


async def test_a_hub_that_closes_takes_in_no_link_any_more(redis):
    async with replicas(redis, "a") as (one,):
        first = await one.link_sidecar("cs_a")
        await one.hub.close()
        assert first.goodbye
        with pytest.raises(LinkLost):
            await one.link_sidecar("cs_a")


async def test_who_waits_looks_again_at_once_when_the_process_stops(redis):
    async with replicas(redis, "a") as (one,), one.hub.watching("cs_a") as watch:
        waiting = asyncio.create_task(watch.wait(60))
        await asyncio.sleep(0)
        one.hub.stop_waiting()
        async with asyncio.timeout(1):
            assert await waiting
        assert one.hub.stopping


async def test_a_sidecar_that_takes_nothing_does_not_keep_others_from_being_healed_after_the_store_was_restarted(redis):
    identities = iter(["one", "two"])

    async def identity():
        return next(identities, "two")

    async def stuck(_message):
        await asyncio.Event().wait()

    async with replicas(redis, "a") as (one,):
        one.hub._store_identity = identity
        deaf, other = await one.link_sidecar("cs_a"), await one.link_sidecar("cs_b")
        deaf.send_text = stuck
        one.tasks.start(one.hub.watch_store(), name="watch store")
        await until(lambda: {"t": "resume", "after": 0} in other.sent)


async def test_a_stream_of_another_replicas_sidecar_comes_whole_and_at_the_readers_pace(redis):
    async with replicas(redis, "a", "b") as (holder, other):
        sidecar = await holder.link_sidecar("cs_a")
        sidecar.silent = True
        pieces = [bytes([place % 251]) * 60_000 for place in range(60)]  # more than a stream's first credit

        def granted_bytes():
            return sum(message["bytes"] for message in sidecar.sent if message["t"] == "credit")

        async def send_the_archive():
            await until(lambda: any(message["t"] == "request" for message in sidecar.sent))
            request = next(message for message in sidecar.sent if message["t"] == "request")
            sent_bytes = 0
            for piece in pieces:
                while sent_bytes >= STREAM_CREDIT_BYTES + granted_bytes():
                    await asyncio.sleep(0.001)
                await sidecar.link.receive(encode_stream(request["id"], piece))
                sent_bytes += len(piece)
            await sidecar.link.receive(encode_json({"t": "result", "id": request["id"], "files": 3}))

        sending = asyncio.create_task(send_the_archive())
        async with other.hub.watching("cs_a"):
            link = await other.hub.link_within("cs_a", 1, nobody_minds)
            result = {}
            got = [piece async for piece in link.stream("archive", result)]
        await sending
        assert b"".join(got) == b"".join(pieces)
        assert result["files"] == 3


async def test_a_reader_elsewhere_that_gives_up_stops_the_sidecar_too(redis):
    async with replicas(redis, "a", "b") as (holder, other):
        sidecar = await holder.link_sidecar("cs_a")
        sidecar.silent = True
        async with other.hub.watching("cs_a"):
            link = await other.hub.link_within("cs_a", 1, nobody_minds)
            stream = link.stream("archive", {})
            reading = asyncio.create_task(anext(stream))
            await until(lambda: any(message["t"] == "request" for message in sidecar.sent))
            request = next(message for message in sidecar.sent if message["t"] == "request")
            await sidecar.link.receive(encode_stream(request["id"], b"first"))
            assert await reading == b"first"
            await stream.aclose()
        await until(lambda: {"t": "cancel", "id": request["id"]} in sidecar.sent)
