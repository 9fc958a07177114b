"""Private folders and the locks on them."""

import asyncio
import fcntl
import json
import os
import stat
import time
from pathlib import Path
from typing import Final

from orchestrator.settings import SettingsError

_LOCK_POLL_S: Final = 0.05
_OURS_ALONE: Final = 0o700


class FolderInUse(SettingsError):
    """Another process holds the lock; the message names it."""


def private_folder(path: Path) -> Path:
    """Make `path` a folder of this user that nobody else can enter (mode 0700), or check that it is one.

    Raises:
        SettingsError: it is somebody else's, a link, or cannot be made. The fallback for sockets lies in the shared
            temporary folder, where another user could have put a folder of that name first.
    """
    try:
        path.mkdir(mode=_OURS_ALONE, parents=True, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise SettingsError(f"{path} is not a folder of this user; remove it or choose another data folder.")
        if stat.S_IMODE(found.st_mode) != _OURS_ALONE:
            path.chmod(_OURS_ALONE)
    except OSError as error:
        raise SettingsError(f"Cannot use the folder {path}: {error.strerror}.") from None
    return path


class FolderLock:
    """An exclusive flock(2) on a file, with a note in it for whoever finds it taken.

    The lock belongs to the open file: it ends with the last process that has it open, however that process ends, and
    a child that inherits `fileno` keeps holding it after its parent was killed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def fileno(self) -> int:
        """The open file's descriptor. Only while the lock is held."""
        assert self._fd is not None, "the lock is not held"
        return self._fd

    def try_acquire(self, **note: str | int) -> bool:
        """Take the lock if nobody has it, and leave `note` and our pid in the file."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.annotate(**note)
        return True

    async def acquire(self, *, wait_s: float, **note: str | int) -> bool:
        """Take the lock, trying for `wait_s`. False: somebody still has it."""
        deadline_s = time.monotonic() + wait_s
        while not self.try_acquire(**note):
            if time.monotonic() >= deadline_s:
                return False
            await asyncio.sleep(_LOCK_POLL_S)
        return True

    def annotate(self, **note: str | int) -> None:
        """Replace the note. Only while the lock is held."""
        text = json.dumps({"pid": os.getpid(), **note}).encode()
        os.ftruncate(self.fileno, 0)
        os.pwrite(self.fileno, text, 0)

    def note(self) -> dict[str, str | int]:
        """What the holder left; empty when there is nothing readable. It may be older than the present holder."""
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def release(self) -> None:
        """Close our copy of the file. Releasing what is not held is fine."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
