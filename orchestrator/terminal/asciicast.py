"""A session's log as asciicast v3 (https://docs.asciinema.org/manual/asciicast/v3/), piece by piece."""

import json
import signal
from collections.abc import Sequence
from typing import Any, Final

from orchestrator.terminal.output_store import record_facts
from sidecar.protocol import Record, RecordKind

_SIGNAL_STATUS: Final = 128  # as shells report a program that a signal ended


class Asciicast:
    """Give it the log's records in order, `feed` by `feed`, and then `end`.

    Only the last exit of the log becomes an `x` event, since players stop there; a shell that was followed by another
    one leaves a marker instead.
    """

    def __init__(self, *, title: str, cols: int, rows: int) -> None:
        """The size is that of the terminal when the log does not say with which it began."""
        self._title, self._size = title, (cols, rows)
        self._begun = False
        self._time_ms = 0
        self._exit: Record | None = None

    def feed(self, records: Sequence[Record], *, truncated_before: int = 0) -> bytes:
        """Lines for these records. `truncated_before`: the log was trimmed up to this seq, before the first of them."""
        lines = [] if self._begun or not records else [self._header(records[0])]
        if truncated_before:
            lines.append(f"# output before seq {truncated_before} was trimmed")
        for record in records:
            if self._exit is not None:
                lines.append(self._event(self._exit, "m", f"exit {_status(self._exit)}"))
                self._exit = None
            match record.kind:
                case RecordKind.OUTPUT:
                    # A chunk ends where a character does, so each can be decoded alone.
                    lines.append(self._event(record, "o", record.data.decode(errors="replace")))
                case RecordKind.START | RecordKind.RESIZE:
                    size = _size(record) or self._size
                    if size != self._size:
                        self._size = size
                        lines.append(self._event(record, "r", f"{size[0]}x{size[1]}"))
                case RecordKind.EXIT:
                    self._exit = record
                case _:
                    facts = json.dumps(record_facts(record.data), separators=(",", ":"))
                    lines.append(f"# {record.kind.name.lower()} at seq {record.seq}: {facts}")
        return "".join(f"{line}\n" for line in lines).encode()

    def end(self) -> bytes:
        """What is left, when there are no more records."""
        lines = [] if self._begun else [self._header(None)]
        if self._exit is not None:
            lost = record_facts(self._exit.data).get("lost")
            # Nobody knows the status of a shell that went with its workspace.
            lines.append(f"# lost: {_json(lost)}" if lost else self._event(self._exit, "x", _status(self._exit)))
        return "".join(f"{line}\n" for line in lines).encode()

    def _header(self, first: Record | None) -> str:
        self._begun = True
        header: dict[str, Any] = {"version": 3}
        if first is not None:
            if first.kind is RecordKind.START:
                self._size = _size(first) or self._size
            self._time_ms = first.time_ms
            header["timestamp"] = first.time_ms // 1000
        cols, rows = self._size
        term = {"cols": cols, "rows": rows, "type": "xterm-256color"}
        return _json(header | {"term": term, "title": self._title})

    def _event(self, record: Record, code: str, data: str) -> str:
        # Relative to the event before; a clock that was set back stands still instead.
        interval_ms = max(0, record.time_ms - self._time_ms)
        self._time_ms = max(self._time_ms, record.time_ms)
        return _json([interval_ms / 1000, code, data])


def _size(record: Record) -> tuple[int, int] | None:
    facts = record_facts(record.data)
    cols, rows = facts.get("cols"), facts.get("rows")
    return (cols, rows) if isinstance(cols, int) and isinstance(rows, int) else None


def _status(record: Record) -> str:
    facts = record_facts(record.data)
    name = facts.get("signal")
    if isinstance(name, str):
        number = signal.Signals[name].value if name in signal.Signals.__members__ else 0
        return str(_SIGNAL_STATUS + number)
    code = facts.get("exitCode")
    return str(code) if isinstance(code, int) else "0"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
