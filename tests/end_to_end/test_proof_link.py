"""A bad network between sidecars and control plane: every byte arrives once, every input is typed once.

Six sessions at the same time, each with a link that suffers in its own way, because half of the faults take half a
minute to be noticed: a side that hears nothing waits for three heartbeats. A seventh has nothing to suffer, and is not
to notice.
"""

import asyncio
import random
import re
import tempfile
import time
from pathlib import Path

from tests.end_to_end.faults import before_the_link
from tests.end_to_end.flood import Reader, quiet, sha256, start_flood
from tests.end_to_end.polling import retrying
from tests.end_to_end.proof import keeping_all

SIZE_BYTES = 18_000_000  # six of them are 108 MB
FROZEN_S = 30
HEARTBEATS_S = 50  # three heartbeats of 10 s, and what a loaded machine adds
LINES = 400


class Bench:
    """A control plane behind bad wires."""

    def __init__(self, serve, client, proxy):
        self.serve, self.client, self.proxy = serve, client, proxy

    async def flood_through(self, name, suffer, *, size_bytes=SIZE_BYTES, rate_bytes_s=0):
        """A flood, read while `suffer(session, flood)` does its worst; both hashes are the same."""
        session = await self.client.create(name)
        flood = await start_flood(self.serve, session, size_bytes, rate_bytes_s=rate_bytes_s)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(Reader(session).until_end(), name=f"read {name}")
            tasks.create_task(suffer(session, flood), name=f"suffer {name}")
        assert len(reading.result()) == size_bytes, name
        assert sha256(reading.result()) == flood.sha256, name

    async def link(self, session):
        return await self.proxy.link_of(session.id)

    async def frozen(self, session, flood):
        await flood.past(SIZE_BYTES // 3)
        link = await self.link(session)
        link.freeze()
        await asyncio.sleep(FROZEN_S)
        assert flood.running, "the program was not held back"
        link.thaw()

    async def half_open(self, session, flood):
        """First the sidecar speaks into a hole, then the control plane does."""
        for number, direction in enumerate(("up", "down"), 1):
            await flood.past(number * SIZE_BYTES // 3)
            link = await self.link(session)
            getattr(link, direction).swallow = True
            async with asyncio.timeout(HEARTBEATS_S):
                while await self.link(session) is link:
                    await asyncio.sleep(0.1)
            assert flood.running
            link.cut()

    async def cut(self, session, flood):
        for number in range(1, 16):
            await flood.past(number * SIZE_BYTES // 16)
            (await self.link(session)).cut()

    async def cut_in_the_middle_of_frames(self, session, flood):
        """At any byte: frames are of 64 KiB and more in a flood, acknowledgements of 20, and headers of 2 to 14."""
        chance = random.Random(1)
        for number in range(1, 16):
            await flood.past(number * SIZE_BYTES // 16)
            link = await self.link(session)
            if chance.random() < 0.3:
                link.down.cut_after_bytes = chance.randint(1, 60)
            else:
                link.up.cut_after_bytes = chance.choice((chance.randint(1, 8), chance.randint(9, 300_000)))
            async with asyncio.timeout(60):
                await link.ended.wait()

    async def dribbled(self, session, flood):
        for number in range(1, 5):
            await flood.past(number * SIZE_BYTES // 5)
            link = await self.link(session)
            for flow in (link.up, link.down):
                flow.dribble = random.Random(number)
            await asyncio.sleep(2)
            for flow in (link.up, link.down):
                flow.dribble = None
                flow.delay_s = 0.02
            await asyncio.sleep(2)
            for flow in (link.up, link.down):
                flow.delay_s = 0

    async def throttled(self, session, flood):
        await flood.past(SIZE_BYTES // 2)
        link = await self.link(session)
        link.up.rate_bytes_s = 100_000
        await asyncio.sleep(10)
        link.up.rate_bytes_s = None

    async def unhurt(self, session, flood):
        while flood.running:
            await asyncio.sleep(0.1)


async def typed_through_cuts(bench, until):
    """Inputs, each sent until it is taken, while the link is cut under them every few moments."""
    session = await bench.client.create("typist")
    await quiet(session)
    await session.send('n=0; while read -r line; do echo "$((++n)):$line"; [ $line = end ] && break; done\n')
    chance, cuts, sent = random.Random(2), 0, 0

    async def cutting():
        nonlocal cuts
        while True:
            link = await bench.link(session)
            await asyncio.sleep(chance.uniform(0, 0.6))
            if chance.random() < 0.5:
                link.up.cut_after_bytes = chance.randint(1, 60)
                await asyncio.sleep(0.5)
            link.cut()
            cuts += 1

    cutter = asyncio.create_task(cutting())
    try:
        while time.monotonic() < until:
            sent += 1
            await type_once(bench.client, session, f"line-{sent}", key=f"input-{sent}")
    finally:
        cutter.cancel()
    await type_once(bench.client, session, "end", key="the end")
    text = await session.until(r":end\r\n")
    counted = re.findall(r"^(\d+):(\S+)\r$", text, re.MULTILINE)
    assert counted == [(str(n), f"line-{n}") for n in range(1, sent + 1)] + [(str(sent + 1), "end")]
    assert cuts > 20
    return sent


async def type_once(client, session, line, key):
    answer = await retrying(
        client, "POST", f"{session.path}/input", {"text": f"{line}\n"}, headers={"Idempotency-Key": key}
    )
    assert answer.status == 200, answer
    assert answer.json["bytes"] == len(line) + 1


async def test_no_fault_of_the_link_loses_or_doubles_output_or_input(tmp_path):
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="cs-link-") as link_dir,
        keeping_all(tmp_path, CODE_SESSIONS_LINK_DIR=link_dir) as serve,
    ):
        async with serve.client() as client, before_the_link(Path(link_dir)) as proxy:
            bench = Bench(serve, client, proxy)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(bench.flood_through("frozen", bench.frozen))
                tasks.create_task(bench.flood_through("half-open", bench.half_open))
                tasks.create_task(bench.flood_through("cut", bench.cut))
                tasks.create_task(bench.flood_through("cut-frames", bench.cut_in_the_middle_of_frames))
                tasks.create_task(bench.flood_through("dribbled", bench.dribbled))
                tasks.create_task(bench.flood_through("throttled", bench.throttled))
                tasks.create_task(bench.flood_through("unhurt", bench.unhurt, size_bytes=600_000, rate_bytes_s=10_000))
                tasks.create_task(typed_through_cuts(bench, until=began + 60))
    assert time.monotonic() - began > 60
