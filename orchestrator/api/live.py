"""Answers that go on for as long as the client likes: ended with the process, and watched for clients that are slow."""

import asyncio
import fcntl
import struct
import sys
import termios
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from aiohttp import web

WRITE_BUFFER_BYTES: Final = 256 * 1024
STALLED_S: Final = 20.0  # a client that has taken nothing for so long is given up
_LOOK_S: Final = 1.0
_FRAME_BYTES: Final = 64  # headers around what is sent


class ClientStalled(Exception):
    """The client did not take anything of what it was sent for `STALLED_S`."""


class Live:
    """All long answers of the process."""

    def __init__(self) -> None:
        self._ends: set[Callable[[], object]] = set()
        self.closing = False

    @contextmanager
    def kept(self, end: Callable[[], object]) -> Iterator[None]:
        """`end` is called when the process is to stop."""
        self._ends.add(end)
        try:
            yield
        finally:
            self._ends.discard(end)

    def close(self) -> None:
        self.closing = True
        for end in list(self._ends):
            end()


LIVE: Final = web.AppKey("live", Live)


def setup_live(app: web.Application) -> None:
    live = app[LIVE] = Live()

    async def close(_app: web.Application) -> None:
        live.close()

    app.on_shutdown.append(close)


class Pace:
    """How fast the client of one answer takes what is written to it."""

    def __init__(self, request: web.Request) -> None:
        assert request.transport is not None
        self._transport = request.transport
        self._socket = request.transport.get_extra_info("socket")
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)

    @property
    def buffered_bytes(self) -> int:
        """Written, but not taken over by the kernel."""
        return int(self._transport.get_write_buffer_size())

    def abort(self) -> None:
        """Drop the connection with all that waits for it."""
        self._transport.abort()

    async def sent(
        self,
        sending: Coroutine[Any, Any, None],
        size_bytes: int,
        look: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Wait until a write of about this size is done, and call `look` each second meanwhile.

        Raises:
            ClientStalled: nothing is taken any more. What was written stays in the buffer.
            ConnectionError: the client has gone.
        """
        if self.buffered_bytes + size_bytes + _FRAME_BYTES < WRITE_BUFFER_BYTES:
            await sending  # below the mark nothing has to be waited for
            return
        # In a task that is never cancelled: aiohttp 3.14 shares one future among all who wait for the same connection,
        # and who is cancelled takes the others with it.
        task = asyncio.ensure_future(sending)
        task.add_done_callback(_retrieve)
        left, taken_at_s = self._not_taken(), time.monotonic()
        while True:
            await asyncio.wait({task}, timeout=_LOOK_S)
            if task.done():
                task.result()
                return
            now_left, now_s = self._not_taken(), time.monotonic()
            if now_left < left:
                left, taken_at_s = now_left, now_s
            elif now_s - taken_at_s > STALLED_S:
                raise ClientStalled
            if look is not None:
                await look()

    def _not_taken(self) -> int:
        """Bytes on their way, those included that the kernel has but the other end did not acknowledge."""
        in_kernel = 0
        if self._socket is not None and sys.platform == "linux":  # tcp(7): SIOCOUTQ
            with suppress(OSError):
                in_kernel = struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
        return self.buffered_bytes + in_kernel


def _retrieve(task: "asyncio.Future[None]") -> None:
    """So that a write which failed after everybody had stopped waiting for it is no error in the log."""
    if not task.cancelled():
        task.exception()
