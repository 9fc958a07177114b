"""Workspaces as processes and folders on this machine. No isolation: for one person on a loopback address.

`<workspaces>/<workspace id>/` holds `owner.json` (session, sidecar's pid and when it started), `home/<project>/` and
`sidecar.log`. The sidecar runs in a session of its own (setsid(2)), so it outlives a control plane that is killed.
"""

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

import psutil

from orchestrator.ids import is_id
from orchestrator.runtimes.base import (
    RuntimeUnavailable,
    WorkspaceRuntime,
    WorkspaceSpec,
    WorkspaceStartFailed,
    WorkspaceState,
    WorkspaceStatus,
)

_MARK: Final = "CODE_SESSION_WORKSPACE"  # in the environment of everything that the sidecar starts
_KILL_S: Final = 5.0
_STARTED_TOLERANCE_S: Final = 1.0  # a process's start time comes from clock ticks
_LOG_TAIL_BYTES: Final = 2000


class LocalRuntime(WorkspaceRuntime):
    def __init__(self, workspaces_dir: Path, link_socket_dir: Path) -> None:
        self._dir, self._link_socket_dir = workspaces_dir, link_socket_dir
        # One change of a workspace at a time: a stop comes before or after a start, never into its middle.
        self._changing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def check(self) -> None:
        """Processes can always be started here."""

    async def start(self, spec: WorkspaceSpec) -> None:
        async with self._lock(spec.workspace_id):
            try:
                (self._dir / spec.workspace_id).mkdir(parents=True, mode=0o700)
            except OSError as error:  # somebody's folder stands there, perhaps a running workspace's
                raise WorkspaceStartFailed(f"cannot make the workspace's folder: {error}") from error
            # A thread cannot be interrupted, so a cancelled start ends before it is undone. It takes milliseconds.
            started = asyncio.get_running_loop().run_in_executor(None, self._start, spec)
            try:
                await asyncio.shield(started)
            except BaseException:
                await asyncio.wait({started})
                started.exception()
                await self._stop_in_thread(spec.workspace_id, 0)
                raise

    def _lock(self, workspace_id: str) -> asyncio.Lock:
        return self._changing.setdefault(workspace_id, asyncio.Lock())

    def _start(self, spec: WorkspaceSpec) -> None:
        folder = self._dir / spec.workspace_id
        home = folder / "home"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CODE_SESSIONS_")}
        environment |= {
            _MARK: spec.workspace_id,
            "CODE_SESSIONS_LINK_URL": f"unix://{self._link_socket_dir}",
            "CODE_SESSIONS_SESSION_ID": spec.session_id,
            "CODE_SESSIONS_WORKSPACE_ID": spec.workspace_id,
            "CODE_SESSIONS_LINK_TOKEN": spec.link_token,
            "CODE_SESSIONS_HOME": str(home),
            "CODE_SESSIONS_PROJECT_DIR": str(home / spec.project_dir_name),
            "CODE_SESSIONS_USER": "",
        }
        try:
            with (folder / "sidecar.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-m", "sidecar"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    cwd=folder,
                    start_new_session=True,
                )
            owner = {
                "sessionId": spec.session_id,
                "pid": process.pid,
                "startedAt": psutil.Process(process.pid).create_time(),
            }
            temporary = folder / "owner.json.new"
            temporary.write_text(json.dumps(owner))
            temporary.rename(folder / "owner.json")
        except (OSError, psutil.Error) as error:
            raise WorkspaceStartFailed(str(error)) from error

    async def stop(self, workspace_id: str, *, grace_s: float) -> None:
        if not is_id(workspace_id, "ws"):
            return  # nothing of ours has such a name, and it may lead anywhere
        async with self._lock(workspace_id):
            await self._stop_in_thread(workspace_id, grace_s)

    async def _stop_in_thread(self, workspace_id: str, grace_s: float) -> None:
        stopping = asyncio.get_running_loop().run_in_executor(None, self._stop, workspace_id, grace_s)
        await asyncio.shield(stopping)

    def _stop(self, workspace_id: str, grace_s: float) -> None:
        folder = self._dir / workspace_id
        sidecar = self._sidecar(workspace_id)
        if sidecar is not None and grace_s > 0:
            below = _tree(sidecar)  # before it ends: afterwards nobody knows whose children they were
            with suppress(psutil.NoSuchProcess):
                sidecar.send_signal(signal.SIGTERM)
            _wait_gone([sidecar], grace_s)
        else:
            below = _tree(sidecar) if sidecar is not None else []
        deadline = time.monotonic() + _KILL_S
        while left := [process for process in {*below, *_marked(workspace_id)} if _alive(process)]:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    below += _tree(process)
                    process.kill()
            _wait_gone(left, 0.5)
            if time.monotonic() > deadline:
                break  # in uninterruptible sleep (a dead network file system): their folder goes all the same
        if sidecar is not None:
            _reap(sidecar.pid)
        while folder.exists() and time.monotonic() < deadline + _KILL_S:
            shutil.rmtree(folder, onerror=_let_us_in)
        if folder.exists():
            raise RuntimeUnavailable(f"the folder of {workspace_id} cannot be removed")

    async def status(self, workspace_id: str) -> WorkspaceStatus:
        folder = self._dir / workspace_id
        if not is_id(workspace_id, "ws") or not folder.is_dir():
            return WorkspaceStatus(WorkspaceState.GONE)
        if self._sidecar(workspace_id) is not None:
            return WorkspaceStatus(WorkspaceState.RUNNING)
        return WorkspaceStatus(WorkspaceState.STOPPED, f"its sidecar ended{_last_line(folder / 'sidecar.log')}")

    async def list_workspaces(self) -> dict[str, str]:
        if not self._dir.is_dir():
            return {}
        found = {}
        for folder in self._dir.iterdir():
            if is_id(folder.name, "ws"):
                found[folder.name] = str(_owner(folder).get("sessionId", ""))
        return found

    def _sidecar(self, workspace_id: str) -> psutil.Process | None:
        owner = _owner(self._dir / workspace_id)
        try:
            process = psutil.Process(int(owner["pid"]))
            # A pid is used again after a while; its start time tells the two apart.
            same = abs(process.create_time() - float(owner["startedAt"])) < _STARTED_TOLERANCE_S
        except (KeyError, ValueError, psutil.Error):
            return None
        if same and _alive(process):
            return process
        _reap(process.pid)
        return None


def _owner(folder: Path) -> dict[str, Any]:
    try:
        owner = json.loads((folder / "owner.json").read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _alive(process: psutil.Process) -> bool:
    try:
        # `is_running` compares start times as well; a zombie is as good as gone, and only its parent can remove it.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _tree(process: psutil.Process) -> list[psutil.Process]:
    """It and all of its descendants."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _marked(workspace_id: str) -> list[psutil.Process]:
    """Every process that carries the workspace's mark: also those that left their parent and their session."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(_MARK) == workspace_id:
                found.append(process)
    return found


def _wait_gone(processes: list[psutil.Process], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(_alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):  # it is our child only when this control plane started it
        os.waitpid(pid, os.WNOHANG)


def _let_us_in(_function: object, path: str, _error: object) -> None:
    """For `rmtree`, which is then called again: a folder's own user may have left it closed or read-only."""
    for folder in (Path(path), Path(path).parent):
        with suppress(OSError):
            if stat.S_ISDIR(folder.lstat().st_mode):
                folder.chmod(0o700)


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last}" if last else ""
