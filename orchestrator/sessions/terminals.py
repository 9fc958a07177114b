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
from orchestrator.terminal.link import LinkLost, RequestRefused, SidecarLink
from orchestrator.terminal.output_store import OutputStore, Page
from sidecar.protocol import JsonObject, integer

CREATE_PATIENCE_S: Final = 60.0  # how long a call waits for a terminal that is being created
LINK_PATIENCE_S: Final = 10.0  # and for one whose link is being made again
WRITE_PATIENCE_S: Final = 45.0  # longer than a sidecar waits for a program that does not read
INPUT_QUEUED_BYTES_MAX: Final = 8 * 1024 * 1024  # of one session, in this process
REQUEST_S: Final = 10.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Output:
    page: Page
    after: int

    @property
    def truncated(self) -> bool:
        """Records between `after` and the first that is left are gone."""
        oldest = self.page.records[0].seq if self.page.records else self.page.first_seq
        return oldest > self.after + 1 and self.page.last_seq > self.after

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
        session = await self._registry.get(organization_id, session_id)
        # Every input has a key towards the sidecar, so that one which a lost link left unanswered can be sent again.
        unique = hashlib.sha256(f"{caller}\n{idempotency_key}".encode()).hexdigest()[:32]
        key = unique if idempotency_key else f"once-{secrets.token_hex(8)}"
        if self._queued_bytes[session_id] + len(data) > INPUT_QUEUED_BYTES_MAX:
            raise TerminalNotReading("too much input waits for this terminal already", writtenBytes=0)
        self._queued_bytes[session_id] += len(data)
        try:
            return await self._with_link(session, lambda link: link.write_input(key, data), WRITE_PATIENCE_S)
        finally:
            self._queued_bytes[session_id] -= len(data)
            if not self._queued_bytes[session_id]:
                del self._queued_bytes[session_id]

    async def start(self, organization_id: str, session_id: str, size: dict[str, int]) -> TerminalState:
        """Start a new shell after the last one exited.

        Raises:
            SessionNotFound, SessionEnded, TerminalRunning, TerminalUnavailable: as named.
        """
        session = await self._registry.get(organization_id, session_id)
        answer = await self._with_link(session, lambda link: link.request("start", **size), REQUEST_S)
        started_seq = integer(answer, "seq")
        deadline = time.monotonic() + REQUEST_S
        with self._hub.waiting(session_id) as event:
            while await self._store.last_seq(session_id) < started_seq:
                if time.monotonic() > deadline:
                    raise TerminalUnavailable("the shell was started, but its record did not reach the store in time")
                event.clear()
                await _wait(event, 0.2)
        return await self._store.terminal_state(session_id)

    async def state(self, session: Session) -> TerminalState:
        """What the log says; `lost` where the session ended before the terminal's own end was recorded."""
        state = await self._store.terminal_state(session.id)
        if session.status.ended and state.state != "exited":
            return TerminalState("lost", state.cols, state.rows)
        return state

    async def read(self, organization_id: str, session_id: str, *, after: int, limit: int, wait_s: float) -> Output:
        """Output after `after`; with nothing there, what comes within `wait_s`.

        Raises:
            SessionNotFound: not in this organization.
        """
        deadline = time.monotonic() + wait_s
        session = await self._registry.get(organization_id, session_id)
        with self._hub.waiting(session_id) as event:
            woken = False
            while True:
                event.clear()
                page = await self._store.read(session_id, after=after, limit=limit)
                left_s = deadline - time.monotonic()
                if page.records or left_s <= 0 or session.status.ended:
                    return Output(page, after)
                if woken:  # by something else than output: its end, perhaps
                    session = await self._registry.get(organization_id, session_id)
                    if session.status.ended:
                        continue  # its last output may have come in between
                # An append on another replica is not seen here; look again before long.
                await _wait(event, min(left_s, 0.25 if self._hub.link(session_id) is None else 5.0))
                woken = True

    async def archive(self, session: Session, result: JsonObject, preview: JsonObject | None) -> AsyncIterator[bytes]:
        """The workspace as a zip, or what `preview` asks for of it; facts about it are in `result` at the end.

        Raises:
            SessionEnded, TerminalUnavailable: there is nothing to archive from.
            RequestRefused, LinkLost: it broke, perhaps after some bytes.
        """
        link = await self._link(session, CREATE_PATIENCE_S)
        stream = link.stream("archive", result) if preview is None else link.stream("preview", result, **preview)
        async for piece in stream:
            yield piece

    async def _with_link(self, session: Session, use: Callable[[SidecarLink], Awaitable[T]], patience_s: float) -> T:
        """Do it on the session's link; on the next one when it breaks, which the sidecar recognises as the same."""
        waiting_s = CREATE_PATIENCE_S if session.status is SessionStatus.CREATING else LINK_PATIENCE_S
        deadline = time.monotonic() + waiting_s + patience_s
        while True:
            link = await self._link(session, waiting_s)
            try:
                async with asyncio.timeout(patience_s):
                    return await use(link)
            except LinkLost:
                if time.monotonic() > deadline:
                    raise TerminalUnavailable("the workspace's link was lost") from None
            except TimeoutError:
                raise TerminalUnavailable("the workspace did not answer in time") from None
            except RequestRefused as refused:
                raise _domain_error(refused) from refused

    async def _link(self, session: Session, waiting_s: float) -> SidecarLink:
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


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


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
