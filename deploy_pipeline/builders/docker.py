"""Applications as containers: an image for each archive, a hardened container for each release, a network for each app.

Everything that is made carries labels that say what it belongs to. docker-py blocks, so it runs in threads of its own.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, TypeVar

import docker
from docker.errors import APIError, DockerException, NotFound
from docker.types import LogConfig
from requests.exceptions import RequestException

from deploy_pipeline.builders.base import STOP_GRACE_S, BuildLimits, BuildLog, LogPiece, Release, RunState, Runtime
from deploy_pipeline.builders.docker_build import (
    BuildOrder,
    build_image,
    build_network_name,
    create_network,
    remove_network,
)
from deploy_pipeline.builders.dockerfile import HOST, PORT, dockerfile_for
from deploy_pipeline.builders.processes import kill_release
from deploy_pipeline.errors import DeployFailed, EngineUnavailable, StartFailed
from deploy_pipeline.jobs import LOG_TAIL_LINES
from deploy_pipeline.project_settings import Kind
from deploy_pipeline.routing import HttpTarget, Target

_APP: Final = "code-sessions.app"
_DEPLOYMENT: Final = "code-sessions.deployment"
_INSTALLATION: Final = "code-sessions.installation"
_LOOPBACK: Final = "127.0.0.1"
_HOST_PORTS: Final = range(20_000, 32_000)  # below Linux's ephemeral ports
_BUILD_VERSION: Final = 2  # to be raised when `dockerfile_for` makes other images from the same plan
_ATTEMPTS: Final = 20
_ENGINE_TIMEOUT_S: Final = 60
_REMOVAL_S: Final = 30.0
_LOOK_S: Final = 0.1
_FRESH_S: Final = 10.0
_MIB: Final = 1024 * 1024

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class ContainerLimits:
    """What one application container may use."""

    memory_bytes: int = 512 * _MIB
    cpus: float = 1.0
    pids: int = 256


class DockerRuntime(Runtime):
    """`gateway_container` empty: each application is published on a loopback port of this host. Else that container
    is joined to each application's network, and routes lead to the application's container by its name."""

    def __init__(
        self,
        *,
        app_image: str,
        installation: str,
        gateway_container: str = "",
        limits: ContainerLimits | None = None,
        build_limits: BuildLimits | None = None,
        stop_grace_s: float = STOP_GRACE_S,
    ) -> None:
        self._app_image, self._installation, self._gateway = app_image, installation, gateway_container
        self._limits = limits or ContainerLimits()
        self._build_limits, self._stop_grace_s = build_limits or BuildLimits(), stop_grace_s
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="docker")
        self._client: docker.DockerClient | None = None

    async def build(self, release: Release, log: BuildLog) -> None:
        tag = await self._call(self._tag_of, release)
        if await self._call(self._has_image, tag):
            log.say("Nothing changed since this was built: the image is used again.")
            return
        generated = await asyncio.to_thread(self._generated, release)
        dockerfile = "Dockerfile"
        if generated:
            dockerfile = str(release.folder / "Dockerfile")  # beside the context, which stays as it was unpacked
            await asyncio.to_thread(Path(dockerfile).write_text, generated)
        order = BuildOrder(
            deployment_id=release.deployment_id,
            context=release.src,
            dockerfile=dockerfile,
            tag=tag,
            labels=self._labels(release.app_id),
            apply_dockerignore=not generated,
        )
        await build_image(self._engine, self._call, order, self._build_limits, log, _own_container())

    async def image_of(self, release: Release) -> str:
        return await self._call(lambda: str(self._engine.images.get(self._tag_of(release)).id))

    async def start(self, release: Release, env: Mapping[str, str]) -> Target:
        return await self._call(self._start, release, env)

    async def state(self, release: Release) -> RunState:
        return await self._call(self._state, release)

    async def settle(self, release: Release) -> None:
        def settle() -> None:
            # Only now: while it starts, a crash has to be seen and not repeated.
            policy: Any = {"Name": "unless-stopped"}
            self._engine.containers.get(_container_name(release.deployment_id)).update(restart_policy=policy)

        await self._call(settle)
        # The files are in the image; what stays is the release's record and build log.
        await asyncio.to_thread(_remove_folder, release.src)

    async def stop(self, app_id: str, deployment_id: str) -> None:  # noqa: ARG002 - the id says it all
        await asyncio.to_thread(kill_release, deployment_id, grace_s=0)  # a build of a worker that died
        await self._call(remove_network, self._engine, build_network_name(deployment_id))
        await self._call(self._stop, deployment_id)

    async def discard(self, app_id: str, deployment_id: str, *, kept: list[Release]) -> None:
        await self.stop(app_id, deployment_id)
        await self._call(self._remove_images, app_id, kept)
        if not kept:
            await self._call(remove_network, self._engine, _network_name(app_id))

    async def remove_app(self, app_id: str) -> None:
        await self._call(self._remove_images, app_id, [])
        await self._call(remove_network, self._engine, _network_name(app_id))

    async def log_tail(self, release: Release) -> list[str]:
        def read() -> list[str]:
            try:
                container = self._engine.containers.get(_container_name(release.deployment_id))
            except NotFound:
                return []
            return container.logs(tail=LOG_TAIL_LINES).decode("utf-8", "replace").splitlines()

        return await self._call(read)

    async def read_log(self, release: Release, position: str, *, max_bytes: int) -> LogPiece:
        return await self._call(self._read_log, release, position, max_bytes)

    async def running(self) -> set[tuple[str, str]]:
        def find() -> set[tuple[str, str]]:
            # Workspaces carry the installation's label, too.
            filters: Any = {"label": [self._ours(), _APP, _DEPLOYMENT]}
            containers = self._engine.containers.list(all=True, filters=filters, ignore_removed=True)
            return {(item.labels[_APP], item.labels[_DEPLOYMENT]) for item in containers}

        return await self._call(find)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    # Blocking, in the threads of the runtime

    async def _call(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        except APIError as error:
            if error.is_server_error() or error.is_client_error():
                raise DeployFailed(f"The container engine refused: {error.explanation or error}") from error
            raise
        except (DockerException, RequestException) as error:
            raise EngineUnavailable(f"The container engine cannot be reached: {error}") from error

    @property
    def _engine(self) -> docker.DockerClient:
        if self._client is None:
            self._client = docker.from_env(timeout=_ENGINE_TIMEOUT_S, max_pool_size=8)
        return self._client

    def _ours(self) -> str:
        return f"{_INSTALLATION}={self._installation}"

    def _labels(self, app_id: str) -> dict[str, str]:
        return {_APP: app_id, _INSTALLATION: self._installation}

    def _generated(self, release: Release) -> str:
        """The Dockerfile of a project without one of its own; empty for others."""
        if release.plan.kind is Kind.DOCKERFILE:
            return ""
        return dockerfile_for(release.plan, release.src, self._app_image)

    def _tag_of(self, release: Release) -> str:
        """Same files, same plan, same base image: same tag."""
        base = ""
        if release.plan.kind is not Kind.DOCKERFILE:
            image_id = str(self._engine.images.get(self._app_image).id)
            # A newer version of this program may make another plan, or run it otherwise, from the same files.
            made = f"{_BUILD_VERSION} {image_id} {sorted(dataclasses.asdict(release.plan).items())}"
            base = "-" + hashlib.sha256(made.encode()).hexdigest()[:12]
        return _tag_without_base(release) + base

    def _has_image(self, tag: str) -> bool:
        try:
            self._engine.images.get(tag)
        except NotFound:
            return False
        return True

    def _start(self, release: Release, env: Mapping[str, str]) -> HttpTarget:
        tag = release.image or self._tag_of(release)
        port = release.plan.port or self._port_of(tag)
        network = self._network(release.app_id)
        name = _container_name(release.deployment_id)
        self._stop(release.deployment_id)  # what a worker that died had started
        for _ in range(_ATTEMPTS):
            host_port = random.choice(_HOST_PORTS)  # noqa: S311 - no secret
            published = {} if self._gateway else {f"{port}/tcp": (_LOOPBACK, host_port)}
            container = self._engine.containers.create(
                tag, name=name, network=network, ports=published, **self._hardening(release, port, env)
            )
            try:
                container.start()
            except APIError as error:
                container.remove(force=True)
                if "port is already allocated" in str(error) or "address already in use" in str(error):
                    continue
                raise StartFailed(f"The container could not be started: {error.explanation}") from error
            return HttpTarget(host=name, port=port) if self._gateway else HttpTarget(host=_LOOPBACK, port=host_port)
        raise StartFailed("No free port was found on this machine.")

    def _hardening(self, release: Release, port: int, env: Mapping[str, str]) -> dict[str, Any]:
        own_start: dict[str, Any] = {}
        if release.plan.kind is Kind.DOCKERFILE and release.plan.start:
            program, *arguments = release.plan.start_at(HOST, port)
            own_start = {"entrypoint": [program], "command": arguments}  # an entry point of the image's is not wanted
        return own_start | {
            "environment": release.plan.env | dict(env) | {"PORT": str(port), "HOST": HOST},
            "labels": self._labels(release.app_id) | {_DEPLOYMENT: release.deployment_id},
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "mem_limit": self._limits.memory_bytes,
            "memswap_limit": self._limits.memory_bytes,
            "nano_cpus": int(self._limits.cpus * 1e9),
            "pids_limit": self._limits.pids,
            "init": True,
            "log_config": LogConfig(type="json-file", config={"max-size": "8m", "max-file": "2"}),
        }

    def _port_of(self, tag: str) -> int:
        """The one port that the image exposes, else the usual one."""
        exposed = self._engine.images.get(tag).attrs["Config"].get("ExposedPorts") or {}
        ports = [int(name.removesuffix("/tcp")) for name in exposed if name.endswith("/tcp")]
        return ports[0] if len(ports) == 1 else PORT

    def _network(self, app_id: str) -> str:
        """The application's network, made when it is not there yet, with everybody in it who has to reach it."""
        name = _network_name(app_id)
        if not self._engine.networks.list(names=[f"^{name}$"]):
            create_network(self._engine, name, self._labels(app_id))
        if self._gateway:
            self._join(name, self._gateway)
            if own := _own_container():
                with contextlib.suppress(NotFound):  # a host name that was set by hand
                    self._join(name, own)
        return name

    def _join(self, network: str, container: str) -> None:
        try:
            self._engine.networks.get(network).connect(container)
        except APIError as error:
            if "already exists" not in str(error):  # it is in there
                raise

    def _state(self, release: Release) -> RunState:
        try:
            attributes = self._engine.containers.get(_container_name(release.deployment_id)).attrs
        except NotFound:
            return RunState(running=False, reason="its container is gone")
        state, restarts = attributes["State"], attributes.get("RestartCount", 0)
        if state["Running"] and not state["Restarting"]:
            # Once it is up again, its record says nothing any more of how it ended.
            reason = self._last_end(release) if restarts and _age_s(state["StartedAt"]) < _FRESH_S else ""
            return RunState(running=True, reason=reason, restarts=restarts)
        reason = "it ran out of memory" if state["OOMKilled"] else f"it ended with status {state['ExitCode']}"
        return RunState(running=False, reason=reason, restarting=bool(state["Restarting"]), restarts=restarts)

    def _last_end(self, release: Release) -> str:
        """How the container ended last, as the engine's events of the last minute say; empty when they do not."""
        now = int(time.time())
        wanted: Any = {"container": _container_name(release.deployment_id), "event": "die"}
        ends = list(self._engine.events(since=now - 60, until=now, filters=wanted, decode=True))
        status = ends[-1].get("Actor", {}).get("Attributes", {}).get("exitCode", "") if ends else ""
        return f"it ended with status {status}" if status else ""

    def _read_log(self, release: Release, position: str, max_bytes: int) -> LogPiece:
        """A position is the engine's time of the last line read, to the nanosecond."""
        # Ten microseconds earlier: a float cannot name a nanosecond, and what was seen is passed over.
        since: Any = _seconds(position) - 1e-5 if position else None
        try:
            container = self._engine.containers.get(_container_name(release.deployment_id))
            lines: Any = container.logs(timestamps=True, stream=True, follow=False, since=since)
        except NotFound:
            return LogPiece(b"", position)
        data, last = bytearray(), position
        for line in _whole_lines(lines):
            at, _, text = line.partition(b" ")
            if (found := at.decode("ascii", "replace")) > position:
                data, last = data + text, found
            if len(data) >= max_bytes:
                break
        return LogPiece(bytes(data), last)

    def _stop(self, deployment_id: str) -> None:
        deadline = time.monotonic() + self._stop_grace_s + _REMOVAL_S
        while True:
            try:
                container = self._engine.containers.get(_container_name(deployment_id))
                container.stop(timeout=int(self._stop_grace_s))
                container.remove(v=True, force=True)
            except NotFound:
                return
            except APIError as error:
                # Somebody else is removing it just now: wait until that is done.
                if error.status_code != HTTPStatus.CONFLICT or time.monotonic() > deadline:
                    raise
            time.sleep(_LOOK_S)

    def _remove_images(self, app_id: str, kept: list[Release]) -> None:
        wanted = tuple(_tag_without_base(release) for release in kept)  # also when the base image changed since
        for image in self._engine.images.list(name=_repository(app_id)):
            for tag in image.tags:
                if tag.startswith(f"{_repository(app_id)}:") and not tag.startswith(wanted):
                    try:
                        self._engine.images.remove(tag)
                    except NotFound:
                        pass
                    except APIError as error:
                        if error.status_code != HTTPStatus.CONFLICT:  # a container still uses it: the next time
                            raise


def _container_name(deployment_id: str) -> str:
    """Also a host name in the application's network, so without an underscore."""
    return "code-sessions-" + deployment_id.replace("_", "-")


def _whole_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _age_s(timestamp: str) -> float:
    return time.time() - _seconds(timestamp)


def _seconds(timestamp: str) -> float:
    """Of the engine's `2026-11-22T19:39:40.123456789Z`, since 1970."""
    whole, _, fraction = timestamp.removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


def _network_name(app_id: str) -> str:
    return "code-sessions-" + app_id.replace("_", "-")


def _repository(app_id: str) -> str:
    return "code-sessions-apps/" + app_id.replace("_", "-")


def _tag_without_base(release: Release) -> str:
    return f"{_repository(release.app_id)}:{release.archive_sha256[:32]}-{release.plan.kind}"


def _own_container() -> str:
    """The container that this worker runs in, which has to reach the application to see whether it is healthy."""
    return socket.gethostname() if Path("/.dockerenv").exists() else ""


def _remove_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
