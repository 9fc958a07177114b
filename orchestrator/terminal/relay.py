"""Requests to a sidecar whose link another replica holds, carried through the store's pub/sub.

Each replica listens on a channel of its own. A message is one line of JSON, then, after the line feed, bytes that the
request or the answer carries. Nothing is written down anywhere: typed text is not kept by the store.

asking replica -> holder   input, request, stream {id, from, session, link, ...}   credit {id, from, bytes}
                           cancel {id, from}                                       moved {session, link}
holder -> asking replica   accepted {id}   piece {id} + bytes   result {id, ...}   error {id, code, detail, facts}
                           gone {id}: not our link (any more)

A message that is lost shows by silence: a request that is not accepted in `ACCEPT_S`, or whose link has moved, ends as
`LinkLost`, after which the caller asks again; the sidecar knows an input that it was given already by its key.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Final, Protocol

import structlog
from redis.exceptions import RedisError

from orchestrator.store.bus import Bus
from orchestrator.tasks import TaskOwner
from orchestrator.terminal.directory import Holder
from orchestrator.terminal.link import IncomingStream, LinkLost, RequestRefused, SidecarLink
from sidecar.protocol import STREAM_CREDIT_BYTES, JsonObject, ProtocolError, decode_json, encode_json, integer

ACCEPT_S: Final = 2.0
CREDIT_PATIENCE_S: Final = 60.0  # a stream whose reader went away without a word

log = structlog.get_logger(__name__)


def replica_channel(replica_id: str) -> str:
    return f"cs:replica:{replica_id}"


class SessionLink(Protocol):
    """What callers do with a session's link, wherever it is."""

    async def write_input(self, key: str, data: bytes) -> int: ...
    async def request(self, op: str, **args: Any) -> JsonObject: ...
    def stream(self, op: str, result: JsonObject, **args: Any) -> AsyncIterator[bytes]: ...
    async def until_closed(self) -> None: ...


class _Asked:
    """A request of ours that another replica works on."""

    def __init__(self, gone: asyncio.Event) -> None:
        self.accepted, self.gone = asyncio.Event(), gone
        self.answer: asyncio.Future[JsonObject] = asyncio.get_running_loop().create_future()
        self.stream: IncomingStream | None = None

    def end(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # seen, should nobody wait any more
        if self.stream is not None:
            self.stream.wake()


class _Credit:
    def __init__(self) -> None:
        self._bytes = STREAM_CREDIT_BYTES
        self._more = asyncio.Event()

    def add(self, count: int) -> None:
        self._bytes += count
        self._more.set()

    async def spend(self, count: int) -> None:
        while self._bytes <= 0:
            self._more.clear()
            async with asyncio.timeout(CREDIT_PATIENCE_S):
                await self._more.wait()
        self._bytes -= count


class Relay:
    def __init__(
        self, bus: Bus, tasks: TaskOwner, replica_id: str, own_link: Callable[[str], SidecarLink | None]
    ) -> None:
        self.replica_id = replica_id
        self._bus, self._tasks, self._own_link = bus, tasks, own_link
        self._ids = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._serving: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._credits: dict[tuple[str, int], _Credit] = {}
        self.on_moved: Callable[[str, str], None] = lambda _session_id, _link_number: None
        self.on_gap: Callable[[], None] = lambda: None

    async def start(self) -> None:
        await self._bus.listen(replica_channel(self.replica_id), self._receive)

    async def tell_moved(self, holder: Holder, session_id: str) -> None:
        """Let the former holder of a link know at once that it has moved."""
        await self._send(holder.replica_id, {"t": "moved", "session": session_id, "link": holder.link_number})

    # Asking

    async def ask(
        self,
        holder: Holder,
        message: JsonObject,
        payload: bytes = b"",
        *,
        moved: asyncio.Event,
        stream: IncomingStream | None = None,
    ) -> tuple[int, _Asked]:
        """Send a request; returns when it was accepted.

        Raises:
            LinkLost: the holder is not there.
        """
        asked = _Asked(moved)
        asked.stream = stream
        request_id = next(self._ids)
        self._asked[request_id] = asked
        try:
            facts = {"id": request_id, "from": self.replica_id, "link": holder.link_number}
            await self._send(holder.replica_id, message | facts, payload)
            async with asyncio.timeout(ACCEPT_S):
                await asked.accepted.wait()
        except BaseException as error:
            self._asked.pop(request_id, None)
            if isinstance(error, TimeoutError | RedisError):
                moved.set()
                raise LinkLost from error
            raise
        if moved.is_set():
            asked.end(LinkLost())
        return request_id, asked

    async def forget(self, holder: Holder, request_id: int, asked: _Asked) -> None:
        """Nobody waits for the answer any more."""
        self._asked.pop(request_id, None)
        if not asked.answer.done() or asked.answer.cancelled():
            with suppress(RedisError):
                await self._send(holder.replica_id, {"t": "cancel", "id": request_id, "from": self.replica_id})

    async def grant(self, holder: Holder, request_id: int, count: int) -> None:
        await self._send(holder.replica_id, {"t": "credit", "id": request_id, "from": self.replica_id, "bytes": count})

    async def _send(self, replica_id: str, message: JsonObject, payload: bytes = b"") -> int:
        return await self._bus.publish(replica_channel(replica_id), encode_json(message).encode() + b"\n" + payload)

    # Receiving

    def _receive(self, raw: bytes) -> None:
        if not raw:  # subscribed, at first or again; requests and answers that were missed show by silence
            self.on_gap()
            return
        line, _, payload = raw.partition(b"\n")
        message = decode_json(line)
        kind = message["t"]
        if kind in {"input", "request", "stream"}:
            place = (str(message["from"]), integer(message, "id"))
            task = self._tasks.start(self._serve(place, message, payload), name=f"relay {kind} {message['session']}")
            self._serving[place] = task
            task.add_done_callback(lambda _: self._served(place))
        elif kind == "moved":
            self.on_moved(str(message["session"]), str(message["link"]))
        elif kind == "cancel":
            serving = self._serving.get((str(message["from"]), integer(message, "id")))
            if serving is not None:
                serving.cancel()
        elif kind == "credit":
            credit = self._credits.get((str(message["from"]), integer(message, "id")))
            if credit is not None:
                credit.add(integer(message, "bytes"))
        else:
            self._receive_answer(kind, message, payload)

    def _receive_answer(self, kind: str, message: JsonObject, payload: bytes) -> None:
        asked = self._asked.get(integer(message, "id"))
        if asked is None:
            return
        if kind == "accepted":
            asked.accepted.set()
        elif kind == "piece" and asked.stream is not None:
            try:
                asked.stream.feed(payload)
            except ProtocolError as error:
                asked.end(LinkLost(str(error)))
        elif kind == "result":
            if not asked.answer.done():
                asked.answer.set_result(message)
            if asked.stream is not None:
                asked.stream.wake()
        elif kind == "error":
            facts = message.get("facts") or {}
            asked.end(RequestRefused(str(message["code"]), str(message["detail"]), facts))
        elif kind == "gone":
            asked.gone.set()
            asked.end(LinkLost())
            asked.accepted.set()

    # Serving

    def _served(self, place: tuple[str, int]) -> None:
        self._serving.pop(place, None)
        self._credits.pop(place, None)

    async def _serve(self, place: tuple[str, int], message: JsonObject, payload: bytes) -> None:
        asker, request_id = place
        link = self._own_link(str(message["session"]))
        if link is None or link.number != message["link"]:
            await self._answer(asker, {"t": "gone", "id": request_id})
            return
        await self._answer(asker, {"t": "accepted", "id": request_id})
        try:
            if message["t"] == "input":
                facts: JsonObject = {"bytes": await link.write_input(str(message["key"]), payload)}
            elif message["t"] == "request":
                facts = await link.request(str(message["op"]), **message["args"])
            else:
                facts = await self._serve_stream(place, link, message)
        except RequestRefused as refused:
            error = {"t": "error", "id": request_id, "code": refused.code, "detail": refused.detail}
            await self._answer(asker, error | {"facts": refused.facts})
        except (LinkLost, TimeoutError):
            await self._answer(asker, {"t": "gone", "id": request_id})
        else:
            await self._answer(asker, facts | {"t": "result", "id": request_id})

    async def _serve_stream(self, place: tuple[str, int], link: SidecarLink, message: JsonObject) -> JsonObject:
        asker, request_id = place
        credit = self._credits[place] = _Credit()
        facts: JsonObject = {}
        async for piece in link.stream(str(message["op"]), facts, **message["args"]):
            await credit.spend(len(piece))
            await self._send(asker, {"t": "piece", "id": request_id}, piece)
        return facts

    async def _answer(self, asker: str, message: JsonObject) -> None:
        try:
            await self._send(asker, message)
        except RedisError as error:  # the asker finds out by silence
            log.warning("a relayed answer could not be sent", error=str(error))


class RemoteLink:
    """A session's link that another replica holds. `moved` is set when it is that replica's no more."""

    def __init__(self, session_id: str, holder: Holder, relay: Relay, moved: asyncio.Event) -> None:
        self.session_id, self.holder = session_id, holder
        self._relay, self.moved = relay, moved

    async def write_input(self, key: str, data: bytes) -> int:
        """As `SidecarLink.write_input`."""
        message = {"t": "input", "session": self.session_id, "key": key}
        return integer(await self._ask(message, data), "bytes")

    async def request(self, op: str, **args: Any) -> JsonObject:
        """As `SidecarLink.request`."""
        return await self._ask({"t": "request", "session": self.session_id, "op": op, "args": args})

    async def stream(self, op: str, result: JsonObject, **args: Any) -> AsyncIterator[bytes]:
        """As `SidecarLink.stream`."""
        incoming = IncomingStream()
        message = {"t": "stream", "session": self.session_id, "op": op, "args": args}
        request_id, asked = await self._relay.ask(self.holder, message, moved=self.moved, stream=incoming)
        watching = asyncio.create_task(self._end_when_moved(asked))
        try:
            while (piece := await incoming.take(ended=asked.answer.done)) is not None:
                yield piece
                await self._relay.grant(self.holder, request_id, len(piece))
            result.update(await asked.answer)
        finally:
            watching.cancel()
            await self._relay.forget(self.holder, request_id, asked)

    async def until_closed(self) -> None:
        """Return when that replica holds it no more."""
        await self.moved.wait()

    async def _ask(self, message: JsonObject, payload: bytes = b"") -> JsonObject:
        request_id, asked = await self._relay.ask(self.holder, message, payload, moved=self.moved)
        watching = asyncio.create_task(self._end_when_moved(asked))
        try:
            return await asked.answer
        finally:
            watching.cancel()
            await self._relay.forget(self.holder, request_id, asked)

    async def _end_when_moved(self, asked: _Asked) -> None:
        await self.moved.wait()
        asked.end(LinkLost())
