"""Processes that belong to a release: started in a session of their own, marked, bounded, and found again to be ended.

A process can leave its group and its parent, but not shed the mark in the environment that it was started with
(unless it works at it: the local runtime isolates nothing, and says so).
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import psutil

from deploy_pipeline.builders.base import STOP_GRACE_S, BuildLimits, BuildLog
from deploy_pipeline.errors import BuildFailed

MARK: Final = "CODE_SESSIONS_RELEASE"
_PIECE_BYTES: Final = 64 * 1024
_POLL_S: Final = 0.05
_LOOK_S: Final = 0.5
_LAST_OUTPUT_S: Final = 1.0  # for what is still in the pipe when everybody who wrote to it is gone
_START_TOLERANCE_S: Final = 2.0
_KILL_ROUNDS: Final = 50  # each 100 ms: a process that forks while it is being killed needs several

# What builds and applications get of the worker's own environment: how to reach registries, and the user's language.
# Nothing else, so that no setting or secret of this product is in their reach.
_PASSED_ON: Final = frozenset(
    {
        "ALL_PROXY",
        "CURL_CA_BUNDLE",
        "GIT_SSL_CAINFO",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "LANG",
        "LC_ALL",
        "NODE_EXTRA_CA_CERTS",
        "NO_PROXY",
        "PATH",
        "REQUESTS_CA_BUNDLE",
        "SSL_CERT_DIR",
        "SSL_CERT_FILE",
        "TZ",
    }
)
_PASSED_ON_PREFIXES: Final = ("PIP_", "NPM_CONFIG_")


def inherited_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The part of the worker's environment that builds and applications get, by an allow-list."""
    return {
        name: value
        for name, value in environ.items()
        if name.upper() in _PASSED_ON or name.upper().startswith(_PASSED_ON_PREFIXES)
    }


async def run_step(
    command: tuple[str, ...],
    *,
    cwd: Path,
    env: dict[str, str],
    log: BuildLog,
    timeout_s: float,
    shown: str = "",
    limits: BuildLimits | None = None,
) -> None:
    """Run a build step to its end, with its output in `log`. All that it started is gone afterwards, also when this
    is cancelled; `env` has to carry the mark. With `limits`, memory and processes are looked at now and then.

    Raises:
        BuildFailed: it ended with another status than 0, could not be started, took longer than `timeout_s`, or more
            than the limits allow.
    """
    shown = shown or " ".join(command)
    log.say(f"$ {shown}")
    try:
        child, output = _started_with_pipe(command, cwd, env)
    except OSError as error:
        raise BuildFailed(f"`{shown}` could not be started: {error.strerror}") from error
    copying = asyncio.create_task(_copy(output, log))
    look_at = time.monotonic() + _LOOK_S
    try:
        async with asyncio.timeout(timeout_s):
            # asyncio's own wait() goes on until the pipe is closed, which a process in the background can hold open
            # for ever (python/cpython#119710).
            while (status := child.poll()) is None:
                await asyncio.sleep(_POLL_S)
                if limits is not None and time.monotonic() > look_at:
                    await asyncio.to_thread(_check_usage, env[MARK], child.pid, limits)
                    look_at = time.monotonic() + _LOOK_S
    except TimeoutError:
        raise BuildFailed(f"`{shown}` took longer than {timeout_s:.0f} s and was stopped.") from None
    finally:
        # Also after success: what a step leaves running in the background is no part of a release.
        await asyncio.shield(asyncio.to_thread(kill_release, env[MARK], child.pid, grace_s=0))
        await asyncio.wait({copying}, timeout=_LAST_OUTPUT_S)
        copying.cancel()
        child.poll()
    if status != 0:
        how = f"was ended by {_signal_name(-status)}" if status < 0 else f"failed with status {status}"
        raise BuildFailed(f"`{shown}` {how}.")


def _check_usage(mark: str, leader: int, limits: BuildLimits) -> None:
    found = marked(lambda other: other == mark, leader)
    if len(found) > limits.processes:
        raise BuildFailed(limits.too_many_processes())
    used = 0
    for process in found:
        with contextlib.suppress(psutil.Error):
            used += process.memory_info().rss  # what several share counts for each: an estimate from above
    if used > limits.memory_bytes:
        raise BuildFailed(limits.too_much_memory())


def _started_with_pipe(
    command: tuple[str, ...], cwd: Path, env: dict[str, str]
) -> tuple[subprocess.Popen[bytes], BinaryIO]:
    """The process, and the reading end of what it and all below it write."""
    read, write = os.pipe()
    try:
        child = subprocess.Popen(  # noqa: S603 - the owner's command, as an argument list
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=write, stderr=write, start_new_session=True
        )
    except OSError:
        os.close(read)
        raise
    finally:
        os.close(write)
    return child, os.fdopen(read, "rb", buffering=0)


async def _copy(output: BinaryIO, log: BuildLog) -> None:
    """Until every writer has closed the pipe, or this is cancelled."""
    reader = asyncio.StreamReader(limit=_PIECE_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), output
    )
    try:
        while data := await reader.read(_PIECE_BYTES):
            log.write(data)
    finally:
        transport.close()


def spawn(command: tuple[str, ...], *, cwd: Path, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a long-running process that outlives this one, output appended to `log`. Blocking for milliseconds.

    asyncio's own kind would be killed together with its event loop, so this is a plain one that has to be polled.
    """
    with log.open("ab", buffering=0) as sink:
        return subprocess.Popen(  # noqa: S603 - the owner's command, as an argument list
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
        )


def is_same_process(pid: int, started: float) -> bool:
    """Whether the process with this id is still the one that started then (psutil's clock), and not a zombie."""
    try:
        process = psutil.Process(pid)
        # psutil counts from the boot time, which the kernel derives from a clock that is being set right.
        return abs(process.create_time() - started) < _START_TOLERANCE_S and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def started_at(pid: int) -> float:
    """When it started, to tell it from a later process with the same id; 0 when it is gone already."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def kill_release(deployment_id: str, leader: int = 0, *, grace_s: float = STOP_GRACE_S) -> None:
    """SIGTERM to every process of a release, SIGKILL after `grace_s`; returns when none is left. Blocking.

    `leader` is the id of a session that belongs to it, when known.

    Raises:
        ValueError: no deployment is named. Every process without a mark has the empty one, the whole machine that is.
    """
    if not deployment_id:
        raise ValueError("no deployment is named")

    def members() -> list[psutil.Process]:
        return marked(lambda mark: mark == deployment_id, leader)

    deadline = time.monotonic() + grace_s
    if grace_s > 0:
        _signal_all(members(), signal.SIGTERM)
    while time.monotonic() < deadline and members():
        time.sleep(0.1)
    for _ in range(_KILL_ROUNDS):
        left = members()
        if not left:
            return
        _signal_all(left, signal.SIGKILL)
        time.sleep(0.1)  # not psutil's wait: it would take the exit status away from whoever started the process


def marked(is_wanted: Callable[[str], bool], leader: int = 0) -> list[psutil.Process]:
    """Living processes whose mark is wanted, or that are in the leader's session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            in_session = leader > 0 and os.getsid(process.pid) == leader
            if in_session or is_wanted(mark_of(process)):
                found.append(process)
    return found


def mark_of(process: psutil.Process) -> str:
    """The release that a process belongs to; empty for none, and for another user's process."""
    try:
        return process.environ().get(MARK, "")
    except (psutil.Error, OSError):
        return ""


def _signal_all(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
