"""Applications as processes of this machine, without isolation: for one's own work, on loopback only."""

import asyncio
import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel

from deploy_pipeline.builders.base import (
    STOP_GRACE_S,
    BuildLimits,
    BuildLog,
    Release,
    RunState,
    Runtime,
    tail_of_file,
    write_atomically,
)
from deploy_pipeline.builders.local_cache import BuildCache, prune
from deploy_pipeline.builders.processes import (
    MARK,
    inherited_environment,
    is_same_process,
    kill_release,
    mark_of,
    marked,
    run_step,
    spawn,
    started_at,
)
from deploy_pipeline.detect import command_line, refusal_by_local_runtime, site_root
from deploy_pipeline.errors import BuildFailed, NotDeployable, StartFailed
from deploy_pipeline.project_settings import Kind
from deploy_pipeline.routing import HttpTarget, StaticTarget, Target

_HOST: Final = "127.0.0.1"
_PORTS: Final = range(20_000, 32_000)  # below Linux's ephemeral ports, so that no outgoing connection takes one
_LOG_CAP_BYTES: Final = 8 * 1024 * 1024
_LOG_KEPT_BYTES: Final = 1024 * 1024
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_STABLE_S: Final = 60.0  # after so long the next crash counts as a first one


class _Process(BaseModel):
    """What a restarted worker has to know of a running release, in `process.json`."""

    pid: int
    started: float
    port: int


@dataclass(slots=True)
class _Restarts:
    """When a crashed release may be started again."""

    pause_s: float = _FIRST_PAUSE_S
    not_before: float = 0.0  # monotonic
    last_start: float = 0.0


class LocalRuntime(Runtime):
    """`apps_dir/<app id>/<deployment id>/` holds `src`, logs and what is known of the process; `builds` beside it what
    several releases share."""

    def __init__(
        self, apps_dir: Path, *, build_limits: BuildLimits | None = None, stop_grace_s: float = STOP_GRACE_S
    ) -> None:
        self._apps_dir = apps_dir
        self._build_limits, self._stop_grace_s = build_limits or BuildLimits(), stop_grace_s
        self._children: dict[str, subprocess.Popen[bytes]] = {}  # to be polled, or they stay zombies
        self._restarts: dict[str, _Restarts] = {}

    async def build(self, release: Release, log: BuildLog) -> None:
        if refusal := refusal_by_local_runtime(release.plan):
            raise NotDeployable(refusal)
        if release.plan.build or release.plan.venv:
            await self._build_or_reuse(release, log)
        if release.plan.kind is Kind.STATIC:
            site_root(release.src, release.plan)

    async def _build_or_reuse(self, release: Release, log: BuildLog) -> None:
        cache = await asyncio.to_thread(BuildCache, release)
        await asyncio.to_thread(cache.begin)
        if await asyncio.to_thread(cache.reuse):
            log.say("Nothing changed since this was built: it is used again.")
            return
        env = release.plan.env | self._environment(release)
        deadline = time.monotonic() + self._build_limits.timeout_s
        has_venv = cache.has_venv
        if has_venv:
            log.say("The dependencies did not change: the virtual environment is used again.")
        elif release.plan.venv:
            # The worker's own interpreter: what `python3` on PATH is may depend on HOME, which is another one here.
            pip = () if any(step[0] == "pip" for step in release.plan.build) else ("--without-pip",)
            command = (sys.executable, "-m", "venv", *pip, str(cache.venv))
            await self._step(command, release, env, log, deadline, shown="python3 -m venv ../venv")
        for step in release.plan.build:
            if step[0] == "pip" and has_venv:
                continue
            if step[:2] in {("npm", "ci"), ("npm", "install")}:
                await self._npm_install(step, release, env, log, deadline, cache)
            else:
                await self._step(step, release, env, log, deadline)
        if release.plan.venv:
            await asyncio.to_thread(cache.keep_venv)
        await asyncio.to_thread(cache.keep_result)

    async def _npm_install(
        self,
        step: tuple[str, ...],
        release: Release,
        env: dict[str, str],
        log: BuildLog,
        deadline: float,
        cache: BuildCache,
    ) -> None:
        if cache.has_modules:
            log.say("The dependencies did not change: node_modules is used again.")
            await asyncio.to_thread(cache.take_modules)
        else:
            await self._step(step, release, env, log, deadline)
            await asyncio.to_thread(cache.keep_modules)

    async def _step(
        self,
        step: tuple[str, ...],
        release: Release,
        env: dict[str, str],
        log: BuildLog,
        deadline: float,
        shown: str = "",
    ) -> None:
        # Looked up here: without a shell, exec searches our PATH and not the release's.
        program = shutil.which(step[0], path=env["PATH"])
        if program is None:
            raise BuildFailed(f"`{step[0]}` is not installed on this machine.")
        await run_step(
            (program, *step[1:]),
            cwd=release.src,
            env=env,
            log=log,
            timeout_s=max(1.0, deadline - time.monotonic()),
            shown=shown or command_line(step),
            limits=self._build_limits,
        )

    async def start(self, release: Release) -> Target:
        if release.plan.kind is Kind.STATIC:
            return StaticTarget(root=str(site_root(release.src, release.plan)))
        return await asyncio.to_thread(self._start, release)

    def _start(self, release: Release) -> HttpTarget:
        port = self._free_port()
        env = (
            {"NODE_ENV": "production"}
            | release.plan.env
            | self._environment(release)
            | {"PORT": str(port), "HOST": _HOST}
        )
        command = release.plan.start_at(_HOST, port)
        program = shutil.which(command[0], path=env["PATH"])
        if program is None:
            raise StartFailed(f"`{command[0]}` is not installed on this machine.")
        try:
            child = spawn((program, *command[1:]), cwd=release.src, env=env, log=_log_of(release))
        except OSError as error:
            raise StartFailed(f"`{' '.join(command)}` could not be started: {error.strerror}") from error
        known = _Process(pid=child.pid, started=started_at(child.pid), port=port)
        write_atomically(release.folder / "process.json", known.model_dump_json())
        self._children[release.deployment_id] = child
        self._restarts.setdefault(release.deployment_id, _Restarts()).last_start = time.monotonic()
        return HttpTarget(host=_HOST, port=port)

    async def state(self, release: Release) -> RunState:
        if release.plan.kind is Kind.STATIC:
            return RunState(running=release.src.is_dir())
        child = self._children.get(release.deployment_id)
        status = child.poll() if child is not None else None
        if status is not None:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            return RunState(running=False, reason=f"it ended with {how}")
        known = _known_process(release.folder)
        if known is None or not is_same_process(known.pid, known.started):
            return RunState(running=False, reason="it is not running")
        return RunState(running=True)

    async def keep_running(self, release: Release) -> Target | None:
        if release.plan.kind is Kind.STATIC:
            return None
        await asyncio.to_thread(_cap_log, _log_of(release))
        restarts = self._restarts.setdefault(release.deployment_id, _Restarts())
        now = time.monotonic()
        if (await self.state(release)).running:
            if now - restarts.last_start > _STABLE_S:
                restarts.pause_s = _FIRST_PAUSE_S
            return None
        if restarts.not_before == 0.0:
            restarts.not_before = now + (restarts.pause_s if restarts.last_start else 0)
            restarts.pause_s = min(restarts.pause_s * 2, _LONGEST_PAUSE_S)
        if now < restarts.not_before:
            return None
        restarts.not_before = 0.0
        # What is left of the crashed one may hold files or memory, and would be counted as running.
        await asyncio.to_thread(kill_release, release.deployment_id, grace_s=0)
        return await asyncio.to_thread(self._start, release)

    async def settle(self, release: Release) -> None:
        pass

    async def stop(self, app_id: str, deployment_id: str) -> None:
        known = _known_process(self._apps_dir / app_id / deployment_id)
        # A process id is only trusted while it is still the same process: ids are used again.
        leader = known.pid if known is not None and is_same_process(known.pid, known.started) else 0
        await asyncio.to_thread(kill_release, deployment_id, leader, grace_s=self._stop_grace_s)
        child = self._children.pop(deployment_id, None)
        if child is not None:
            await asyncio.to_thread(child.wait)
        self._restarts.pop(deployment_id, None)
        (self._apps_dir / app_id / deployment_id / "process.json").unlink(missing_ok=True)

    async def discard(self, app_id: str, deployment_id: str, *, kept: list[Release]) -> None:  # noqa: ARG002 - see base
        await self.stop(app_id, deployment_id)
        await asyncio.to_thread(prune, self._apps_dir / app_id, without=deployment_id)

    async def remove_app(self, app_id: str) -> None:
        pass

    async def log_tail(self, release: Release) -> list[str]:
        return await asyncio.to_thread(tail_of_file, _log_of(release))

    async def running(self) -> set[tuple[str, str]]:
        def find() -> set[tuple[str, str]]:
            marks = {mark_of(process) for process in marked(bool)}
            # Another installation's releases have no folder here: they are none of our business.
            return {(path.parent.name, path.name) for path in self._apps_dir.glob("app_*/dep_*") if path.name in marks}

        return await asyncio.to_thread(find)

    def _environment(self, release: Release) -> dict[str, str]:
        inherited = inherited_environment()
        path = inherited.get("PATH", os.defpath)
        places = [release.folder / "venv" / "bin", release.src / "node_modules" / ".bin"]
        return inherited | {
            "PATH": os.pathsep.join([*(str(place) for place in places), path]),
            "HOME": str(release.folder),
            "LANG": inherited.get("LANG", "C.UTF-8"),
            "PYTHONUNBUFFERED": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            # Shared between releases, so that an unchanged dependency is not fetched again.
            "PIP_CACHE_DIR": str(self._apps_dir / ".cache" / "pip"),
            "npm_config_cache": str(self._apps_dir / ".cache" / "npm"),
            MARK: release.deployment_id,
        }

    def _free_port(self) -> int:
        taken = {known.port for path in self._apps_dir.glob("app_*/dep_*") if (known := _known_process(path))}
        for _ in range(200):
            port = random.choice(_PORTS)  # noqa: S311 - no secret
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((_HOST, port))
                if port not in taken:
                    return port
        raise StartFailed("No free port was found on this machine.")


def _log_of(release: Release) -> Path:
    return release.folder / "app.log"


def _known_process(folder: Path) -> _Process | None:
    try:
        return _Process.model_validate_json((folder / "process.json").read_bytes())
    except (OSError, ValueError):
        return None


def _cap_log(path: Path) -> None:
    """Keep the end of a log that grew too long, in place: the application goes on appending to the same file."""
    with contextlib.suppress(FileNotFoundError):
        size = path.stat().st_size
        if size > _LOG_CAP_BYTES:
            with path.open("r+b") as file:
                file.seek(size - _LOG_KEPT_BYTES)
                end = file.read(_LOG_KEPT_BYTES)
                file.seek(0)
                file.write(end)
                file.truncate()
