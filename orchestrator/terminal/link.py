"""The control plane's end of one sidecar's link: appends its records, acknowledges them, carries requests.

Knows no WebSocket: `Transport` is what the link endpoint gives it. What arrives is parsed as hostile.
"""

import asyncio
import itertools
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, Protocol

import structlog

from orchestrator.models import Session
from orchestrator.terminal.live import LiveLog
from orchestrator.terminal.output_store import LogClosed, OutputStore
from sidecar.protocol import (
    STREAM_CREDIT_BYTES,
    Binary,
    Input,
    JsonObject,
    ProtocolError,
    Record,
    RecordKind,
    decode_json,
    decode_records,
    decode_stream,
    encode_input,
    encode_json,
    integer,
)

_APPEND_BYTES: Final = 512 * 1024  # at most about this much in one append
_RECORD_COST_BYTES: Final = 200  # so that a great many tiny ones count, too
_QUEUED_BYTES_MAX: Final = 8 * 1024 * 1024  # more than the protocol lets a sidecar have in flight
_RETRY_FIRST_S, _RETRY_MAX_S = 0.05, 1.0
# An acknowledgement is put off until so much, so many batches or so much time has gathered.
_ACK_BYTES: Final = 32 * 1024
_ACK_BATCHES: Final = 3
_ACK_DELAY_S: Final = 0.2
_LAST_APPENDS_S: Final = 10.0  # for what a link that is gone had brought

log = structlog.get_logger(__name__)


class LinkLost(Exception):
    """The link ended before the answer came: whether the request was carried out is not known."""


class RequestRefused(Exception):
    """The sidecar refused; `code` as in the protocol, `facts` beside it."""

    def __init__(self, code: str, detail: str, facts: JsonObject) -> None:
        super().__init__(f"{code}: {detail}")
        self.code, self.detail, self.facts = code, detail, facts


class Transport(Protocol):
    async def send_text(self, message: str) -> None: ...
    async def send_binary(self, message: bytes) -> None: ...
    async def close(self, reason: str) -> None: ...


class IncomingStream:
    """Bytes that a request brings, until its result; at most STREAM_CREDIT_BYTES wait in memory."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._changed = asyncio.Event()

    def feed(self, piece: bytes) -> None:
        self._waiting_bytes += len(piece)
        if self._waiting_bytes > 2 * STREAM_CREDIT_BYTES:
            raise ProtocolError("a stream sent more than its credit")
        self._pieces.append(piece)
        self._changed.set()

    def wake(self) -> None:
        self._changed.set()

    async def take(self, *, ended: Callable[[], bool]) -> bytes | None:
        """The next piece; None when there is none and there will be none."""
        while not self._pieces:
            if ended():
                return None
            self._changed.clear()
            await self._changed.wait()
        piece = self._pieces.popleft()
        self._waiting_bytes -= len(piece)
        return piece


class SidecarLink:
    def __init__(
        self,
        session: Session,
        transport: Transport,
        store: OutputStore,
        live: LiveLog,
        *,
        on_appended: Callable[[str, list[Record]], Awaitable[None]],
        on_received: Callable[[str], None] = lambda _session_id: None,
    ) -> None:
        self._on_received = on_received
        self.session_id, self.organization_id, self.live = session.id, session.organization_id, live
        self.number = secrets.token_hex(8)  # names this very connection, for other replicas
        self._transport, self._store, self._on_appended = transport, store, on_appended
        self._ids = itertools.count(1)
        self._requests: dict[int, asyncio.Future[JsonObject]] = {}
        self._streams: dict[int, IncomingStream] = {}
        self._queue: deque[Record] = deque()
        self._queued_bytes = 0
        self._queue_changed = asyncio.Event()
        self._expected_seq: int | None = None  # after a resume: what is on its way from before it is passed over
        self._room = asyncio.Event()
        self._room.set()
        self._durable_seq = live.last_seq
        self._unacknowledged_bytes = self._unacknowledged_batches = 0
        self._ack_timer: asyncio.TimerHandle | None = None
        self._superseded = False
        self._closed_at_s = 0.0
        self.closed = asyncio.Event()

    async def run_appends(self) -> None:
        """Append what arrives, in order, and acknowledge it; until the link is `lost` and what had come is appended.

        The last of it may be all that is left of a workspace that died. Not until cancelled: before Python 3.12
        `asyncio.wait_for`, somewhere below, may swallow a cancellation.

        Raises:
            LogClosed: the session has ended.
        """
        while self._queue or not self.closed.is_set():
            if not self._queue:
                self._queue_changed.clear()
                await self._queue_changed.wait()
                if self._ack_timer is not None and not self._queue and not self.closed.is_set():
                    await self._acknowledge()
                continue
            batch, size = [self._queue.popleft()], 0
            while self._queue and size < _APPEND_BYTES:
                size += len(batch[-1].data) + _RECORD_COST_BYTES
                batch.append(self._queue.popleft())
            self._queued_bytes -= _size(batch)
            self._room.set()
            await self._append(batch)

    async def _append(self, batch: list[Record]) -> None:
        retry_s = _RETRY_FIRST_S
        while not self._given_up():
            try:
                appended = await self._store.append(self.session_id, batch)
                break
            except LogClosed:
                raise
            except Exception as error:  # noqa: BLE001 - whatever the store's trouble is, the sidecar keeps the records
                log.warning("append failed, trying again", session_id=self.session_id, error=str(error))
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _RETRY_MAX_S)
        else:
            return  # the sidecar, if it is still there, sends it again over its next link
        if appended.complete:
            self._durable_seq = appended.last_seq
            self.live.add(batch, appended.first_seq)
            await self._on_appended(self.session_id, batch)
            self._unacknowledged_bytes += _size(batch)
            self._unacknowledged_batches += 1
            put_off = self._unacknowledged_bytes < _ACK_BYTES and self._unacknowledged_batches < _ACK_BATCHES
            if put_off and batch[-1].kind is RecordKind.OUTPUT:
                if self._ack_timer is None:
                    loop = asyncio.get_running_loop()
                    self._ack_timer = loop.call_later(_ACK_DELAY_S, self._queue_changed.set)
            else:
                await self._acknowledge()
        elif self.closed.is_set():
            self._queue.clear()
        else:
            with suppress(LinkLost):
                await self.resume_from(appended.last_seq)

    async def _acknowledge(self) -> None:
        """Tell the sidecar what is durable. Not at each append: for a little output that costs more than appending."""
        self._begin_acknowledging()
        if not self.closed.is_set():
            with suppress(LinkLost):  # what else came over it is appended all the same
                await self._send({"t": "ack", "seq": self._durable_seq})

    def _begin_acknowledging(self) -> None:
        self._unacknowledged_bytes = self._unacknowledged_batches = 0
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None

    def _given_up(self) -> bool:
        return self.closed.is_set() and (self._superseded or time.monotonic() - self._closed_at_s > _LAST_APPENDS_S)

    async def resume_from(self, last_seq: int) -> None:
        """The store stands at `last_seq`: have the sidecar send everything after it again."""
        self._queue.clear()
        self._queued_bytes = 0
        self._room.set()
        self._expected_seq = last_seq + 1
        self.live.forget_ahead()
        self._begin_acknowledging()
        await self._send({"t": "resume", "after": last_seq})

    async def receive(self, message: str | bytes) -> None:
        """Take in one message.

        Raises:
            ProtocolError: it is none of the protocol's.
        """
        if isinstance(message, str):
            self._receive_json(decode_json(message))
        elif message[:1] == bytes((Binary.RECORDS,)):
            records = list(decode_records(message))
            if self._expected_seq is not None:
                if not records or records[0].seq != self._expected_seq:
                    return
                self._expected_seq = None
            self._queue.extend(records)
            self._queued_bytes += _size(records)
            self.live.receive(records)
            self._on_received(self.session_id)
            self._queue_changed.set()
            while self._queued_bytes > _QUEUED_BYTES_MAX and not self.closed.is_set():
                self._room.clear()
                await self._room.wait()
        elif message[:1] == bytes((Binary.STREAM,)):
            stream_id, piece = decode_stream(message)
            if stream_id in self._streams:
                self._streams[stream_id].feed(piece)
        else:
            raise ProtocolError("an unknown binary message")

    def _receive_json(self, message: JsonObject) -> None:
        kind = message["t"]
        if kind not in {"result", "error"}:
            return  # from a newer sidecar
        request_id = integer(message, "id")
        future = self._requests.get(request_id)
        if future is None or future.done():
            return  # nobody waits any more
        if kind == "result":
            future.set_result(message)
        else:
            facts = message.get("facts")
            future.set_exception(
                RequestRefused(
                    str(message.get("code", ""))[:64],
                    str(message.get("detail", ""))[:1000],
                    facts if isinstance(facts, dict) else {},
                )
            )
        if request_id in self._streams:
            self._streams[request_id].wake()

    async def write_input(self, key: str, data: bytes) -> int:
        """How many bytes the sidecar wrote to the terminal.

        Raises:
            RequestRefused: see `sidecar.terminal`.
            LinkLost: it is not known whether they were written; the same `key` again is safe.
        """
        request_id, future = self._new_request()
        try:
            await self._transport.send_binary(encode_input(Input(request_id, key, data)))
            return integer(await future, "bytes")
        except ProtocolError as error:  # told at once, on whichever replica it is waited for
            raise RequestRefused("invalid-answer", f"the workspace's answer is none: {error}", {}) from error
        except ConnectionError as error:
            self.lost()
            raise LinkLost from error
        finally:
            self._forget(request_id)

    async def request(self, op: str, **args: Any) -> JsonObject:
        """
        Raises:
            RequestRefused: the sidecar says why.
            LinkLost: it is not known whether it was done.
        """
        request_id, future = self._new_request()
        try:
            await self._send({"t": "request", "id": request_id, "op": op, "args": args})
            return await future
        finally:
            await self._cancel_unless_done(request_id, future)

    async def stream(self, op: str, result: JsonObject, **args: Any) -> AsyncIterator[bytes]:
        """The bytes that the operation sends; its result's facts are put into `result` at the end.

        Raises:
            RequestRefused, LinkLost: as `request`, also after some bytes.
        """
        request_id, future = self._new_request()
        stream = self._streams[request_id] = IncomingStream()
        future.add_done_callback(lambda _: stream.wake())
        try:
            await self._send({"t": "request", "id": request_id, "op": op, "args": args})
            while (piece := await stream.take(ended=future.done)) is not None:
                yield piece
                await self._send({"t": "credit", "id": request_id, "bytes": len(piece)})
            result.update(await future)
        finally:
            await self._cancel_unless_done(request_id, future)

    def _new_request(self) -> tuple[int, "asyncio.Future[JsonObject]"]:
        if self.closed.is_set():
            raise LinkLost
        request_id = next(self._ids)
        future: asyncio.Future[JsonObject] = asyncio.get_running_loop().create_future()
        self._requests[request_id] = future
        return request_id, future

    async def _cancel_unless_done(self, request_id: int, future: "asyncio.Future[JsonObject]") -> None:
        self._forget(request_id)
        answered = future.done() and not future.cancelled()  # who stops waiting cancels the future, too
        if not answered and not self.closed.is_set():
            await self._send({"t": "cancel", "id": request_id})

    def _forget(self, request_id: int) -> None:
        self._requests.pop(request_id, None)
        self._streams.pop(request_id, None)

    async def _send(self, message: JsonObject) -> None:
        try:
            await self._transport.send_text(encode_json(message))
        except ConnectionError as error:
            self.lost()
            raise LinkLost from error

    async def until_closed(self) -> None:
        """Return when the connection is gone."""
        await self.closed.wait()

    async def close(self, reason: str) -> None:
        await self._transport.close(reason)

    def lost(self, *, superseded: bool = False) -> None:
        """The connection is gone: whoever waits for an answer is told.

        At once when a message cannot be sent, and not only when its reader notices: a caller that is told `LinkLost`
        tries the session's link again, and would get this one without ever letting the reader run.

        `superseded`: a newer one brings what this one had not appended yet.
        """
        if superseded:
            self._superseded = True
            self._queue.clear()
        if not self.closed.is_set():
            self._closed_at_s = time.monotonic()
        self.closed.set()
        self._room.set()
        self._queue_changed.set()
        for future in self._requests.values():
            if not future.done():
                future.set_exception(LinkLost())


def _size(records: list[Record]) -> int:
    return sum(len(record.data) + _RECORD_COST_BYTES for record in records)


def started_or_exited(records: list[Record]) -> bool:
    return any(record.kind in {RecordKind.START, RecordKind.EXIT} for record in records)
