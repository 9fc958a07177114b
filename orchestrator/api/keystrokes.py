"""What one attached client types: in order, confirmed in order, and bounded while it waits."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from orchestrator.errors import OrchestratorError
from sidecar.protocol import MAX_INPUT_BYTES

OUTSTANDING_BYTES_MAX: Final = 1024 * 1024
_COST_BYTES: Final = 250


@dataclass(frozen=True, slots=True)
class Typed:
    data: bytes
    input_id: str = ""

    @property
    def cost_bytes(self) -> int:
        """What it takes while it waits: so that a great many tiny or empty ones count, too."""
        return len(self.data) + _COST_BYTES


class Keystrokes:
    """One write is on its way at a time, which is what keeps the order when the link breaks in the middle of it; all
    that was typed meanwhile goes with the next one, so a fast typist is not slowed down to one key for each round trip.
    """

    def __init__(
        self,
        write: Callable[[Typed], Awaitable[int]],
        *,
        on_written: Callable[[Typed, int], Awaitable[None]],
        on_refused: Callable[[Typed, OrchestratorError], Awaitable[None]],
    ) -> None:
        self._write, self._on_written, self._on_refused = write, on_written, on_refused
        self._waiting: deque[Typed] = deque()
        self._outstanding_bytes = 0
        self._more, self._room = asyncio.Event(), asyncio.Event()

    def add(self, typed: Typed) -> None:
        self._waiting.append(typed)
        self._outstanding_bytes += typed.cost_bytes
        self._more.set()

    async def room(self) -> None:
        """Return when less than `OUTSTANDING_BYTES_MAX` waits to be written."""
        while self._outstanding_bytes >= OUTSTANDING_BYTES_MAX:
            self._room.clear()
            await self._room.wait()

    @property
    def idle(self) -> bool:
        return not self._outstanding_bytes

    async def run(self) -> None:
        """Until cancelled. What `on_refused` raises ends it."""
        while True:
            while not self._waiting:
                self._more.clear()
                await self._more.wait()
            typed, cost_bytes = self._take()
            try:
                written = await self._write(typed)
            except OrchestratorError as error:
                await self._on_refused(typed, error)
            else:
                await self._on_written(typed, written)
            self._outstanding_bytes -= cost_bytes
            self._room.set()

    def _take(self) -> tuple[Typed, int]:
        """The next input, together with what follows when neither has an id of its own; and what they cost."""
        first = self._waiting.popleft()
        if first.input_id or not self._waiting:
            return first, first.cost_bytes
        pieces, size, cost_bytes = [first.data], len(first.data), first.cost_bytes
        while self._waiting and not self._waiting[0].input_id:
            if size + len(self._waiting[0].data) > MAX_INPUT_BYTES:
                break
            following = self._waiting.popleft()
            pieces.append(following.data)
            size += len(following.data)
            cost_bytes += following.cost_bytes
        return Typed(b"".join(pieces)), cost_bytes
