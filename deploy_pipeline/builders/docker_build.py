"""One image build on the engine: on a network of its own without a way out but our proxy, and watched while it runs.

The engine's builder takes no limit of processes or CPU time, and does not say why something was killed. So each of its
containers is given its limits when the engine reports it, and what happens to it is remembered for the reason.
"""

import asyncio
import contextlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Final

import docker
from docker.errors import APIError, DockerException, NotFound
from docker.types import IPAMConfig, IPAMPool
from requests.exceptions import RequestException

from deploy_pipeline.builders.base import BuildLimits, BuildLog
from deploy_pipeline.builders.egress import EgressProxy
from deploy_pipeline.builders.processes import MARK, inherited_environment, run_step
from deploy_pipeline.errors import BuildFailed, DeployFailed, EngineUnavailable, StartFailed

# Small ones of our own choice: Docker's default pools hold about thirty networks, then every `create` fails.
_SUBNETS: Final = list(IPv4Network("10.213.0.0/16").subnets(new_prefix=28))
_ATTEMPTS: Final = 20
_CPU_PERIOD_US: Final = 100_000
_LOOK_S: Final = 1.0
_BUILD_NETWORK: Final = "code-sessions-build-"
_REMOVE_S: Final = 10.0
_RETRY_S: Final = 0.2
_CANNOT_FORK: Final = ("Cannot fork", "fork: retry", "Resource temporarily unavailable", "can't start new thread")


@dataclass(frozen=True, slots=True)
class BuildOrder:
    deployment_id: str
    context: Path
    dockerfile: str  # the path of a generated one, which is none of the context, or a name in the context
    tag: str
    labels: dict[str, str]
    apply_dockerignore: bool


async def build_image(
    engine: docker.DockerClient,
    call: Callable[..., Awaitable[Any]],
    order: BuildOrder,
    limits: BuildLimits,
    log: BuildLog,
    own_container: str,
) -> None:
    """`call` runs a blocking function in a thread and translates the engine's errors. Network and proxy are gone when
    this returns or raises.

    Raises:
        BuildFailed: a step failed, was too slow or too greedy.
    """
    async with _network(engine, call, order, own_container) as (network, address):
        proxy = EgressProxy(limits.allowed_hosts, say=log.say)
        watch = _Watch(network, limits)
        try:
            async with proxy.listening(address) as proxy_url:
                await call(watch.start)
                await _run(order, limits, log, network, proxy_url)
        except BuildFailed as error:
            raise BuildFailed(watch.verdict or _with_suspicion(str(error), log, limits)) from error
        except OSError as error:
            raise BuildFailed(
                f"The worker cannot listen on the build's network ({error.strerror}): the engine has to be on the same "
                "machine."
            ) from error
        finally:
            watch.end()


def _with_suspicion(reason: str, log: BuildLog, limits: BuildLimits) -> str:
    """A step that gives up at once when it may not fork is gone before anybody could count."""
    if any(sign in line for line in log.tail() for sign in _CANNOT_FORK):
        return f"{reason} It seems to have started more than {limits.processes} processes at once, its limit."
    return reason


async def _run(order: BuildOrder, limits: BuildLimits, log: BuildLog, network: str, proxy_url: str) -> None:
    told = {
        "path": str(order.context),
        "dockerfile": order.dockerfile,
        "tag": order.tag,
        "labels": order.labels,
        "memory_bytes": limits.memory_bytes,
        "network": network,
        "proxy": proxy_url,
        "apply_dockerignore": order.apply_dockerignore,
    }
    engine_address = {name: value for name, value in os.environ.items() if name.startswith("DOCKER_")}
    env = inherited_environment() | engine_address | {MARK: order.deployment_id}
    command = (sys.executable, "-m", "deploy_pipeline.builders.image_build", json.dumps(told))
    await run_step(command, cwd=order.context, env=env, log=log, timeout_s=limits.timeout_s, shown="docker build")


@asynccontextmanager
async def _network(
    engine: docker.DockerClient, call: Callable[..., Awaitable[Any]], order: BuildOrder, own_container: str
) -> AsyncIterator[tuple[str, str]]:
    """A network for this build: its name, and the worker's address in it."""
    name = build_network_name(order.deployment_id)

    def make() -> str:
        remove_network(engine, name)  # of a worker that died
        create_network(engine, name, order.labels, internal=True)
        network = engine.networks.get(name)
        with contextlib.suppress(NotFound):  # a host name that is no container of this engine
            if own_container:
                network.connect(own_container)
                network.reload()
                for container in network.attrs["Containers"].values():
                    return str(container["IPv4Address"]).partition("/")[0]
        return str(network.attrs["IPAM"]["Config"][0]["Gateway"])

    try:
        yield name, await call(make)
    finally:
        # What cannot be removed now must not hide how the build ended; it goes with the release, or at the next try.
        with contextlib.suppress(DeployFailed, EngineUnavailable):
            await asyncio.shield(asyncio.ensure_future(call(remove_network, engine, name)))


def build_network_name(deployment_id: str) -> str:
    return _BUILD_NETWORK + deployment_id.replace("_", "-")


def create_network(engine: docker.DockerClient, name: str, labels: dict[str, str], *, internal: bool = False) -> None:
    """
    Raises:
        StartFailed: no free addresses were found.
    """
    for _ in range(_ATTEMPTS):
        subnet = random.choice(_SUBNETS)  # noqa: S311 - no secret
        pool = IPAMPool(subnet=str(subnet), gateway=str(subnet.network_address + 1))
        with contextlib.suppress(APIError):
            engine.networks.create(
                name,
                driver="bridge",
                ipam=IPAMConfig(pool_configs=[pool]),
                labels=labels,
                check_duplicate=True,
                internal=internal,
            )
            return
    raise StartFailed("No free network was found.")


def remove_network(engine: docker.DockerClient, name: str) -> None:
    """With the build that is in it; others are only disconnected. Already gone is success."""
    for network in engine.networks.list(names=[f"^{name}$"], greedy=True):
        deadline = time.monotonic() + _REMOVE_S
        while True:
            try:
                _empty(engine, network)
                network.remove()
                break
            except NotFound:
                break
            except APIError:
                # The engine itself is still ending a container of the build, or the builder has just made its last one.
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)


def _empty(engine: docker.DockerClient, network: Any) -> None:
    network.reload()
    for container in network.attrs.get("Containers", {}):
        with contextlib.suppress(NotFound):
            found = engine.containers.get(container)
            if network.name.startswith(_BUILD_NETWORK) and found.attrs["HostConfig"]["NetworkMode"] == network.name:
                found.remove(force=True)
            else:
                network.disconnect(container, force=True)


class _Watch:
    """Follows the engine's events in a thread. `verdict` is why the build was ended, or most likely failed."""

    def __init__(self, network: str, limits: BuildLimits) -> None:
        self._network, self._limits = network, limits
        self._ended = threading.Event()
        self._current = ""
        self._engine: docker.DockerClient | None = None
        self._events: Any = None
        self.verdict = ""

    def start(self) -> None:
        """From now on; returns when no event can be missed any more. Blocking for milliseconds."""
        self._engine = docker.from_env(timeout=60)  # connections of its own, to be closed under the threads' feet
        self._events = self._engine.events(
            decode=True, filters={"type": "container", "event": ["create", "oom", "destroy"]}
        )
        for work in (self._follow, self._look):
            threading.Thread(target=work, name="build-watch", daemon=True).start()

    def end(self) -> None:
        self._ended.set()
        if self._events is not None:
            with contextlib.suppress(Exception):  # it was reading
                self._events.close()

    def _follow(self) -> None:
        assert self._engine is not None
        with contextlib.suppress(DockerException, RequestException, OSError, ValueError, AttributeError):
            for event in self._events:
                if self._ended.is_set():
                    return
                container, action = event.get("id", ""), event.get("Action") or event.get("status")
                if action == "create" and self._is_ours(container):
                    self._current = container
                    self._limit(container)
                elif container == self._current and action == "oom":
                    self.verdict = self._limits.too_much_memory()
                elif container == self._current:
                    self._current = ""

    def _is_ours(self, container: str) -> bool:
        assert self._engine is not None
        try:
            found = self._engine.api.inspect_container(container)
        except (DockerException, RequestException):
            return False
        return bool(found["HostConfig"]["NetworkMode"] == self._network)

    def _limit(self, container: str) -> None:
        """Also while it runs already: the kernel then refuses it the next process."""
        assert self._engine is not None
        api = self._engine.api
        limits = {
            "PidsLimit": self._limits.processes,
            "CpuPeriod": _CPU_PERIOD_US,
            "CpuQuota": int(self._limits.cpus * _CPU_PERIOD_US),
        }
        with contextlib.suppress(DockerException, RequestException):
            # docker-py's own update_container knows no limit of processes.
            api.post(f"{api.base_url}/v{api.api_version}/containers/{container}/update", json=limits).raise_for_status()

    def _look(self) -> None:
        """End what stands at the limit of processes: it would stay there until its time is over."""
        assert self._engine is not None
        while not self._ended.wait(_LOOK_S):
            container = self._current
            if not container:
                continue
            with contextlib.suppress(DockerException, RequestException, KeyError, TypeError):
                usage = self._engine.api.stats(container, stream=False, one_shot=True)
                if usage["pids_stats"].get("current", 0) >= self._limits.processes - 1:
                    self.verdict = self._limits.too_many_processes()
                    self._engine.api.kill(container)
