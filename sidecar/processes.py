"""Children: who they run as, when they end, and how to end all of them."""

import asyncio
import ctypes
import errno
import os
import pwd
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

_PR_CAPBSET_DROP: Final = 24  # prctl(2)
_PR_SET_CHILD_SUBREAPER: Final = 36
_OOM_SCORE_ADJ_MAX: Final = b"1000"  # proc(5): the first to go when memory runs out
_UNCHANGEABLE_SIGNALS: Final = {signal.SIGKILL, signal.SIGSTOP}


@dataclass(frozen=True, slots=True)
class User:
    """Whom the workspace's own processes run as."""

    name: str
    uid: int
    gid: int
    shell: str

    @classmethod
    def named(cls, name: str) -> Self:
        """
        Raises:
            KeyError: no such user.
        """
        entry = pwd.getpwnam(name)
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_shell or "/bin/sh")

    @classmethod
    def current(cls) -> Self:
        entry = pwd.getpwuid(os.getuid())
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_shell or "/bin/sh")

    @property
    def differs(self) -> bool:
        return self.uid != os.getuid()


def become(user: User) -> None:
    """In a forked child, before exec: default signals, and when the user differs no privilege of ours.

    The capability bounding set goes first (it needs CAP_SETPCAP), then the ids: from root to another user the kernel
    clears the permitted and effective sets (capabilities(7)).
    """
    # Ignored signals survive exec: Python ignores SIGPIPE and SIGXFSZ, and a shell that starts us in the background may
    # ignore SIGINT and SIGQUIT.
    for number in signal.valid_signals() - _UNCHANGEABLE_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
    if not user.differs:
        return
    with open("/proc/self/oom_score_adj", "wb") as file:  # noqa: PTH123 - plain and quick between fork and exec
        file.write(_OOM_SCORE_ADJ_MAX)
    libc = ctypes.CDLL(None, use_errno=True)
    capability = 0
    while libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    if ctypes.get_errno() != errno.EINVAL:  # EINVAL: past the last one
        raise OSError(ctypes.get_errno(), "cannot drop the capability bounding set")
    os.setgroups([])
    os.setgid(user.gid)
    os.setuid(user.uid)


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent ends, so that none escapes `kill_descendants`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Reaper:
    """Collects every child's exit status; adopted orphans' too."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watched: dict[int, asyncio.Future[int]] = {}
        # Not `loop.add_signal_handler`: uvloop keeps SIGCHLD for itself.
        self._before = signal.signal(signal.SIGCHLD, lambda *_: self._loop.call_soon_threadsafe(self._reap))

    def close(self) -> None:
        """Leave children to whoever looked after them before."""
        signal.signal(signal.SIGCHLD, self._before)

    def watch(self, pid: int) -> asyncio.Future[int]:
        """A future of the exit code of this child, negative for a signal. To be called right after the fork."""
        future = self._watched[pid] = self._loop.create_future()
        self._loop.call_soon(self._reap)
        return future

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            future = self._watched.pop(pid, None)
            if future is not None and not future.done():
                future.set_result(os.waitstatus_to_exitcode(status))


def descendants() -> list[int]:
    """Pids of all living descendants of this process, nearest first. Linux only; elsewhere none are known."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat") if sys.platform == "linux" else ():
        try:
            # proc(5): "pid (comm) state ppid …"; comm may hold spaces and parentheses.
            state, parent = entry.read_bytes().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # ended meanwhile
        if state not in {b"Z", b"X"}:
            children.setdefault(int(parent), []).append(int(entry.parent.name))
    found: list[int] = []
    front = [os.getpid()]
    while front:
        front = [child for parent in front for child in children.get(parent, ())]
        found += front
    return found


async def kill_descendants(*, whole_pid_namespace: bool, timeout_s: float = 3.0) -> bool:
    """SIGKILL everything below us until nothing is left; False when something still was after `timeout_s`.

    `whole_pid_namespace`: kill(2) with pid -1, which reaches everything in a container at one moment, fork bombs too.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if whole_pid_namespace:
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                return True
        left = descendants()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not left:
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
