"""Numbers the terminal's output and keeps it until the control plane has it for good, and a while longer.

No I/O in here: bytes and records go in, records come out, so that the numbering can be tested as a state machine.

- Bytes wait unnumbered until somebody can take them, so that a flood makes large chunks and a keystroke a small one.
- A record never changes once it is numbered, and is kept until it is acknowledged as durably appended.
- Of the acknowledged ones the last `ring_bytes` are kept, to heal a store that lost its last moments.
- What is not acknowledged is bounded by `window_bytes`. When that is `full`, the PTY is not to be read and its program
  blocks; with `drop_oldest` the oldest bytes without a number go instead, and a GAP record says how many.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from sidecar.protocol import MAX_CHUNK_BYTES, JsonObject, Record, RecordKind, complete_utf8, encode_json

WINDOW_BYTES: Final = 4 * 1024 * 1024
RING_BYTES: Final = 8 * 1024 * 1024
BATCH_BYTES: Final = 256 * 1024  # one message on the link, one append to the store
CHUNK_SPAN_MS: Final = 100  # output further apart gets chunks, and so times, of its own while the link is down
_RECORD_COST_BYTES: Final = 200  # what a record costs in memory besides its data, so that tiny ones count too


class ResumeImpossible(Exception):
    """The store stands before the oldest record that is still kept, or beyond the newest."""


def _cost(record: Record) -> int:
    return len(record.data) + _RECORD_COST_BYTES


class OutputLog:
    def __init__(
        self,
        *,
        window_bytes: int = WINDOW_BYTES,
        ring_bytes: int = RING_BYTES,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._window_bytes, self._ring_bytes, self._clock_ms = window_bytes, ring_bytes, clock_ms
        self._records: deque[Record] = deque()  # acknowledged ones, then the others
        self._kept_bytes = 0
        self._unacknowledged_bytes = 0
        self._waiting: deque[tuple[int, bytearray]] = deque()  # output without a number yet, with its time
        self._waiting_cost = 0
        self._dropped_bytes = 0  # of what waited before the oldest that waits now
        self._next_seq = 1
        self._offset = 0
        self._time_ms = 0
        self.drop_oldest = False
        self.acknowledged_seq = 0
        self.sent_seq = 0

    @property
    def first_seq(self) -> int:
        """The oldest record kept; `last_seq + 1` when there is none."""
        return self._records[0].seq if self._records else self._next_seq

    @property
    def last_seq(self) -> int:
        return self._next_seq - 1

    @property
    def full(self) -> bool:
        """No more output should be read until something is acknowledged."""
        return not self.drop_oldest and self._held_bytes >= self._window_bytes

    @property
    def _held_bytes(self) -> int:
        return self._unacknowledged_bytes + self._waiting_cost

    @property
    def waiting_bytes(self) -> int:
        """About how many bytes have no number yet."""
        return self._waiting_cost

    @property
    def sent_all(self) -> bool:
        """Every record that has a number was taken by `take_batch`."""
        return self.sent_seq == self.last_seq

    @property
    def drained(self) -> bool:
        """Everything that came in was acknowledged."""
        return not self._waiting and not self._dropped_bytes and self.acknowledged_seq == self.last_seq

    def write(self, data: bytes) -> None:
        """Take in output of the terminal, as read."""
        now_ms = self._clock_ms()
        # A clock that was set back makes a piece of its own, too.
        if self._waiting and 0 <= now_ms - self._waiting[-1][0] < CHUNK_SPAN_MS:
            self._waiting[-1][1].extend(data)
        else:
            self._waiting.append((now_ms, bytearray(data)))
            self._waiting_cost += _RECORD_COST_BYTES
        self._waiting_cost += len(data)
        if self.drop_oldest:
            self._drop()

    def note(self, kind: RecordKind, facts: JsonObject) -> int:
        """Number a record that is no output, after all output so far; its seq.

        At an EXIT an unfinished character comes out before it, else it waits on for its rest.
        """
        self._number_waiting(final=kind is RecordKind.EXIT)
        self._append(kind, encode_json(facts).encode(), self._clock_ms())
        return self.last_seq

    def take_batch(self, *, max_bytes: int = BATCH_BYTES) -> list[Record]:
        """The next records to send, numbering what waits; at most about `max_bytes`. Empty: there is nothing."""
        if self.sent_all:
            self._number_waiting(final=False, max_bytes=max_bytes)
        batch: list[Record] = []
        size = 0
        for index in range(self._records_after(self.sent_seq), 0):
            record = self._records[index]
            if batch and size + len(record.data) > max_bytes:
                break
            batch.append(record)
            size += len(record.data)
        if batch:
            self.sent_seq = batch[-1].seq
        return batch

    def acknowledge(self, seq: int) -> None:
        """Everything up to `seq` is durably appended.

        Raises:
            ResumeImpossible: there is no such record yet.
        """
        if seq > self.last_seq:
            raise ResumeImpossible(f"acknowledged {seq}, but there are only {self.last_seq}")
        self.sent_seq = max(self.sent_seq, seq)  # sent before a resume that crossed the acknowledgement
        for index in range(self._records_after(self.acknowledged_seq), 0):
            if self._records[index].seq > seq:
                break
            self._unacknowledged_bytes -= _cost(self._records[index])
        self.acknowledged_seq = max(self.acknowledged_seq, seq)
        while self._records and self._records[0].seq <= self.acknowledged_seq and self._kept_bytes > self._kept_limit():
            self._kept_bytes -= _cost(self._records.popleft())

    def _kept_limit(self) -> int:
        return self._ring_bytes + self._unacknowledged_bytes

    def resume(self, after: int) -> None:
        """The store stands at `after`: send from there on, what was acknowledged before included.

        Raises:
            ResumeImpossible: something in between is no longer kept.
        """
        if not self.first_seq - 1 <= after <= self.last_seq:
            raise ResumeImpossible(f"the store stands at {after}, kept are {self.first_seq} to {self.last_seq}")
        self.acknowledged_seq = after
        self.sent_seq = after
        indexes = range(self._records_after(after), 0)
        self._unacknowledged_bytes = sum(_cost(self._records[index]) for index in indexes)

    def _records_after(self, seq: int) -> int:
        """Where the records after `seq` begin, counted from the right: a deque is slow in its middle."""
        return max(seq - self.last_seq, -len(self._records))

    def _drop(self) -> None:
        """Make room for new output by giving up the oldest that has no number."""
        while self._waiting and (excess := self._held_bytes - self._window_bytes) > 0:
            _, oldest = self._waiting[0]
            dropped = min(excess, len(oldest))
            # Not in the middle of a character (RFC 3629: bytes 10xxxxxx continue one).
            while dropped < len(oldest) and oldest[dropped] & 0xC0 == 0x80:  # noqa: PLR2004
                dropped += 1
            del oldest[:dropped]
            self._dropped_bytes += dropped
            self._waiting_cost -= dropped
            if not oldest:
                self._waiting.popleft()
                self._waiting_cost -= _RECORD_COST_BYTES

    def _number_waiting(self, *, final: bool, max_bytes: int | None = None) -> None:
        if self._dropped_bytes:
            self._append(RecordKind.GAP, encode_json({"droppedBytes": self._dropped_bytes}).encode(), self._clock_ms())
            self._offset += self._dropped_bytes
            self._dropped_bytes = 0
        numbered = 0
        while self._waiting and (max_bytes is None or numbered < max_bytes):
            time_ms, waiting = self._waiting[0]
            with memoryview(waiting) as view:
                piece = bytes(view[:MAX_CHUNK_BYTES])
            alone = len(self._waiting) == 1
            if not (final and alone and len(piece) == len(waiting)):
                piece = piece[: complete_utf8(piece)]
            if not piece and waiting:  # the beginning of a character only
                if alone:
                    return
                self._waiting[1][1][:0] = waiting
                waiting.clear()
            del waiting[: len(piece)]
            self._waiting_cost -= len(piece)
            if not waiting:
                self._waiting.popleft()
                self._waiting_cost -= _RECORD_COST_BYTES
            if piece:
                self._append(RecordKind.OUTPUT, piece, time_ms)
                numbered += len(piece)

    def _append(self, kind: RecordKind, data: bytes, time_ms: int) -> None:
        self._time_ms = max(self._time_ms, time_ms)  # never backwards, whatever the clock does
        record = Record(self._next_seq, self._offset, self._time_ms, kind, data)
        self._records.append(record)
        self._next_seq += 1
        self._offset += record.output_bytes
        self._kept_bytes += _cost(record)
        self._unacknowledged_bytes += _cost(record)
