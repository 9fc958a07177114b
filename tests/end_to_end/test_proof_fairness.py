"""A flood that nobody reads takes no memory without bound, and the others do not notice it."""

import asyncio
import base64
import hashlib
import math
import random
import time

import psutil

from tests.end_to_end.flood import END, quiet, start_flood
from tests.end_to_end.proof import keeping_all

FLOOD_BYTES = 250_000_000
RETENTION_BYTES = 16 * 1024 * 1024
TYPISTS = 5
ECHO_P95_S = 0.25
LINE_BYTES = 71  # of the flood's program
MIB = 1024 * 1024
# What each may grow by. A sidecar keeps 4 MiB that are not acknowledged and 8 MiB that are, and copies some on their
# way; a store keeps what retention leaves and its own copies while it rewrites its file.
SERVE_GROWS_BYTES, SIDECAR_GROWS_BYTES, STORE_GROWS_BYTES = 64 * MIB, 48 * MIB, RETENTION_BYTES + 64 * MIB


class Memory:
    """The most that processes were seen to have, above what they had at first."""

    def __init__(self, processes):
        self._first = {process: process.memory_info().rss for process in processes}
        self._most = dict(self._first)

    async def watch(self):
        while True:
            for process in self._most:
                self._most[process] = max(self._most[process], process.memory_info().rss)
            await asyncio.sleep(0.05)

    def grown(self, process):
        return self._most[process] - self._first[process]


async def type_and_wait(session, number):
    """Seconds from a line to its echo, as a client sees it that holds a poll."""
    began = time.monotonic()
    await session.send(f"echo answer-$(({number} + 1))-\n")
    await session.until(f"answer-{number + 1}-")
    return time.monotonic() - began


async def keep_typing(session, flood):
    delays, number = [], 0
    while flood.running:
        delays.append(await type_and_wait(session, number))
        number += 1
        await asyncio.sleep(0.1)
    return delays


def percentile(values, share):
    return sorted(values)[math.ceil(share * len(values)) - 1]


async def everything_kept(client, session):
    """What retention left, from the first chunk on; and whether the first answer told that there was more before."""
    pieces, after, truncated, seqs = [], 0, [], []
    while END not in b"".join(pieces[-2:]):
        answer = await client.call("GET", f"{session.path}/output?afterSeq={after}&encoding=base64&wait=5")
        assert answer.status == 200, answer
        truncated.append(answer.json.get("truncated", False))
        pieces += [base64.b64decode(chunk["data"]) for chunk in answer.json["chunks"]]
        seqs += [chunk["seq"] for chunk in answer.json["chunks"]]
        after = answer.json["lastSeq"]
    assert truncated == [True] + [False] * (len(truncated) - 1)
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
    return b"".join(pieces)


def lines_from(start, size_bytes):
    """The flood's last bytes, made again by its own rule."""
    noise = random.Random("flood").randbytes(1 << 16).hex().encode()
    first = start // LINE_BYTES
    lines = []
    for number in range(first, size_bytes // LINE_BYTES + 1):
        place = number * 37 % 130000
        lines.append(b"%09d %s\n" % (number, noise[place : place + 60]))
    return b"".join(lines)[start - first * LINE_BYTES :][: size_bytes - start]


async def test_a_flood_that_nobody_reads_is_trimmed_in_bounded_memory_while_others_type_as_if_alone(tmp_path):
    with keeping_all(tmp_path, CODE_SESSIONS_OUTPUT_RETENTION_BYTES=str(RETENTION_BYTES)) as serve:
        async with serve.client() as client:
            typists = [await client.create(f"typist-{number}") for number in range(TYPISTS)]
            for session in typists:
                await quiet(session)
            flooding = await client.create("flood")
            control, store = psutil.Process(serve.process.pid), serve.store()
            workspace = (await flooding.show())["workspaceId"]
            await quiet(flooding)
            (sidecar,) = [
                process
                for process in serve.processes()
                if "sidecar" in process.cmdline() and process.cwd().endswith(workspace)
            ]
            memory = Memory([control, sidecar, store])
            watching = asyncio.create_task(memory.watch())
            flood = await start_flood(serve, flooding, FLOOD_BYTES)
            delays = await asyncio.gather(*(keep_typing(session, flood) for session in typists))
            kept = await everything_kept(client, flooding)
            watching.cancel()
        kept = kept[: kept.index(END)]
        assert RETENTION_BYTES * 0.9 < len(kept) <= RETENTION_BYTES * 1.1
        assert kept == lines_from(FLOOD_BYTES - len(kept), FLOOD_BYTES)
        whole = hashlib.sha256(lines_from(0, FLOOD_BYTES)).hexdigest()
        assert whole == flood.sha256, "the test and the program mean different lines"
    together = [delay for each in delays for delay in each]
    print("echoes", len(together), "p50", percentile(together, 0.5), "p95", percentile(together, 0.95))
    print("grown by", [memory.grown(process) // MIB for process in (control, sidecar, store)], "MiB")
    assert all(len(each) > 10 for each in delays)
    assert percentile(together, 0.95) < ECHO_P95_S
    assert memory.grown(control) < SERVE_GROWS_BYTES
    assert memory.grown(sidecar) < SIDECAR_GROWS_BYTES
    assert memory.grown(store) < STORE_GROWS_BYTES
