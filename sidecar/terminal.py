"""The workspace's terminal: one shell at a time, its output into the log, input into it in order and once."""

import asyncio
import hashlib
import signal
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sidecar.output_log import OutputLog
from sidecar.processes import Reaper, User
from sidecar.protocol import ONCE, JsonObject, RecordKind
from sidecar.pty_process import PtyClosed, PtyProcess

COLS, ROWS = 80, 24
SIZE_MAX: Final = 1000
INPUT_PATIENCE_S: Final = 30.0  # how long an input may wait for a program that does not read
HELD_OPEN_S: Final = 1.0  # how long descendants of an ended shell may delay the end of the terminal
# Inputs with a caller's key, and as many whose key the control plane made, for a retry of its own within seconds: those
# are every keystroke, and must not push out the others.
REMEMBERED_INPUTS: Final = 4096


class Refused(Exception):
    """A request that cannot be done; `code` is the control plane's to map."""

    def __init__(self, code: str, detail: str, **facts: int | str) -> None:
        super().__init__(detail)
        self.code, self.detail, self.facts = code, detail, facts


@dataclass(slots=True)
class _InputProgress:
    """How far an input with a key has come, so that a retry continues it instead of writing it again."""

    digest: bytes
    terminal: int  # which shell it went to: a number that grows
    written: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Terminal:
    def __init__(
        self, log: OutputLog, reaper: Reaper, user: User, *, home: Path, project_dir: Path, env: dict[str, str]
    ) -> None:
        self._log, self._reaper, self._user = log, reaper, user
        self._home, self._project_dir, self._env = home, project_dir, env
        self._pty: PtyProcess | None = None
        self._shell_number = 0
        self._reading = False
        self._size = (COLS, ROWS)
        self._input_order = asyncio.Lock()
        self._writing: set[asyncio.Task[int]] = set()
        self._inputs: dict[bool, OrderedDict[str, _InputProgress]] = {True: OrderedDict(), False: OrderedDict()}
        self._ended = asyncio.Event()
        self._ended.set()
        self._supervisor: asyncio.Task[None] | None = None
        self.on_output: Callable[[], None] = lambda: None

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    def start(self, cols: int | None = None, rows: int | None = None) -> int:
        """Start a shell; the seq of the record that says so.

        Raises:
            Refused: `terminal-running`, or `terminal-start-failed`.
        """
        if self.running:
            raise Refused("terminal-running", "the terminal's shell is running")
        self._size = _checked_size(cols or self._size[0], rows or self._size[1])
        try:
            pty = PtyProcess.spawn(
                self._user,
                home=self._home,
                cwd=self._project_dir,
                env=self._env,
                cols=self._size[0],
                rows=self._size[1],
            )
        except OSError as error:
            raise Refused("terminal-start-failed", f"the shell could not be started: {error}") from error
        exited = self._reaper.watch(pty.pid)
        self._pty = pty
        self._shell_number += 1
        self._ended.clear()
        seq = self._log.note(RecordKind.START, {"cols": self._size[0], "rows": self._size[1]})
        self._read_while_there_is_room()
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise(pty, exited))
        self.on_output()
        return seq

    def room(self) -> None:
        """The log may have room again."""
        self._read_while_there_is_room()

    def _read_while_there_is_room(self) -> None:
        pty = self._pty
        if pty is None or pty.fd < 0:
            return
        wanted = not self._log.full
        if wanted and not self._reading:
            asyncio.get_running_loop().add_reader(pty.fd, self._on_readable, pty)
        elif not wanted and self._reading:
            asyncio.get_running_loop().remove_reader(pty.fd)
        self._reading = wanted

    def _on_readable(self, pty: PtyProcess) -> None:
        data, at_end = pty.read(to_the_last=False)
        if data:
            self._log.write(data)
        if at_end:
            asyncio.get_running_loop().remove_reader(pty.fd)
            self._reading = False
            self._pty = None  # nothing more to read; `_supervise` closes it
        else:
            self._read_while_there_is_room()
        if data:
            self.on_output()

    async def _supervise(self, pty: PtyProcess, exited: asyncio.Future[int]) -> None:
        code = await exited
        held_open = not await self._drain(pty)
        facts: JsonObject = {"exitCode": code} if code >= 0 else {"signal": _signal_name(-code)}
        if held_open:
            facts["ptyHeldOpen"] = True
        self._pty, self._reading = None, False
        pty.close()
        self._log.note(RecordKind.EXIT, facts)
        self._ended.set()
        self.on_output()

    async def _drain(self, pty: PtyProcess) -> bool:
        """Read the rest after the shell's exit; False when a descendant still holds the PTY open at the end.

        Only time in which we do read counts: a full log (the control plane is away) must not cut output off.
        """
        patience_s = HELD_OPEN_S
        while self._pty is pty:
            step_s = 0.005
            await asyncio.sleep(step_s)
            if self._reading:
                patience_s -= step_s
            if patience_s <= 0:
                data, at_end = pty.read()
                self._log.write(data)
                return at_end
        return True

    def write_now(self, key: str, data: bytes) -> bool:
        """Whether all of `data` could be written at once, as nearly always; if not, go on with `write`.

        Raises:
            Refused: `idempotency-key-reused`.
        """
        pty, progress = self._pty, self._progress_of(key, data)
        if self._writing or not key or pty is None or not self.running or progress.terminal != self._shell_number:
            return False
        with suppress(PtyClosed):
            progress.written += pty.write_some(memoryview(data)[progress.written :])
        return progress.written == len(data)

    def write(self, key: str, data: bytes) -> "asyncio.Task[int]":
        """Write all of `data` to the terminal, after every earlier call's; how many bytes it has.

        The same `key` with the same data again writes only what is not written yet.

        Raises:
            Refused: `terminal-exited`; `idempotency-key-reused`; `terminal-not-reading` with `writtenBytes`.
        """
        task = asyncio.get_running_loop().create_task(self._write(key, data))
        self._writing.add(task)  # from this call on, and not from when it gets to run
        task.add_done_callback(self._writing.discard)
        return task

    async def _write(self, key: str, data: bytes) -> int:
        progress = self._progress_of(key, data)
        async with progress.lock, self._input_order:
            if progress.written < len(data) or not data:
                await self._write_rest(progress, data)
        return len(data)

    def _progress_of(self, key: str, data: bytes) -> _InputProgress:
        digest = hashlib.sha256(data).digest() if key else b""
        if not key:
            return _InputProgress(digest, self._shell_number)
        inputs = self._inputs[key.startswith(ONCE)]
        known = inputs.get(key)
        if known is None:
            known = inputs[key] = _InputProgress(digest, self._shell_number)
            if len(inputs) > REMEMBERED_INPUTS:
                inputs.popitem(last=False)
        elif known.digest != digest:
            raise Refused("idempotency-key-reused", "the Idempotency-Key was used with other input")
        return known

    async def _write_rest(self, progress: _InputProgress, data: bytes) -> None:
        view = memoryview(data)
        deadline = time.monotonic() + INPUT_PATIENCE_S
        while True:
            pty = self._pty
            if pty is None or not self.running or progress.terminal != self._shell_number:
                raise Refused("terminal-exited", "the terminal's shell has exited", writtenBytes=progress.written)
            try:
                progress.written += pty.write_some(view[progress.written :])
            except PtyClosed:
                raise Refused(
                    "terminal-exited", "the terminal's shell has exited", writtenBytes=progress.written
                ) from None
            if progress.written == len(data):
                return
            try:
                # In pieces, so that a shell that ends meanwhile is noticed.
                async with asyncio.timeout(0.5):
                    await pty.writable()
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise Refused(
                        "terminal-not-reading",
                        f"the program in the terminal did not read its input for {INPUT_PATIENCE_S:.0f} seconds",
                        writtenBytes=progress.written,
                    ) from None

    def resize(self, cols: int, rows: int) -> int:
        """The seq of the record that says so; 0 when that was its size already.

        Raises:
            Refused: `terminal-exited`, or `invalid-size`.
        """
        size = _checked_size(cols, rows)
        self._running_pty().resize(*size)
        if size == self._size:
            return 0
        self._size = size
        seq = self._log.note(RecordKind.RESIZE, {"cols": cols, "rows": rows})
        self.on_output()
        return seq

    def signal(self, name: str) -> None:
        """
        Raises:
            Refused: `terminal-exited`, or `invalid-signal`.
        """
        try:
            number = signal.Signals[name]
        except KeyError:
            raise Refused("invalid-signal", f"no such signal: {name}") from None
        try:
            self._running_pty().signal_foreground(number)
        except OSError as error:
            raise Refused("terminal-exited", f"no process to signal: {error}") from error

    def _running_pty(self) -> PtyProcess:
        if self._pty is None or not self.running:
            raise Refused("terminal-exited", "the terminal's shell has exited")
        return self._pty

    async def hang_up(self, *, patience_s: float) -> bool:
        """SIGHUP to the shell and its foreground job; whether the terminal ended within `patience_s`."""
        if self._pty is not None:
            self._pty.hang_up()
        return await self.wait_ended(patience_s)

    async def wait_ended(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True


def _checked_size(cols: int, rows: int) -> tuple[int, int]:
    if not (1 <= cols <= SIZE_MAX and 1 <= rows <= SIZE_MAX):
        raise Refused("invalid-size", f"cols and rows are 1 to {SIZE_MAX}")
    return cols, rows


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"  # real-time signals have no names of their own
