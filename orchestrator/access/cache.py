"""A small memory of answers that are only good for a moment."""

import time
from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ExpiringCache(Generic[Value]):
    """At most `max_entries` values, each for `ttl_s` seconds from when it was asked for; the oldest goes first."""

    def __init__(self, max_entries: int, ttl_s: float) -> None:
        self._max_entries, self._ttl_s = max_entries, ttl_s
        self._cleared_s = 0.0
        self._entries: OrderedDict[str, tuple[float, Value]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> Value | None:
        """The value, None when there is none or it is too old."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        if entry[0] <= time.monotonic():
            del self._entries[name]
            return None
        return entry[1]

    def put(self, name: str, value: Value, asked_s: float) -> None:
        """Keep what the source answered when it was asked at `asked_s` (monotonic).

        Its time counts from there, and an answer from before `clear` is not kept: the source may have changed since.
        """
        if asked_s <= self._cleared_s:
            return
        self._entries.pop(name, None)
        self._entries[name] = (asked_s + self._ttl_s, value)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        self._cleared_s = time.monotonic()
        self._entries.clear()
