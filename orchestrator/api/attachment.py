"""One client that is attached to a terminal: what it sees, what it types, and how it is told goodbye."""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final

import structlog
from aiohttp import WSCloseCode, WSMsgType, web
from redis.exceptions import RedisError

from orchestrator.access.keys import ApiKey
from orchestrator.access.scopes import Scope
from orchestrator.api.attach_frames import (
    ClientFrame,
    InputFrame,
    ResizeFrame,
    SignalFrame,
    as_json,
    frame_id,
    marked_frames,
    parse,
    plain_frames,
)
from orchestrator.api.auth import KEYS
from orchestrator.api.keys import TERMINALS
from orchestrator.api.keystrokes import Keystrokes, Typed
from orchestrator.api.live import LIVE, ClientStalled, Pace
from orchestrator.errors import InsufficientScope, InvalidRequest, KeyNotFound, OrchestratorError, Unauthenticated
from orchestrator.models import TerminalState
from orchestrator.sessions.following import Follower
from orchestrator.sessions.terminals import Output
from orchestrator.store.connection import is_unavailable, store_unavailable
from orchestrator.tasks import end_tasks
from orchestrator.terminal.output_store import record_facts
from sidecar.protocol import MAX_INPUT_BYTES, RecordKind

PING_S: Final = 20.0
_SILENT_S: Final = 60.0
_LOOK_S: Final = 1.0
_BEHIND_BYTES_MAX: Final = 8 * 1024 * 1024
_BEHIND_S: Final = 5.0
_CONTROLS_MAX: Final = 64
_GOODBYE_S: Final = 5.0
_REASON_BYTES_MAX: Final = 123  # RFC 6455 5.5: a control frame has 125, two of them are the code
_DOMAIN_CODES: Final = 4000

log = structlog.get_logger(__name__)


class _Goodbye(Exception):
    """Close with this code and reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class Attachment:
    def __init__(self, request: web.Request, socket: web.WebSocketResponse, caller: ApiKey, follower: Follower) -> None:
        self._request, self._socket, self._caller, self._follower = request, socket, caller, follower
        self._terminals = request.app[TERMINALS]
        self._marked = bool(socket.ws_protocol)
        self._writable = Scope.WRITE in caller.scopes
        self._pace = Pace(request)
        self._sent_seq = self._marked_seq = follower.after
        self._status = follower.session.status
        self._keys = Keystrokes(self._write, on_written=self._written, on_refused=self._refused)
        self._controls: asyncio.Queue[ResizeFrame | SignalFrame] = asyncio.Queue(_CONTROLS_MAX)
        self._heard_at_s = self._ticked_at_s = self._looked_at_s = time.monotonic()
        self._behind_since_s, self._behind_bytes = 0.0, 0

    async def run(self, terminal: TerminalState) -> None:
        """Until one of both sides ends it. Returns with the socket closed."""
        live = self._request.app[LIVE]
        works: list[Coroutine[Any, Any, None]] = [self._receive(), self._deliver(terminal), self._keys.run()]
        if self._marked:
            works.append(self._control())
            with suppress(ConnectionError):  # `_receive` will see that, too
                await self._say_hello(terminal)  # before anything that answers what the client may have sent already
        tasks = [asyncio.create_task(work) for work in works]
        goodbye = _Goodbye(WSCloseCode.GOING_AWAY, "the server stops; attach again")
        try:
            with live.kept(tasks[0].cancel):
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled():
                    goodbye = self._goodbye(task.exception())
        finally:
            await end_tasks(*tasks)
            await self._close(goodbye, patience_s=1.0 if live.closing else _GOODBYE_S)

    def _goodbye(self, error: BaseException | None) -> _Goodbye:
        """How to say why it ended."""
        resume = f"resume with afterSeq={self._sent_seq}"
        match error:
            case _Goodbye():
                return error
            case None | ConnectionError():  # the client closed it, or has gone
                return _Goodbye(WSCloseCode.OK, "")
            case ClientStalled():
                return _Goodbye(WSCloseCode.TRY_AGAIN_LATER, f"too slow; {resume}")
            case RedisError() if is_unavailable(error):
                error = store_unavailable(error)
            case OrchestratorError():
                pass
            case _:
                log.error("attachment failed", session_id=self._follower.session.id, exc_info=error)
                return _Goodbye(WSCloseCode.INTERNAL_ERROR, f"a mistake of ours; {resume}")
        return _Goodbye(_DOMAIN_CODES + error.status, f"{error.code}: {error.detail}")

    async def _close(self, goodbye: _Goodbye, *, patience_s: float) -> None:
        reason = goodbye.reason.encode()[:_REASON_BYTES_MAX].decode(errors="ignore").encode()
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(patience_s):
                await self._socket.close(code=goodbye.code, message=reason)
        if self._request.transport is not None and self._pace.buffered_bytes:
            self._pace.abort()  # or the transport would go on trying for as long as the client is there

    # What the client sees

    async def _deliver(self, terminal: TerminalState) -> None:
        async for output in self._follower.pages(PING_S):
            for frame, seq in marked_frames(output) if self._marked else plain_frames(output):
                self._sent_seq = min(seq, max(self._follower.durable_seq, output.after))
                await self._send(frame)
            self._sent_seq = self._follower.durable_seq
            if self._marked:
                await self._say_mark()
            now_s = time.monotonic()
            if output.has_more and now_s - self._looked_at_s > _LOOK_S:
                await self._look_behind()
            if now_s - self._ticked_at_s >= PING_S - _LOOK_S:
                self._ticked_at_s = now_s
                await self._tick()
            if self._marked:
                await self._say_status()
            elif (how := _exit_facts(output, terminal)) is not None:
                raise _Goodbye(WSCloseCode.OK, _exit_text(how))
        if self._marked:
            await self._say_status()
        raise _Goodbye(WSCloseCode.OK, "the session has ended")

    async def _say_mark(self) -> None:
        """Everything up to here was sent and is durable: the place to resume from."""
        seq = self._follower.durable_seq
        if seq > self._marked_seq:
            self._marked_seq = seq
            await self._send(as_json("seq", seq=seq, offset=self._follower.durable_offset))

    async def _send(self, frame: bytes | str) -> None:
        sending = self._socket.send_bytes(frame) if isinstance(frame, bytes) else self._socket.send_str(frame)
        await self._pace.sent(sending, len(frame), self._look_behind)

    async def _say_hello(self, terminal: TerminalState) -> None:
        session = self._follower.session
        await self._send(
            as_json(
                "hello",
                sessionId=session.id,
                status=session.status,
                state=terminal.state,
                seq=self._follower.after,
                cols=terminal.cols,
                rows=terminal.rows,
                writable=self._writable,
            )
        )

    async def _say_status(self) -> None:
        session = self._follower.session
        if session.status is not self._status:
            self._status = session.status
            reason = {"statusReason": session.status_reason} if session.status_reason else {}
            await self._send(as_json("status", status=session.status, **reason))

    async def _look_behind(self) -> None:
        """Whether the client keeps up. One that starts far behind and comes nearer is left alone."""
        self._looked_at_s = now_s = time.monotonic()
        taken = self._follower.offset - self._pace.buffered_bytes
        behind_bytes = await self._follower.log_end() - taken
        if behind_bytes <= _BEHIND_BYTES_MAX:
            self._behind_since_s = 0.0
        elif not self._behind_since_s or behind_bytes < self._behind_bytes:
            self._behind_since_s, self._behind_bytes = now_s, behind_bytes
        elif now_s - self._behind_since_s > _BEHIND_S:
            raise ClientStalled

    async def _tick(self) -> None:
        """Ping; and end the attachment of who is silent, or whose key was revoked meanwhile."""
        if self._keys.idle and time.monotonic() - self._heard_at_s > _SILENT_S:
            raise ConnectionError("the client answers no ping")
        try:
            key = await self._request.app[KEYS].get(None, self._caller.id)
        except KeyNotFound:
            raise Unauthenticated("The API key is gone.") from None
        if (why := key.refused(int(time.time() * 1000))) is not None:
            raise Unauthenticated(why)
        await self._pace.sent(self._socket.ping(), 0)

    # What the client sends

    async def _receive(self) -> None:
        while True:
            await self._keys.room()
            message = await self._socket.receive()
            self._heard_at_s = time.monotonic()
            match message.type:
                case WSMsgType.BINARY:
                    await self._typed(message.data)
                case WSMsgType.TEXT if not self._marked:
                    await self._typed(message.data.encode())
                case WSMsgType.TEXT:
                    await self._framed(message.data)
                case WSMsgType.PING:
                    await self._pace.sent(self._socket.pong(message.data), len(message.data))
                case WSMsgType.PONG:
                    pass
                case _:
                    return

    async def _framed(self, text: str) -> None:
        try:
            frame = parse(text)
        except InvalidRequest as error:
            await self._say_error(error, frame_id(text))
            return
        if isinstance(frame, InputFrame):
            await self._typed(frame.text.encode(), frame.id or "")
        elif self._writable:
            await self._controls.put(frame)
        else:
            await self._say_error(_read_only(), frame.id)

    async def _typed(self, data: bytes, input_id: str = "") -> None:
        if not self._writable:
            await self._refused(Typed(data, input_id), _read_only())
        elif len(data) > MAX_INPUT_BYTES:
            error = InvalidRequest(f"text: {len(data)} bytes, at most {MAX_INPUT_BYTES} are taken at once")
            await self._refused(Typed(data, input_id), error)
        elif data or input_id:
            self._keys.add(Typed(data, input_id))

    async def _write(self, typed: Typed) -> int:
        session = self._follower.session
        return await self._terminals.write(
            session.organization_id, session.id, typed.data, caller=self._caller.id, idempotency_key=typed.input_id
        )

    async def _written(self, typed: Typed, written: int) -> None:
        if typed.input_id:
            await self._send(as_json("ack", id=typed.input_id, bytes=written))

    async def _refused(self, typed: Typed, error: OrchestratorError) -> None:
        if not self._marked:
            raise error
        await self._say_error(error, typed.input_id or None)

    async def _control(self) -> None:
        """Resizes and signals, in order, and past the keystrokes: those may wait for a program that does not read."""
        while True:
            frame = await self._controls.get()
            try:
                await self._carry_out(frame)
            except OrchestratorError as error:
                await self._say_error(error, frame.id)
            else:
                if frame.id:
                    await self._send(as_json("ack", id=frame.id))

    async def _carry_out(self, frame: ClientFrame) -> None:
        session = self._follower.session
        if isinstance(frame, ResizeFrame):
            await self._terminals.resize(session.organization_id, session.id, cols=frame.cols, rows=frame.rows)
        elif isinstance(frame, SignalFrame):
            await self._terminals.signal(session.organization_id, session.id, frame.signal)

    async def _say_error(self, error: OrchestratorError, about: str | None) -> None:
        facts = {name: value for name, value in error.facts.items() if isinstance(value, str | int)}
        identity = {"id": about} if about else {}
        await self._send(as_json("error", **facts | identity, code=error.code, detail=error.detail))


def _read_only() -> InsufficientScope:
    return InsufficientScope(f"Typing needs the scope {Scope.WRITE.value}.", requiredScope=Scope.WRITE.value)


def _exit_facts(output: Output, terminal: TerminalState) -> dict[str, Any] | None:
    """How the terminal ended, when that is the last there is; `terminal` is what it was when the client came."""
    if output.has_more:
        return None
    if output.page.records:
        last = output.page.records[-1]
        return record_facts(last.data) if last.kind is RecordKind.EXIT else None
    return terminal.exit if terminal.state in {"exited", "lost"} else None


def _exit_text(facts: dict[str, Any]) -> str:
    if "lost" in facts:
        return f"the terminal was lost: {facts['lost']}"
    how = f"with {facts['signal']}" if "signal" in facts else f"with status {facts.get('exitCode', '?')}"
    return f"the terminal exited {how}"
