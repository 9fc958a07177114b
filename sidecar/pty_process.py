"""A login shell on a pseudo-terminal (pty(7)): spawn, read, write completely, resize, signal, close."""

import asyncio
import errno
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import ptyprocess

from sidecar.processes import User, become

_READ_BYTES: Final = 64 * 1024  # Linux hands over at most 4 KiB at a time, other systems more
_FEW_BYTES: Final = 1024
_READ_BUDGET_BYTES: Final = 256 * 1024  # for one turn of the event loop


class PtyClosed(Exception):
    """Nothing has the other end of the PTY open any more."""


class PtyProcess:
    def __init__(self, process: ptyprocess.PtyProcess) -> None:
        self._process = process
        self.pid: int = process.pid
        self.fd: int = process.fd
        os.set_blocking(self.fd, False)

    @classmethod
    def spawn(cls, user: User, *, home: Path, cwd: Path, env: dict[str, str], cols: int, rows: int) -> Self:
        """Start the user's shell as a login shell.

        Raises:
            OSError: the shell is missing or cannot be executed, or there are no more PTYs or processes.
        """

        def prepare() -> None:
            # As the user: our root, which lacks CAP_DAC_OVERRIDE, cannot enter a home that its owner closed.
            become(user)
            for folder in (cwd, home, "/"):
                with suppress(OSError):
                    os.chdir(folder)
                    return

        shell = [env["SHELL"], "-l"]
        return cls(ptyprocess.PtyProcess.spawn(shell, env=env, preexec_fn=prepare, dimensions=(rows, cols)))

    def read(self, *, to_the_last: bool = True) -> tuple[bytes, bool]:
        """All output there is now, up to a budget, and whether the PTY is at its end. Never blocks.

        Without `to_the_last` a little output is taken for all there is, which spares asking again.
        """
        pieces: list[bytes] = []
        size = 0
        while size < _READ_BUDGET_BYTES:
            try:
                piece = os.read(self.fd, _READ_BYTES)
            except BlockingIOError:
                return b"".join(pieces), False
            except OSError as error:
                if error.errno == errno.EINTR:
                    continue
                if error.errno != errno.EIO:  # Linux: no one has the other end open
                    raise
                return b"".join(pieces), True
            if not piece:  # the same on macOS
                return b"".join(pieces), True
            pieces.append(piece)
            size += len(piece)
            if len(piece) < _FEW_BYTES and not to_the_last:
                break
        return b"".join(pieces), False

    def write_some(self, data: memoryview) -> int:
        """Write what fits without blocking; how many bytes that were.

        Raises:
            PtyClosed: no one has the other end open.
        """
        written = 0
        while written < len(data):
            try:
                written += os.write(self.fd, data[written:])
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in {errno.EIO, errno.EBADF}:
                    raise PtyClosed from None
                raise
        return written

    async def writable(self) -> None:
        """Return when the terminal takes more input."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        loop.add_writer(self.fd, wake)
        try:
            await future
        finally:
            if self.fd >= 0:
                loop.remove_writer(self.fd)

    def resize(self, cols: int, rows: int) -> None:
        self._process.setwinsize(rows, cols)

    def signal_foreground(self, number: signal.Signals) -> None:
        """Send a signal to the terminal's foreground process group.

        Raises:
            ProcessLookupError: there is none.
        """
        group = os.tcgetpgrp(self.fd)
        if group <= 0:
            raise ProcessLookupError("no foreground process group")
        os.killpg(group, number)

    def hang_up(self) -> None:
        """Tell the shell that its terminal is gone, as a closed window does."""
        with suppress(OSError):  # already gone
            os.killpg(self.pid, signal.SIGHUP)
        with suppress(OSError):
            self.signal_foreground(signal.SIGHUP)

    def close(self) -> None:
        """Close our end: whoever still has the other one gets SIGHUP and EIO."""
        if self.fd < 0:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.fd)
        loop.remove_writer(self.fd)
        self._process.fileobj.close()
        self._process.closed = True  # or its destructor would sleep and signal
        self.fd = -1
