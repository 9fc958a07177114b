"""What one attached client types: in order, confirmed in order, and bounded while it waits."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from orchestrator.errors import OrchestratorError
from sidecar.protocol import MAX_INPUT_BYTES

OUTSTANDING_BYTES_MAX: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Typed:
    data: bytes
    input_id: str = ""


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
        self._outstanding_bytes += len(typed.data)
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
            typed = self._take()
            try:
                written = await self._write(typed)
            except OrchestratorError as error:
                await self._on_refused(typed, error)
            else:
                await self._on_written(typed, written)
            self._outstanding_bytes -= len(typed.data)
            self._room.set()

    def _take(self) -> Typed:
        """The next input, together with what follows when neither has an id of its own."""
        first = self._waiting.popleft()
        if first.input_id or not self._waiting:
            return first
        pieces, size = [first.data], len(first.data)
        while self._waiting and not self._waiting[0].input_id:
            if size + len(self._waiting[0].data) > MAX_INPUT_BYTES:
                break
            pieces.append(self._waiting.popleft().data)
            size += len(pieces[-1])
        return Typed(b"".join(pieces))
