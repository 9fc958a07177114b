"""The newest records of a session, kept in the memory of the replica that appended them.

What is given out of here the store has durably, so whoever reads it is told nothing that could change; but for who
watches live and asks for it `early`. It spares a poller that keeps up the way through the store.
"""

import time
from typing import Final

from orchestrator.terminal.output_store import Page
from sidecar.protocol import Record, RecordKind

MAX_BYTES: Final = 4 * 1024 * 1024  # for each session
ALL_MAX_BYTES: Final = 256 * 1024 * 1024  # for all sessions of this process
WANTED_S: Final = 20.0  # kept on for so long after somebody read
_RECORD_COST_BYTES: Final = 250


class LiveBudget:
    """What all live logs of a process may hold together."""

    def __init__(self, max_bytes: int = ALL_MAX_BYTES) -> None:
        self.left_bytes = max_bytes


class LiveLog:
    def __init__(self, first_seq: int, last_seq: int, budget: LiveBudget, *, numbered_seq: int = 0) -> None:
        """`numbered_seq`: the newest that the sidecar has. No reader was ever given a later one, but perhaps that one,
        by another link or by a store that lost its last moments since.
        """
        self.first_seq, self.last_seq = first_seq, last_seq  # of the whole log, as the store said last
        self._numbered_seq = numbered_seq
        self._budget = budget
        self._records: list[Record] = []  # the last ones, up to `last_seq`
        self._from = 0  # where in that list they begin: the front of it is cut off now and then, not at each record
        self._bytes = 0
        self._wanted_until_s = 0.0
        self._ahead: list[Record] = []  # what the store does not have yet, from `last_seq + 1` on

    def receive(self, records: list[Record]) -> None:
        """Take in what came and is not appended yet, for who watches live and takes the risk; see `page`."""
        if time.monotonic() > self._wanted_until_s:
            return
        for record in records:
            if record.seq == (self._ahead[-1].seq if self._ahead else self.last_seq) + 1:
                self._ahead.append(record)
                self._numbered_seq = max(self._numbered_seq, record.seq)

    def forget_ahead(self) -> None:
        """The sidecar is to send it again."""
        self._ahead = []

    def add(self, records: list[Record], first_seq: int) -> None:
        """Take in what was just appended; what was there already is passed over."""
        self.first_seq = first_seq
        new: list[Record] = []
        for record in records:  # one batch may hold a record twice, when two resumes crossed
            if record.seq > (new[-1].seq if new else self.last_seq):
                new.append(record)
        if not new:
            return
        if new[0].seq != self.last_seq + 1:
            self.clear()
        self.last_seq = new[-1].seq
        if self._ahead:
            del self._ahead[: max(0, self.last_seq - self._ahead[0].seq + 1)]
        if time.monotonic() > self._wanted_until_s:
            self.clear()
            return
        self._records += new
        self._charge(sum(len(record.data) + _RECORD_COST_BYTES for record in new))
        limit = MAX_BYTES if self._budget.left_bytes > 0 else 0
        while self._bytes > limit:
            self._charge(-len(self._records[self._from].data) - _RECORD_COST_BYTES)
            self._from += 1
        if self._from > len(self._records) // 2:
            del self._records[: self._from]
            self._from = 0

    def _charge(self, count: int) -> None:
        self._bytes += count
        self._budget.left_bytes -= count

    def clear(self) -> None:
        """Give the memory back."""
        self._charge(-self._bytes)
        self._records, self._from = [], 0
        self._ahead = []

    def page(self, after: int, *, limit: int, max_bytes: int, early: bool = False) -> Page | None:
        """As `OutputStore.read`; None when only the store has it.

        `early`: also output that the store does not have yet, so that a key's echo need not wait for it. Should this
        process and the workspace both die now, nobody will be given it again.
        """
        self._wanted_until_s = time.monotonic() + WANTED_S
        behind = self.last_seq - after
        if behind <= 0 and early and self._ahead and (ahead := self._page_ahead(after, max_bytes)):
            return Page(ahead, self.first_seq, self.last_seq)
        if behind <= 0:
            # Who has more than we know of is not sent back: what he has would come to him again.
            known = behind == 0 or after <= self._numbered_seq
            return Page([], self.first_seq, after) if known else None
        start = len(self._records) - behind
        if start < self._from or after < self.first_seq - 1:
            return None
        stop, size = start, 0
        end = min(len(self._records), start + limit)
        while stop < end:
            size += len(self._records[stop].data)
            if size > max_bytes and stop > start:
                break
            stop += 1
        return Page(self._records[start:stop], self.first_seq, self.last_seq)

    def _page_ahead(self, after: int, max_bytes: int) -> list[Record]:
        found: list[Record] = []
        size = 0
        for record in self._ahead[max(0, after + 1 - self._ahead[0].seq) :]:
            # Only output: what says that the terminal ended is told when it is certain.
            size += len(record.data)
            if record.kind is not RecordKind.OUTPUT or (found and size > max_bytes):
                break
            found.append(record)
        return found
