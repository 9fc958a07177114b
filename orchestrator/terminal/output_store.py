"""The durable output log of every session: a Redis stream whose entry ids are `seq-0`.

The store itself keeps the log gap-free: an append is one script that takes only what continues the last seq, so two
replicas that both believe they own a session, or one that repeats itself, can do no harm.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

from orchestrator.models import TerminalState
from orchestrator.store.connection import StoreClient
from orchestrator.store.lane import ScriptLane
from sidecar.protocol import MAX_SEQ, Record, RecordKind

PAGE_BYTES: Final = 1024 * 1024
_FIRST_PAGE: Final = 32  # entries; enough for a page of large chunks, and more are asked for when they are small
_MARKS: Final = 64  # retention is trimmed in about this many steps
RECORD_LEAST_BYTES: Final = 16  # what a record counts at least, so that tiny ones cannot fill the store's memory


# Only forward: two replicas may find the same loss, or one of them twice, and meanwhile the log has gone on.
# KEYS: the tail; ARGV: the seq to go on after.
_SKIP: Final = """
if tonumber(redis.call('HGET', KEYS[1], 'last') or '0') >= tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'last', ARGV[1], 'first', string.format('%.0f', tonumber(ARGV[1]) + 1))
return 1
"""


def events_channel(session_id: str) -> str:
    """Where changes of a session are published: a seq after an append, else what changed."""
    return f"cs:{{{session_id}}}:events"


@dataclass(frozen=True, slots=True)
class Page:
    """Records after a seq. `first_seq` and `last_seq` are the oldest kept and the newest of the whole log."""

    records: list[Record]
    first_seq: int
    last_seq: int


@dataclass(frozen=True, slots=True)
class Appended:
    complete: bool  # False: a record was not the next one
    last_seq: int  # where the store stands now
    first_seq: int  # the oldest that is kept


class LogClosed(Exception):
    """The session has ended, and its log with it."""


class OutputStore:
    def __init__(self, redis: StoreClient, *, retention_bytes: int, retention_days: float = 0) -> None:
        """`retention_bytes`: what is kept of each session. `retention_days`: how long after its end; 0: for ever."""
        self._redis, self._retention_bytes = redis, retention_bytes
        self._retention_s = int(retention_days * 86400)
        script = redis.register_script(files(__package__).joinpath("append.lua").read_text())
        self._append = ScriptLane(redis, script)
        self._close = redis.register_script(files(__package__).joinpath("close.lua").read_text())
        self._skip = redis.register_script(_SKIP)

    @staticmethod
    def keys(session_id: str) -> list[str]:
        """The stream, the tail and the marks of a session, in one slot of a cluster."""
        return [f"cs:{{{session_id}}}:{name}" for name in ("log", "tail", "marks")]

    async def append(self, session_id: str, records: Sequence[Record]) -> Appended:
        """Take in records; those that are there already are passed over, and none is taken after a gap.

        Raises:
            LogClosed: nothing was taken.
        """
        distance = max(1, self._retention_bytes // _MARKS)
        arguments: list[int | bytes | str] = [
            self._retention_bytes,
            distance,
            RECORD_LEAST_BYTES,
            events_channel(session_id),
        ]
        size_bytes = 0
        for record in records:
            arguments += (record.seq, record.offset, record.time_ms, int(record.kind), record.data)
            size_bytes += len(record.data)
        keys = self.keys(session_id)
        complete, last_seq, first_seq = await self._append.run(keys, arguments, size_bytes=size_bytes)
        if complete < 0:
            raise LogClosed(session_id)
        return Appended(bool(complete), last_seq, first_seq)

    async def close(self, session_id: str, *, lost_reason: str, at_ms: int) -> None:
        """Take nothing more, and let the output go when its days are over. Closed already is fine.

        If the terminal's end is not in the log, its EXIT record is put there: `{"lost": lost_reason}`.
        """
        lost = json.dumps({"lost": lost_reason})
        arguments: list[int | str] = [at_ms, lost, self._retention_s, events_channel(session_id)]
        await self._close(keys=self.keys(session_id), args=arguments)

    async def bounds(self, session_id: str) -> tuple[int, int]:
        """The oldest seq that is kept and the newest; (1, 0) for none."""
        first, last = await self._redis.hmget(self.keys(session_id)[1], ("first", "last"))
        return int(first or 1), int(last or 0)

    async def skip_to(self, session_id: str, last_seq: int) -> None:
        """Go on after `last_seq` though what stood before it was lost; readers are told by `truncated`.

        A log that is there or further already stays as it is.
        """
        await self._skip(keys=[self.keys(session_id)[1]], args=[last_seq])

    async def terminal_state(self, session_id: str) -> TerminalState:
        return _terminal_state(await self._redis.hmget(self.keys(session_id)[1], _STATE_FIELDS))

    async def read(self, session_id: str, *, after: int, limit: int, max_bytes: int = PAGE_BYTES) -> Page:
        """At most `limit` records after `after`, and about `max_bytes` of output."""
        stream, tail, _ = self.keys(session_id)
        after = min(after, MAX_SEQ)  # callers may ask for any, the store's ids have 64 bits
        records: list[Record] = []
        size, count = 0, min(limit, _FIRST_PAGE)
        while True:
            start = records[-1].seq if records else after
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.hmget(tail, ("first", "last"))  # before the records: what it names is then there, or trimmed
                pipe.xrange(stream, min=f"({start}-0", max="+", count=count)
                (first, last), entries = await pipe.execute()
            for entry_id, fields in entries:
                record = _record(entry_id, fields)
                if records and size + len(record.data) > max_bytes:
                    break
                if records and record.seq != records[-1].seq + 1:
                    break  # trimmed between two looks, or lost for good: end here, and the next read tells of it
                records.append(record)
                size += len(record.data)
            else:
                if len(entries) == count and len(records) < limit:
                    average = size // len(records) + 1
                    count = min(limit - len(records), max(1, (max_bytes - size) // average), 1000)
                    continue
            first_seq, last_seq = int(first or 1), int(last or 0)
            if records:
                last_seq = max(last_seq, records[-1].seq)
            elif after < last_seq:  # the days of an ended session's output are over
                first_seq = last_seq + 1
            return Page(records, first_seq, last_seq)


_STATE_FIELDS: Final = ("state", "size", "exit")


def _seq(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])


def _record(entry_id: bytes, fields: dict[bytes, bytes]) -> Record:
    return Record(_seq(entry_id), int(fields[b"o"]), int(fields[b"t"]), RecordKind(int(fields[b"k"])), fields[b"d"])


def _terminal_state(fields: Sequence[Any]) -> TerminalState:
    state, size, exit_facts = fields
    if state is None:
        return TerminalState()
    dimensions = record_facts(size or b"")
    cols, rows = dimensions.get("cols"), dimensions.get("rows")
    if not isinstance(cols, int) or not isinstance(rows, int):
        cols, rows = 80, 24
    return TerminalState(state.decode(), cols, rows, record_facts(exit_facts or b""))


_FACTS: Final[dict[str, type]] = {
    "cols": int,
    "rows": int,
    "exitCode": int,
    "signal": str,
    "ptyHeldOpen": bool,
    "lost": str,
    "droppedBytes": int,
}


def record_facts(data: bytes) -> dict[str, Any]:
    """The facts of a record that is no output: those that the protocol names, as far as they are what it says.

    They come from a workspace, and callers put them beside members of their own.
    """
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(facts, dict):
        return {}
    return {name: _printable(facts[name]) for name, kind in _FACTS.items() if _is_fact(facts.get(name), kind)}


def _is_fact(value: object, kind: type) -> bool:
    return type(value) is kind and not (isinstance(value, int) and abs(value) >= 2**53)


def _printable(value: Any) -> Any:
    """JSON can name halves of characters (lone surrogates), which nothing can be written with."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value
