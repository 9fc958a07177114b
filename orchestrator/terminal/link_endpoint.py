"""Where sidecars dial in: `GET /link` on a listener of its own, never on the public one."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from aiohttp import WSMsgType, web
from redis.exceptions import RedisError

from orchestrator.errors import Unavailable
from orchestrator.models import Session
from orchestrator.terminal.hub import Hub
from orchestrator.terminal.link import LinkLost, SidecarLink
from orchestrator.terminal.live import LiveBudget, LiveLog
from orchestrator.terminal.output_store import LogClosed, OutputStore
from sidecar.protocol import (
    HEARTBEAT_S,
    MAX_MESSAGE_BYTES,
    MAX_SEQ,
    VERSION,
    JsonObject,
    ProtocolError,
    Record,
    decode_json,
    encode_json,
    integer,
)

_HELLO_S: Final = 10.0

log = structlog.get_logger(__name__)


class LinkRefused(Exception):
    """`gone`: the session has ended or never was, so its sidecar shall end too; otherwise the token is wrong."""

    def __init__(self, *, gone: bool) -> None:
        super().__init__("gone" if gone else "wrong token")
        self.gone = gone


class _WebSocketTransport:
    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket

    async def send_text(self, message: str) -> None:
        await self._socket.send_str(message)

    async def send_binary(self, message: bytes) -> None:
        await self._socket.send_bytes(message)

    async def close(self, reason: str) -> None:
        await self._socket.close(code=1001, message=reason.encode())


class LinkEndpoint:
    def __init__(
        self,
        hub: Hub,
        store: OutputStore,
        *,
        authenticate: Callable[[str, str], Awaitable[Session]],
        on_linked: Callable[[str], Awaitable[None]],
        on_appended: Callable[[str, list[Record]], Awaitable[None]],
        on_lost: Callable[[str], None],
    ) -> None:
        """`authenticate(session id, token)` gives the session or raises `LinkRefused`."""
        self._hub, self._store = hub, store
        self._live_budget = LiveBudget()
        self._authenticate, self._on_linked = authenticate, on_linked
        self._on_appended, self._on_lost = on_appended, on_lost

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/link", self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        session_id = request.headers.get("X-Session-Id", "")
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self._hub.closing:
            return web.Response(status=503)
        try:
            session = await self._authenticate(session_id, token)
        except LinkRefused as refused:
            return web.Response(status=410 if refused.gone else 401)
        except (Unavailable, RedisError):
            return web.Response(status=503)
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=MAX_MESSAGE_BYTES, compress=False)
        try:
            await socket.prepare(request)
        except ConnectionError:  # it did not wait for a slow answer of the store's, and dials again
            return socket
        try:
            await self._serve(socket, session)
        except* (ProtocolError, TimeoutError, LinkLost, LogClosed, ConnectionError, RedisError) as group:
            reasons = "; ".join(f"{type(error).__name__}: {error}" for error in group.exceptions)
            log.warning("link ended", session_id=session_id, reason=reasons)
        finally:
            await socket.close()
        return socket

    async def _serve(self, socket: web.WebSocketResponse, session: Session) -> None:
        first = await socket.receive(timeout=_HELLO_S)
        if first.type is not WSMsgType.TEXT:
            raise ProtocolError("the first message is no hello")
        hello = decode_json(first.data)
        if hello["t"] != "hello" or integer(hello, "v") != VERSION:
            raise ProtocolError(f"no hello of version {VERSION}")
        if hello.get("sessionId") != session.id or hello.get("workspaceId") != session.workspace_id:
            raise ProtocolError("the hello is of another session")
        kept_from, stands_at = await self._resume_after(session.id, hello)
        live = LiveLog(kept_from, stands_at, self._live_budget, numbered_seq=integer(hello, "lastSeq"))
        transport = _WebSocketTransport(socket)
        link = SidecarLink(
            session, transport, self._store, live, on_appended=self._on_appended, on_received=self._hub.received
        )
        welcome: JsonObject = {"t": "welcome", "v": VERSION, "resumeAfter": stands_at}
        await socket.send_str(encode_json(welcome | {"outputPolicy": session.output_policy}))
        try:
            await self._hub.attach(link)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(link.run_appends())
                try:
                    await self._on_linked(session.id)
                    async for message in socket:
                        if message.type not in {WSMsgType.TEXT, WSMsgType.BINARY}:
                            break
                        await link.receive(message.data)
                finally:
                    link.lost()
        finally:
            live.clear()
            if await self._hub.detach(link):
                self._on_lost(session.id)

    async def _resume_after(self, session_id: str, hello: JsonObject) -> tuple[int, int]:
        """The oldest seq that the store keeps, and the one after which the sidecar is to go on."""
        first, last = integer(hello, "firstSeq"), integer(hello, "lastSeq")
        kept_from, stands_at = await self._store.bounds(session_id)
        if max(first, last) > MAX_SEQ:
            raise ProtocolError("the hello's numbers are out of range")
        if stands_at > last:
            raise ProtocolError(f"the sidecar has {last} records, the store {stands_at}: this is not the same terminal")
        if stands_at < first - 1:
            log.error("output is lost", session_id=session_id, after=stands_at, before=first)
            await self._store.skip_to(session_id, first - 1)
            return first, first - 1
        return kept_from, stands_at
