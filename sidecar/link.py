"""Keeps the one link to the control plane up: dial, say hello, resume, send records, answer requests."""

import asyncio
import random
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from sidecar.output_log import OutputLog, ResumeImpossible
from sidecar.protocol import (
    HEARTBEAT_S,
    STREAM_CREDIT_BYTES,
    VERSION,
    Binary,
    Input,
    JsonObject,
    OutputPolicy,
    ProtocolError,
    decode_input,
    decode_json,
    encode_json,
    encode_records,
    encode_stream,
    integer,
)
from sidecar.terminal import Refused, Terminal
from sidecar.websocket import HandshakeRefused, WebSocket
from sidecar.workspace import ArchiveStream

_BACKOFF_FIRST_S, _BACKOFF_MAX_S = 0.05, 2.0
_HANDSHAKE_S: Final = 10.0
_GONE: Final = 410  # the session has ended: nobody will ever ask for this sidecar again
# A few batches go out at once whatever their size (a keystroke's echo does not wait), more only when they are large: so
# a flood of small reads becomes few large chunks instead of many small ones. The control plane puts an acknowledgement
# off for fewer batches than that.
_EAGER_BATCHES, _MAX_BATCHES = 4, 8
_LARGE_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class LinkConfig:
    url: str  # ws(s)://…, or unix:///folder with one socket for each replica
    session_id: str
    workspace_id: str
    token: str = field(repr=False)
    boot: str  # made anew with every start of a sidecar


class _Credit:
    """What may still be sent of a stream."""

    def __init__(self) -> None:
        self._bytes = STREAM_CREDIT_BYTES
        self._more = asyncio.Event()

    def add(self, count: int) -> None:
        self._bytes += count
        self._more.set()

    async def spend(self, count: int) -> None:
        while self._bytes <= 0:
            self._more.clear()
            await self._more.wait()
        self._bytes -= count


class Link:
    def __init__(
        self,
        config: LinkConfig,
        log: OutputLog,
        terminal: Terminal,
        make_archive: Callable[[JsonObject | None], ArchiveStream],
    ) -> None:
        self._config, self._log, self._terminal, self._make_archive = config, log, terminal, make_archive
        self._socket: WebSocket | None = None
        self._welcomed = False
        self._batches: deque[int] = deque()  # the last seq of each batch in flight
        self._said = ""
        self._requests: dict[int, asyncio.Task[None]] = {}
        self._credits: dict[int, _Credit] = {}
        self.shutdown_requested = asyncio.Event()
        self.drained = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled, or until the control plane says that the session is gone."""
        backoff_s = _BACKOFF_FIRST_S
        while True:
            for url in self._urls():
                try:
                    connected_at = time.monotonic()
                    await self._one_connection(url)
                except HandshakeRefused as refused:
                    if refused.status == _GONE:
                        self.shutdown_requested.set()
                        self.drained.set()
                        return
                    self._say(f"{url}: {refused}")
                except (OSError, EOFError, ProtocolError, ResumeImpossible, TimeoutError) as error:
                    self._say(f"{url}: {type(error).__name__}: {error}")
                if time.monotonic() - connected_at > _BACKOFF_MAX_S:
                    backoff_s = _BACKOFF_FIRST_S
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects, no secret
            backoff_s = min(backoff_s * 1.7, _BACKOFF_MAX_S)

    def _urls(self) -> list[str]:
        parts = urlsplit(self._config.url)
        if parts.scheme != "unix":
            return [self._config.url]
        sockets = [f"unix://{path}" for path in Path(parts.path).glob("*.sock")]
        random.shuffle(sockets)
        return sockets

    async def _one_connection(self, url: str) -> None:
        headers = {"Authorization": f"Bearer {self._config.token}", "X-Session-Id": self._config.session_id}
        async with asyncio.timeout(_HANDSHAKE_S):
            socket = await WebSocket.connect(url, headers)
        heartbeat = asyncio.create_task(self._heartbeat(socket))
        try:
            socket.send_text(encode_json(self._hello()))
            async with asyncio.timeout(_HANDSHAKE_S):
                welcome = decode_json(await _receive_text(socket))
            if welcome["t"] != "welcome" or integer(welcome, "v") != VERSION:
                raise ProtocolError(f"no welcome of version {VERSION}")
            self._log.drop_oldest = welcome.get("outputPolicy") == OutputPolicy.DROP_OLDEST
            self._log.resume(integer(welcome, "resumeAfter"))
            self._batches.clear()
            self._socket, self._welcomed = socket, True
            self._terminal.room()
            self.pump()
            await socket.receive_all(lambda message: self._dispatch(socket, message))
        finally:
            self._socket, self._welcomed = None, False
            heartbeat.cancel()
            for task in self._requests.values():
                task.cancel()
            self._requests.clear()
            self._credits.clear()
            socket.abort()

    def _hello(self) -> JsonObject:
        return {
            "t": "hello",
            "v": VERSION,
            "sessionId": self._config.session_id,
            "workspaceId": self._config.workspace_id,
            "boot": self._config.boot,
            "firstSeq": self._log.first_seq,
            "lastSeq": self._log.last_seq,
        }

    async def _heartbeat(self, socket: WebSocket) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if time.monotonic() - socket.heard_at_s > 3 * HEARTBEAT_S:
                self._say("nothing heard from the control plane: dialling again")
                socket.abort()
                return
            socket.ping()

    def pump(self) -> None:
        """Send what the link and the store can take."""
        socket = self._socket
        if socket is None or not self._welcomed:
            return
        while len(self._batches) < _EAGER_BATCHES or (
            len(self._batches) < _MAX_BATCHES and (self._log.waiting_bytes >= _LARGE_BYTES or not self._log.sent_all)
        ):
            batch = self._log.take_batch()
            if not batch:
                break
            self._batches.append(batch[-1].seq)
            socket.send_binary(encode_records(batch))
        self._terminal.room()
        if self._log.drained:
            self.drained.set()
        else:
            self.drained.clear()

    def _dispatch(self, socket: WebSocket, message: str | bytes) -> None:
        if isinstance(message, bytes):
            if message[:1] != bytes((Binary.INPUT,)):
                raise ProtocolError("an unknown binary message")
            self._input(socket, decode_input(message))
            return
        parsed = decode_json(message)
        kind = parsed["t"]
        if kind == "ack":
            self._on_ack(integer(parsed, "seq"))
        elif kind == "resume":
            self._log.resume(integer(parsed, "after"))
            self._batches.clear()
            self.pump()
        elif kind == "request":
            self._start_request(socket, integer(parsed, "id"), self._operation(socket, parsed))
        elif kind == "credit":
            credit = self._credits.get(integer(parsed, "id"))
            if credit is not None:
                credit.add(integer(parsed, "bytes"))
        elif kind == "cancel":
            task = self._requests.get(integer(parsed, "id"))
            if task is not None:
                task.cancel()
        # Anything else is from a newer control plane and not meant for this version.

    def _on_ack(self, seq: int) -> None:
        self._log.acknowledge(seq)
        while self._batches and self._batches[0] <= seq:
            self._batches.popleft()
        self.pump()

    def _start_request(self, socket: WebSocket, request_id: int, work: Awaitable[JsonObject]) -> None:
        async def answer() -> None:
            try:
                facts = await work
                socket.send_text(encode_json({"t": "result", "id": request_id, **facts}))
            except Refused as refused:
                facts = {"code": refused.code, "detail": refused.detail, "facts": refused.facts}
                socket.send_text(encode_json({"t": "error", "id": request_id, **facts}))
            except Exception as error:  # noqa: BLE001 - a request that fails must not take the terminal with it
                self._say(f"request {request_id} failed: {type(error).__name__}: {error}")
                facts = {"code": "internal-error", "detail": type(error).__name__}
                socket.send_text(encode_json({"t": "error", "id": request_id, **facts}))

        task = asyncio.get_running_loop().create_task(answer())
        self._requests[request_id] = task
        task.add_done_callback(lambda done: self._request_done(request_id, done))

    def _request_done(self, request_id: int, task: asyncio.Task[None]) -> None:
        if self._requests.get(request_id) is task:
            del self._requests[request_id]
        self._credits.pop(request_id, None)

    def _input(self, socket: WebSocket, request: Input) -> None:
        async def write() -> JsonObject:
            return {"bytes": await writing}

        with suppress(Refused):  # `write` says so
            if self._terminal.write_now(request.key, request.data):
                socket.send_text(encode_json({"t": "result", "id": request.request_id, "bytes": len(request.data)}))
                return
        writing = self._terminal.write(request.key, request.data)
        self._start_request(socket, request.request_id, write())

    async def _operation(self, socket: WebSocket, request: JsonObject) -> JsonObject:
        name, args = request.get("op"), request.get("args") or {}
        if name == "start":
            return {"seq": self._terminal.start(args.get("cols"), args.get("rows"))}
        if name == "resize":
            return {"seq": self._terminal.resize(integer(args, "cols"), integer(args, "rows"))}
        if name == "signal":
            self._terminal.signal(str(args.get("signal")))
        elif name == "archive":
            return await self._send_archive(socket, integer(request, "id"), None)
        elif name == "preview":
            return await self._send_archive(socket, integer(request, "id"), args)
        elif name == "shutdown":
            self.shutdown_requested.set()
        else:
            raise Refused("unknown-operation", f"this sidecar does not know the operation {name!r}")
        return {}

    async def _send_archive(self, socket: WebSocket, stream_id: int, preview: JsonObject | None) -> JsonObject:
        credit = self._credits[stream_id] = _Credit()
        archive = self._make_archive(preview)
        pieces = archive.pieces()
        try:
            async for piece in pieces:
                await credit.spend(len(piece))
                socket.send_binary(encode_stream(stream_id, piece))
        finally:
            with suppress(RuntimeError):
                await pieces.aclose()  # type: ignore[attr-defined]
        return archive.facts

    def _say(self, text: str) -> None:
        """To standard error, which the runtime keeps for the operator; a long outage is told once, not every second."""
        if text != self._said:
            self._said = text
            print(f"sidecar: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the sidecar's log

    async def close(self) -> None:
        if self._socket is not None:
            await self._socket.close()


async def _receive_text(socket: WebSocket) -> str:
    message = await socket.receive()
    if not isinstance(message, str):
        raise ProtocolError("a text message was expected")
    return message
