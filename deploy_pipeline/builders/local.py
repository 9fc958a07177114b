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
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel

from deploy_pipeline.builders.base import (
    STOP_GRACE_S,
    BuildLimits,
    BuildLog,
    LogPiece,
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
from deploy_pipeline.logs import complete_utf8
from deploy_pipeline.project_settings import Kind
from deploy_pipeline.routing import HttpTarget, StaticTarget, Target

_HOST: Final = "127.0.0.1"
_PORTS: Final = range(20_000, 32_000)  # below Linux's ephemeral ports, so that no outgoing connection takes one
_LOG_CAP_BYTES: Final = 8 * 1024 * 1024


class _Process(BaseModel):
    """What a restarted worker has to know of a running release, in `process.json`."""

    pid: int
    started: float
    port: int


class LocalRuntime(Runtime):
    """`apps_dir/<app id>/<deployment id>/` holds `src`, logs and what is known of the process; `builds` beside it what
    several releases share."""

    def __init__(
        self, apps_dir: Path, *, build_limits: BuildLimits | None = None, stop_grace_s: float = STOP_GRACE_S
    ) -> None:
        self._apps_dir = apps_dir
        self._build_limits, self._stop_grace_s = build_limits or BuildLimits(), stop_grace_s
        self._children: dict[str, subprocess.Popen[bytes]] = {}  # to be polled, or they stay zombies

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

    async def start(self, release: Release, env: Mapping[str, str]) -> Target:
        if release.plan.kind is Kind.STATIC:
            return StaticTarget(root=str(site_root(release.src, release.plan)))
        # What is left of one that crashed may hold files or memory, and would be counted as running.
        await asyncio.to_thread(kill_release, release.deployment_id, grace_s=0)
        return await asyncio.to_thread(self._start, release, env)

    def _start(self, release: Release, owners: Mapping[str, str]) -> HttpTarget:
        port = self._free_port()
        ours = self._environment(release)
        env = (
            {"NODE_ENV": "production"}
            | release.plan.env
            | ours
            | dict(owners)
            | {"PORT": str(port), "HOST": _HOST, MARK: ours[MARK]}
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
        return HttpTarget(host=_HOST, port=port)

    async def state(self, release: Release) -> RunState:
        if release.plan.kind is Kind.STATIC:
            return RunState(running=release.src.is_dir())
        child = self._children.get(release.deployment_id)
        status = child.poll() if child is not None else None
        known = _known_process(release.folder)
        # Another worker that took over may have started it again since: then the end of our own child says nothing.
        if child is not None and status is not None and (known is None or known.pid == child.pid):
            how = f"signal {-status}" if status < 0 else f"status {status}"
            return RunState(running=False, reason=f"it ended with {how}")
        if known is None or not is_same_process(known.pid, known.started):
            return RunState(running=False, reason="it is not running")
        return RunState(running=True)

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
        (self._apps_dir / app_id / deployment_id / "process.json").unlink(missing_ok=True)

    async def discard(self, app_id: str, deployment_id: str, *, kept: list[Release]) -> None:  # noqa: ARG002 - see base
        await self.stop(app_id, deployment_id)
        await asyncio.to_thread(prune, self._apps_dir / app_id, without=deployment_id)

    async def remove_app(self, app_id: str) -> None:
        pass

    async def log_tail(self, release: Release) -> list[str]:
        return await asyncio.to_thread(tail_of_file, _log_of(release))

    async def read_log(self, release: Release, position: str, *, max_bytes: int) -> LogPiece:
        return await asyncio.to_thread(_read_log, _log_of(release), int(position or 0), max_bytes)

    async def running(self) -> set[tuple[str, str]]:
        def find() -> set[tuple[str, str]]:
            marks = {mark_of(process) for process in marked(bool)}
            # Another installation's releases have no folder here: they are none of our business.
            return {(path.parent.name, path.name) for path in self._apps_dir.glob("app_*/dep_*") if path.name in marks}

        return await asyncio.to_thread(find)

    def _environment(self, release: Release) -> dict[str, str]:
        inherited = inherited_environment()
        path = inherited.get("PATH", os.defpath)
        places = [release.built / "venv" / "bin", release.src / "node_modules" / ".bin"]
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


def _read_log(path: Path, position: int, max_bytes: int) -> LogPiece:
    """The application appends to the same file as long as it runs, so a file that is long and copied is emptied in
    place. What it writes in that very moment is lost.
    """
    try:
        size = path.stat().st_size
        if size < position:
            return LogPiece(b"", "0")  # it was emptied; said in a step of its own, so that it is said once
        skipped = size - position > _LOG_CAP_BYTES
        if skipped or (size == position and size > _LOG_CAP_BYTES // 2):
            os.truncate(path, 0)
            return LogPiece(b"", "0", skipped=skipped)
        with path.open("rb") as file:
            file.seek(position)
            data = file.read(max_bytes)
    except FileNotFoundError:
        return LogPiece(b"", str(position) if position else "")
    data = data[: complete_utf8(data)]
    return LogPiece(data, str(position + len(data)) if data or position else "")
