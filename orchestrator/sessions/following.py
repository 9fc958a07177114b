"""A cursor over one session's log, for who watches it live.

Each watcher reads the next page of the log when it has passed on the one before. So nobody is waited for, and there is
no queue of copies: one page is in memory for each watcher, however far behind it is.
"""

from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from orchestrator.models import Session, SessionStatus
from orchestrator.sessions.registry import SessionRegistry
from orchestrator.sessions.terminals import NEVER, Output, Terminals
from sidecar.protocol import Record

PAGE_BYTES: Final = 256 * 1024
_PAGE_RECORDS: Final = 4096
_CREATING_LOOK_S: Final = 1.0
_AFTER_ALL: Final = 2**53
_SHORT_TAILS: Final = (64, 4096)  # records


class Follower:
    """`after` is the seq of the last record given out, `offset` where its bytes end.

    With `early`, output is given out before it is durable: `durable_seq` and `durable_offset` follow it, and only they
    are places to resume from. They move with the next page, or for who wants `marks`, with one of no records.
    """

    def __init__(
        self,
        terminals: Terminals,
        registry: SessionRegistry,
        session: Session,
        *,
        after: int,
        early: bool = False,
        marks: bool = False,
    ) -> None:
        self._terminals, self._registry = terminals, registry
        self.session, self.after, self.offset = session, after, 0
        self.durable_seq, self.durable_offset = after, 0
        self._early, self._marks = early, marks
        self._uncertain: deque[tuple[int, int]] = deque()  # the last seq and the end of each page given out early

    async def pages(self, idle_s: float) -> AsyncIterator[Output]:
        """Output as it comes, the first page at once; a page without records when nothing came for `idle_s`.

        Ends when the session has ended and all of its output was given out.

        Raises:
            SessionNotFound: it is gone.
        """
        wait_s, ended = 0.0, self.session.status.ended
        while True:
            output = await self._read(self.after, wait_s, limit=_PAGE_RECORDS, early=self._early)
            if output.page.records:
                self.after, self.offset = output.last_seq, _end(output.page.records[-1])
                self._uncertain.append((self.after, self.offset))
            if self._settle(output) and not output.page.records:
                yield output
                continue
            if output.page.records:
                pass
            elif output.truncated:  # nothing of it is left: its days are over, or it was lost
                self.after = self.durable_seq = output.last_seq
            elif ended and output.page.last_seq < self.after:
                self.after = self.durable_seq  # the end of what was given out early died with its workspace
                self._uncertain.clear()
                continue
            elif ended:
                return
            else:
                await self.refresh()
                ended = self.session.status.ended  # its last output may have come in between: look once more
            yield output
            creating = self.session.status is SessionStatus.CREATING
            wait_s = min(idle_s, _CREATING_LOOK_S) if creating else idle_s

    def _settle(self, output: Output) -> bool:
        """Whether more of what was given out has become durable."""
        in_memory, before = self._terminals.durable_seq(self.session.id), self.durable_seq
        durable_seq = output.page.last_seq if in_memory is None else in_memory
        while self._uncertain and self._uncertain[0][0] <= durable_seq:
            self.durable_seq, self.durable_offset = self._uncertain.popleft()
        return self.durable_seq > before

    async def refresh(self) -> None:
        """Look the session up again."""
        self.session = await self._registry.get(self.session.organization_id, self.session.id)

    async def start_at_tail(self, tail_bytes: int) -> None:
        """Go to where at least the last `tail_bytes` of output come next (whole records; all, when there is less)."""
        page = (await self._read(_AFTER_ALL, 0)).page
        low = high = page.last_seq
        if high and tail_bytes:
            newest = await self._record(high)
            target = (_end(newest) if newest is not None else 0) - tail_bytes
            low = page.first_seq
            for count in _SHORT_TAILS:
                if high - count > low and await self._starts_by(high - count, target):
                    low = high - count
                    break
            while low < high:
                middle = (low + high + 1) // 2
                if await self._starts_by(middle, target):
                    low = middle
                else:
                    high = middle - 1
            low -= 1
        self.after = self.durable_seq = low

    async def log_end(self) -> int:
        """The offset at which the log ends now, in bytes of output."""
        newest = await self._record((await self._read(_AFTER_ALL, 0)).page.last_seq)
        return _end(newest) if newest is not None else self.offset

    async def _starts_by(self, seq: int, offset: int) -> bool:
        record = await self._record(seq)
        return record is not None and record.offset <= offset

    async def _record(self, seq: int) -> Record | None:
        records = (await self._read(max(seq - 1, 0), 0, limit=1)).page.records
        return records[0] if records else None

    async def _read(self, after: int, wait_s: float, *, limit: int = 1, early: bool = False) -> Output:
        session = self.session
        return await self._terminals.read(
            session.organization_id,
            session.id,
            after=after,
            limit=limit,
            wait_s=wait_s,
            max_bytes=PAGE_BYTES,
            early=early,
            until_durable=self._uncertain[0][0] if self._marks and self._uncertain else NEVER,
        )


def _end(record: Record) -> int:
    return record.offset + record.output_bytes
