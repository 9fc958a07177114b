"""What callers do with a session's terminal: type, read, start again."""

import asyncio
import hashlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from orchestrator.errors import (
    Conflict,
    IdempotencyKeyReused,
    InvalidRequest,
    SessionEnded,
    TerminalExited,
    TerminalNotReading,
    TerminalRunning,
    TerminalUnavailable,
)
from orchestrator.models import Session, SessionStatus, TerminalState
from orchestrator.sessions.registry import SessionRegistry
from orchestrator.terminal.hub import Hub
from orchestrator.terminal.link import LinkLost, RequestRefused
from orchestrator.terminal.output_store import PAGE_BYTES, OutputStore, Page
from orchestrator.terminal.relay import SessionLink
from sidecar.protocol import ONCE, JsonObject, integer

CREATE_PATIENCE_S: Final = 60.0  # how long a call waits for a terminal that is being created
LINK_PATIENCE_S: Final = 10.0  # and for one whose link is being made again
WRITE_PATIENCE_S: Final = 45.0  # longer than a sidecar waits for a program that does not read
INPUT_QUEUED_BYTES_MAX: Final = 8 * 1024 * 1024  # of one session, in this process
REQUEST_S: Final = 10.0
NEVER: Final = 2**63

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Output:
    page: Page
    after: int

    @property
    def truncated(self) -> bool:
        """Records between `after` and the first that is left are gone."""
        return self.first_seq > self.after + 1 and self.page.last_seq > self.after

    @property
    def first_seq(self) -> int:
        """The first record here; with none, the oldest that is kept, or will be."""
        return self.page.records[0].seq if self.page.records else self.page.first_seq

    @property
    def last_seq(self) -> int:
        return self.page.records[-1].seq if self.page.records else self.page.last_seq

    @property
    def has_more(self) -> bool:
        return bool(self.page.records) and self.page.last_seq > self.last_seq


class Terminals:
    def __init__(self, registry: SessionRegistry, hub: Hub, store: OutputStore) -> None:
        self._registry, self._hub, self._store = registry, hub, store
        self._queued_bytes: Counter[str] = Counter()

    async def write(
        self, organization_id: str, session_id: str, data: bytes, *, caller: str, idempotency_key: str
    ) -> int:
        """Write to the terminal, all of it, once; how many bytes that were.

        Raises:
            SessionNotFound, SessionEnded, TerminalExited, IdempotencyKeyReused: as named.
            TerminalNotReading: the program in it does not read; `writtenBytes` of it are written.
            TerminalUnavailable: no link; nothing was written, or with an idempotency key it is safe to try again.
        """
        # Every input has a key towards the sidecar, so that one which a lost link left unanswered can be sent again.
        unique = hashlib.sha256(f"{caller}\n{idempotency_key}".encode()).hexdigest()[:32]
        key = unique if idempotency_key else f"{ONCE}{secrets.token_hex(8)}"
        if self._queued_bytes[session_id] + len(data) > INPUT_QUEUED_BYTES_MAX:
            raise TerminalNotReading("too much input waits for this terminal already", writtenBytes=0)
        self._queued_bytes[session_id] += len(data)
        try:
            return await self._with_link(
                organization_id, session_id, lambda link: link.write_input(key, data), WRITE_PATIENCE_S
            )
        finally:
            self._queued_bytes[session_id] -= len(data)
            if not self._queued_bytes[session_id]:
                del self._queued_bytes[session_id]

    async def start(self, organization_id: str, session_id: str, size: dict[str, int]) -> TerminalState:
        """Start a new shell after the last one exited.

        Raises:
            SessionNotFound, SessionEnded, TerminalRunning, TerminalUnavailable: as named.
        """
        answer = await self._with_link(
            organization_id, session_id, lambda link: link.request("start", **size), REQUEST_S
        )
        await self._until_appended(session_id, integer(answer, "seq"))
        return await self._store.terminal_state(session_id)

    async def resize(self, organization_id: str, session_id: str, *, cols: int, rows: int) -> TerminalState:
        """Give the terminal a size, 1 to 1000 each; returns once the log says so.

        Raises:
            SessionNotFound, SessionEnded, TerminalExited, TerminalUnavailable: as named.
            InvalidRequest: no such size.
        """
        answer = await self._with_link(
            organization_id, session_id, lambda link: link.request("resize", cols=cols, rows=rows), REQUEST_S
        )
        await self._until_appended(session_id, integer(answer, "seq"))
        return await self._store.terminal_state(session_id)

    async def signal(self, organization_id: str, session_id: str, name: str) -> None:
        """Send a signal, such as `SIGINT`, to the terminal's foreground process group.

        Raises:
            SessionNotFound, SessionEnded, TerminalExited, TerminalUnavailable: as named.
            InvalidRequest: no such signal.
        """
        await self._with_link(organization_id, session_id, lambda link: link.request("signal", signal=name), REQUEST_S)

    async def _until_appended(self, session_id: str, seq: int) -> None:
        deadline = time.monotonic() + REQUEST_S
        async with self._hub.watching(session_id) as watch:
            while (await self._store.bounds(session_id))[1] < seq:
                if time.monotonic() > deadline:
                    raise TerminalUnavailable("it was done, but its record did not reach the store in time")
                watch.clear()
                await watch.wait(0.2)

    async def state(self, session: Session) -> TerminalState:
        """What the log says; `lost` where the session ended before the terminal's own end was recorded."""
        state = await self._store.terminal_state(session.id)
        if session.status.ended and state.state != "exited":
            return TerminalState("lost", state.cols, state.rows)
        return state

    async def read(
        self,
        organization_id: str,
        session_id: str,
        *,
        after: int,
        limit: int,
        wait_s: float,
        max_bytes: int = PAGE_BYTES,
        until_stop: bool = False,
        early: bool = False,
        until_durable: int = NEVER,
    ) -> Output:
        """Output after `after`, about `max_bytes` of it; with nothing there, what comes within `wait_s`.

        `until_stop`: and before the process stops. `early`: also what is not durable yet, see `LiveLog.page`; the wait
        then ends, too, when `until_durable` is.

        Raises:
            SessionNotFound: not in this organization.
        """
        page = self._live_page(organization_id, session_id, after, limit, max_bytes, early=early)
        if page is not None and (page.records or wait_s <= 0):
            return Output(page, after)
        deadline = time.monotonic() + wait_s
        session: Session | None = None
        async with self._hub.watching(session_id, early=early) as watch:
            while True:
                watch.clear()
                page = self._live_page(organization_id, session_id, after, limit, max_bytes, early=early)
                if page is None:
                    # First the session: when it has ended, all its output is there.
                    session = await self._registry.get(organization_id, session_id)
                    page = await self._store.read(session_id, after=after, limit=limit, max_bytes=max_bytes)
                    if session.status.ended:
                        return Output(page, after)
                left_s = deadline - time.monotonic()
                if page.records or left_s <= 0 or (until_stop and self._hub.stopping):
                    return Output(page, after)
                if until_durable <= (self.durable_seq(session_id) or 0):
                    return Output(page, after)
                await watch.wait(left_s)

    def durable_seq(self, session_id: str) -> int | None:
        """Up to where the log is in the store for good; None when only the store knows."""
        link = self._hub.link(session_id)
        return None if link is None else link.live.last_seq

    def _live_page(
        self, organization_id: str, session_id: str, after: int, limit: int, max_bytes: int, *, early: bool
    ) -> Page | None:
        """From memory, when this replica holds the link and has it there: without a way to the store."""
        link = self._hub.link(session_id)
        if link is None or link.organization_id != organization_id:
            return None
        return link.live.page(after, limit=limit, max_bytes=max_bytes, early=early)

    async def archive(self, session: Session, result: JsonObject, preview: JsonObject | None) -> AsyncIterator[bytes]:
        """The workspace as a zip, or what `preview` asks for of it; facts about it are in `result` at the end.

        Raises:
            SessionEnded, TerminalUnavailable: there is nothing to archive from.
            RequestRefused, LinkLost: it broke, perhaps after some bytes.
        """
        async with self._hub.watching(session.id):
            link = await self._link(session, CREATE_PATIENCE_S)
            stream = link.stream("archive", result) if preview is None else link.stream("preview", result, **preview)
            async for piece in stream:
                yield piece

    async def _with_link(
        self, organization_id: str, session_id: str, use: Callable[[SessionLink], Awaitable[T]], patience_s: float
    ) -> T:
        """Do it on the session's link; on the next one when it breaks, which the sidecar recognises as the same."""
        own = self._hub.link(session_id)
        if own is not None and own.organization_id == organization_id:
            with suppress(LinkLost):
                return await _use(own, use, patience_s)
        session = await self._registry.get(organization_id, session_id)
        waiting_s = CREATE_PATIENCE_S if session.status is SessionStatus.CREATING else LINK_PATIENCE_S
        deadline = time.monotonic() + waiting_s + patience_s
        async with self._hub.watching(session_id) as watch:
            while True:
                watch.clear()
                link = await self._link(session, waiting_s)
                with suppress(LinkLost):
                    return await _use(link, use, patience_s)
                if time.monotonic() > deadline:
                    raise TerminalUnavailable("the workspace's link was lost")
                await watch.wait(0.1)

    async def _link(self, session: Session, waiting_s: float) -> SessionLink:
        ended = SessionEnded(f"code session {session.id} has ended")

        async def still_wanted() -> None:
            current = await self._registry.find(session.id)
            if current is None or current.ended:
                raise ended

        if session.ended:
            raise ended
        link = await self._hub.link_within(session.id, waiting_s, still_wanted)
        if link is None:
            raise TerminalUnavailable("the workspace is not connected right now")
        return link


async def _use(link: SessionLink, use: Callable[[SessionLink], Awaitable[T]], patience_s: float) -> T:
    """
    Raises:
        LinkLost: it is not known whether it was done.
    """
    try:
        async with asyncio.timeout(patience_s):
            return await use(link)
    except TimeoutError:
        raise TerminalUnavailable("the workspace did not answer in time") from None
    except RequestRefused as refused:
        raise _domain_error(refused) from refused


def _domain_error(refused: RequestRefused) -> Exception:
    facts: dict[str, Any] = {
        name: value for name, value in refused.facts.items() if isinstance(name, str) and isinstance(value, int | str)
    }
    match refused.code:
        case "terminal-exited":
            return TerminalExited(f"{refused.detail}; POST …/terminal starts a new one", **facts)
        case "terminal-running":
            return TerminalRunning(refused.detail, **facts)
        case "terminal-not-reading":
            return TerminalNotReading(refused.detail, **facts)
        case "idempotency-key-reused":
            return IdempotencyKeyReused(refused.detail, **facts)
        case "invalid-size" | "invalid-signal":
            return InvalidRequest(refused.detail, **facts)
    return Conflict(refused.detail, **facts)
