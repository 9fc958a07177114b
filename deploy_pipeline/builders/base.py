"""What a runtime for applications promises. Releases call it; it knows nothing of queues and routes."""

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

from pydantic import BaseModel, ConfigDict

from deploy_pipeline.detect import Plan
from deploy_pipeline.jobs import LOG_LINE_CHARACTERS, LOG_TAIL_LINES
from deploy_pipeline.routing import Target

STOP_GRACE_S: Final = 10.0
_LOG_BYTES: Final = 4 * 1024 * 1024
_TAIL_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class BuildLimits:
    """What one build may use, all of its processes together."""

    memory_bytes: int = 2048 * 1024 * 1024
    cpus: float = 2.0  # not held to by the local runtime
    processes: int = 1024
    timeout_s: float = 15 * 60.0
    # Names (or name:port) that a build may reach although their address is not public: registries of the operator's.
    allowed_hosts: frozenset[str] = frozenset()

    def too_many_processes(self) -> str:
        return f"The build started more than {self.processes} processes at once and was stopped."

    def too_much_memory(self) -> str:
        return f"The build ran out of memory: it may use {self.memory_bytes // (1024 * 1024)} MiB."


class Release(BaseModel):
    """One immutable release of an application. Its folder holds `src` (the unpacked archive) and what is made of it."""

    model_config = ConfigDict(frozen=True)

    app_id: str
    app_name: str
    deployment_id: str
    archive_sha256: str
    folder: Path
    plan: Plan
    healthy_at: int = 0  # UTC ms when it first answered; 0: not yet
    settings_version: int = 0  # of the environment that it runs with
    image: str = ""  # what was built, where that is an image
    built_in: Path | None = None  # the folder of the release that was built, which this one runs again

    @property
    def built(self) -> Path:
        """The folder that the build left: its own, or the one of the release that it runs again."""
        return self.built_in or self.folder

    @property
    def src(self) -> Path:
        return self.built / "src"

    @property
    def build_log(self) -> Path:
        return self.folder / "build.log"

    def save(self) -> None:
        write_atomically(self.folder / "release.json", self.model_dump_json())

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """None when the folder holds no release, or one that was only begun."""
        try:
            return cls.model_validate_json((folder / "release.json").read_bytes())
        except (OSError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class RunState:
    """Whether a started release runs, and for people why not."""

    running: bool
    reason: str = ""
    restarting: bool = False  # it is not running, but the runtime itself starts it again before long
    restarts: int = 0  # how often the runtime itself has done so


@dataclass(frozen=True, slots=True)
class LogPiece:
    """A part of what a release wrote, up to `position`, which only its runtime understands."""

    data: bytes
    position: str
    skipped: bool = False  # something before it is lost


class Runtime(ABC):
    """Builds and runs releases. Any call may raise `EngineUnavailable`."""

    @abstractmethod
    async def build(self, release: Release, log: "BuildLog") -> None:
        """Make `release` ready to start, from `release.src`. Its processes are gone when this returns or raises,
        cancellation included.

        Raises:
            NotDeployable: this runtime cannot run such a project.
            BuildFailed: a step failed, was too slow or too greedy.
        """

    async def image_of(self, release: Release) -> str:  # noqa: ARG002 - for runtimes with images
        """What was built for it, by an id that never means another thing; empty where it is not an image."""
        return ""

    @abstractmethod
    async def start(self, release: Release, env: Mapping[str, str]) -> Target:
        """Start a built release, with the owner's `env`, beside whatever else of its application runs; returns before
        it listens. What still runs of this very release is ended first.

        Raises:
            StartFailed: it could not even be started.
        """

    @abstractmethod
    async def state(self, release: Release) -> RunState:
        """Whether it runs now. One that never started does not."""

    @abstractmethod
    async def settle(self, release: Release) -> None:
        """The release is healthy and serves from now on: give back what only its start needed."""

    @abstractmethod
    async def stop(self, app_id: str, deployment_id: str) -> None:
        """End a release: asked first, then forced. Returns when everything of it is confirmed gone, builds included;
        already gone is success."""

    @abstractmethod
    async def discard(self, app_id: str, deployment_id: str, *, kept: list[Release]) -> None:
        """`stop`, then remove what was built, except what one of the `kept` releases uses too."""

    @abstractmethod
    async def remove_app(self, app_id: str) -> None:
        """Remove what is left of an application whose releases were all discarded."""

    @abstractmethod
    async def log_tail(self, release: Release) -> list[str]:
        """The last lines that the running release wrote; empty when there are none."""

    @abstractmethod
    async def read_log(self, release: Release, position: str, *, max_bytes: int) -> LogPiece:
        """What the release wrote after `position` (empty: from the beginning), about `max_bytes` of it at most, cut
        between characters. The position stays when there is nothing. What was read may be dropped where it lies."""

    @abstractmethod
    async def running(self) -> set[tuple[str, str]]:
        """(app id, deployment id) of everything that runs here, whoever started it."""

    async def close(self) -> None:  # noqa: B027 - optional for a runtime
        """Release clients and threads. Releases go on."""


class BuildLog:
    """The output of a build: a capped file, and its last lines in memory. A context manager."""

    def __init__(self, path: Path, *, cap_bytes: int = _LOG_BYTES, sink: Callable[[bytes], None] | None = None) -> None:
        self._sink = sink  # gets everything, too
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._left = cap_bytes
        self._lines: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self._partial = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        """Append; past the cap only the tail goes on."""
        if self._sink is not None:
            self._sink(data)
        if self._left > 0:
            self._file.write(data[: self._left])
            self._left -= len(data)
            if self._left <= 0:
                self._file.write(b"\n[the log is cut here: it is too long]\n")
        *lines, rest = (self._partial + data).split(b"\n")
        self._lines.extend(_clean(line) for line in lines[-LOG_TAIL_LINES:])
        self._partial = rest[-4 * LOG_LINE_CHARACTERS :]

    def say(self, line: str) -> None:
        """A line of ours between the output."""
        self.write(f"{line}\n".encode())

    def tail(self) -> list[str]:
        return [*self._lines, _clean(self._partial)] if self._partial else list(self._lines)


def _clean(line: bytes) -> str:
    """A progress bar's last state, without what it overwrote."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")[:LOG_LINE_CHARACTERS]


def tail_of_file(path: Path) -> list[str]:
    """The last lines of a log; empty when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            data = file.read(_TAIL_BYTES)
    except FileNotFoundError:
        return []
    return [_clean(line) for line in data.splitlines()[-LOG_TAIL_LINES:]]


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old or the new text, whatever is killed in between."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
