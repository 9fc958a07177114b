"""Numbers the terminal's output and keeps it until the control plane has it for good, and a while longer.

No I/O in here: bytes and records go in, records come out, so that the numbering can be tested as a state machine.

- Bytes wait unnumbered until somebody can take them, so that a flood makes large chunks and a keystroke a small one.
- A record never changes once it is numbered, and is kept until it is acknowledged as durably appended.
- Of the acknowledged ones the last `ring_bytes` are kept, to heal a store that lost its last moments.
- What is not acknowledged is bounded by `window_bytes`: when `full`, the PTY is not to be read and its program blocks.
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
        self._waiting = bytearray()  # output without a number yet
        self._waiting_since_ms = 0
        self._next_seq = 1
        self._offset = 0
        self._time_ms = 0
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
        return self._unacknowledged_bytes + len(self._waiting) >= self._window_bytes

    @property
    def waiting_bytes(self) -> int:
        return len(self._waiting)

    @property
    def drained(self) -> bool:
        """Everything that came in was acknowledged."""
        return not self._waiting and self.acknowledged_seq == self.last_seq

    def write(self, data: bytes) -> None:
        """Take in output of the terminal, as read."""
        now_ms = self._clock_ms()
        if self._waiting and now_ms - self._waiting_since_ms >= CHUNK_SPAN_MS:
            self._number_waiting(final=False)
        if not self._waiting:
            self._waiting_since_ms = now_ms
        self._waiting += data

    def note(self, kind: RecordKind, facts: JsonObject) -> int:
        """Number a record that is no output, after all output so far; its seq.

        At an EXIT an unfinished character comes out before it, else it waits on for its rest.
        """
        self._number_waiting(final=kind is RecordKind.EXIT)
        self._append(kind, encode_json(facts).encode(), self._clock_ms())
        return self.last_seq

    def take_batch(self, *, max_bytes: int = BATCH_BYTES) -> list[Record]:
        """The next records to send, numbering what waits; at most about `max_bytes`. Empty: there is nothing."""
        if self.sent_seq == self.last_seq:
            self._number_waiting(final=False)
        batch: list[Record] = []
        size = 0
        for record in self._from(self.sent_seq + 1):
            if batch and size + len(record.data) > max_bytes:
                break
            batch.append(record)
            size += len(record.data)
        if batch:
            self.sent_seq = batch[-1].seq
        return batch

    def acknowledge(self, seq: int) -> None:
        """Everything up to `seq` is durably appended."""
        if seq > self.last_seq:
            raise ResumeImpossible(f"acknowledged {seq}, but there are only {self.last_seq}")
        self.sent_seq = max(self.sent_seq, seq)  # sent before a resume that crossed the acknowledgement
        for record in self._from(self.acknowledged_seq + 1):
            if record.seq > seq:
                break
            self._unacknowledged_bytes -= len(record.data) + _RECORD_COST_BYTES
        self.acknowledged_seq = max(self.acknowledged_seq, seq)
        while self._records and self._records[0].seq <= self.acknowledged_seq and self._kept_bytes > self._kept_limit():
            self._kept_bytes -= len(self._records.popleft().data) + _RECORD_COST_BYTES

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
        self._unacknowledged_bytes = sum(len(record.data) + _RECORD_COST_BYTES for record in self._from(after + 1))

    def _from(self, seq: int) -> list[Record]:
        if not self._records or seq > self.last_seq:
            return []
        skip = max(0, seq - self._records[0].seq)
        # From the right: what is asked for is at the end, and a deque is slow in its middle.
        return [self._records[index] for index in range(skip - len(self._records), 0)]

    def _number_waiting(self, *, final: bool) -> None:
        while self._waiting:
            piece = bytes(self._waiting[:MAX_CHUNK_BYTES])
            if not (final and len(piece) == len(self._waiting)):
                piece = piece[: complete_utf8(piece)]
            if not piece:
                return
            del self._waiting[: len(piece)]
            self._append(RecordKind.OUTPUT, piece, self._waiting_since_ms)

    def _append(self, kind: RecordKind, data: bytes, time_ms: int) -> None:
        self._time_ms = max(self._time_ms, time_ms)  # never backwards, whatever the clock does
        record = Record(self._next_seq, self._offset, self._time_ms, kind, data)
        self._records.append(record)
        self._next_seq += 1
        self._offset += record.output_bytes
        self._kept_bytes += len(data) + _RECORD_COST_BYTES
        self._unacknowledged_bytes += len(data) + _RECORD_COST_BYTES
