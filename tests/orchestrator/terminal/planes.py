"""Parts of control planes for tests: several of them on one store are replicas."""

import asyncio
from contextlib import asynccontextmanager

from orchestrator.models import Session, SessionStatus
from orchestrator.store.bus import Bus
from orchestrator.tasks import TaskOwner
from orchestrator.terminal.directory import LinkDirectory
from orchestrator.terminal.hub import Hub
from orchestrator.terminal.link import SidecarLink
from orchestrator.terminal.live import LiveBudget, LiveLog
from orchestrator.terminal.output_store import OutputStore
from sidecar.protocol import decode_input, decode_json, encode_json


def session_named(session_id):
    return Session(
        id=session_id,
        workspace_id="ws_" + session_id,
        organization_id="org_a",
        user_id="user_a",
        project_name="demo",
        project_description="",
        project_dir_name="demo",
        status=SessionStatus.RUNNING,
        created_at_ms=0,
        updated_at_ms=0,
        link_token_sha256="",
    )


class Replica:
    """The hub of one replica, with all that it needs."""

    def __init__(self, redis, replica_id, *, retention_bytes=1024 * 1024):
        async def identity():
            return "same"

        self.tasks, self.store = TaskOwner(), OutputStore(redis, retention_bytes=retention_bytes)
        self.bus = Bus(redis)
        self.hub = Hub(self.store, self.bus, LinkDirectory(redis, replica_id), self.tasks, identity)

    async def start(self):
        self.tasks.start(self.bus.run(), name="bus")
        await self.hub.relay.start()

    async def link_sidecar(self, session_id):
        """A sidecar's link to this replica; the other end answers what it is asked."""
        first, last = await self.store.bounds(session_id)
        sidecar = Sidecar()
        link = SidecarLink(
            session_named(session_id),
            sidecar,
            self.store,
            LiveLog(first, last, LiveBudget()),
            on_appended=self._appended,
        )
        sidecar.link = link
        await self.hub.attach(link)
        self.tasks.start(link.run_appends(), name="appends")
        return sidecar

    async def _appended(self, session_id, _records):
        self.hub.changed(session_id)


class Sidecar:
    """A transport whose other end answers inputs and requests by itself, while it is not `silent`."""

    def __init__(self):
        self.link = None
        self.typed = {}
        self.requests = []
        self.sent = []
        self.silent = False
        self.goodbye = None

    async def send_text(self, message):
        message = decode_json(message)
        self.sent.append(message)
        if message["t"] == "request" and not self.silent:
            self.requests.append((message["op"], message["args"]))
            await self.link.receive(encode_json({"t": "result", "id": message["id"], "op": message["op"]}))

    async def send_binary(self, message):
        request = decode_input(message)
        self.typed.setdefault(request.key, request.data)
        if not self.silent:
            await self.link.receive(encode_json({"t": "result", "id": request.request_id, "bytes": len(request.data)}))

    async def close(self, reason):
        self.goodbye = reason


@asynccontextmanager
async def replicas(redis, *names):
    made = [Replica(redis, name) for name in names]
    try:
        for replica in made:
            await replica.start()
        yield made
    finally:
        for replica in made:
            await replica.tasks.close()


async def until(condition, timeout_s=5):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
