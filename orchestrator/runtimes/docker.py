"""Workspaces as Docker containers: one container and one volume each, named after the workspace and labelled."""

import asyncio
import math
import os
from collections.abc import Coroutine
from typing import Any, Final

import docker
import structlog
from docker.errors import APIError, ImageNotFound, NotFound

from orchestrator.errors import RuntimeUnavailable
from orchestrator.ids import is_id
from orchestrator.runtimes.base import (
    WorkspaceRuntime,
    WorkspaceSpec,
    WorkspaceStartFailed,
    WorkspaceState,
    WorkspaceStatus,
)
from orchestrator.runtimes.docker_container import (
    LABEL_INSTALLATION,
    LABEL_SESSION,
    LABEL_WORKSPACE,
    ContainerPlan,
    container_name,
    create_body,
    link_refusal,
    status_of,
)
from orchestrator.runtimes.docker_engine import Engine, reason_of
from orchestrator.runtimes.docker_network import NETWORK, ensure_network
from orchestrator.settings import WorkspaceLimits

CHECK_TIMEOUT_S: Final = 2.0
CALL_TIMEOUT_S: Final = 60.0  # twenty workspaces started at once on two cores took 5.4 s
CLOSE_TIMEOUT_S: Final = 15.0  # whoever asks us to stop kills us soon after that
REMOVE_TIMEOUT_S: Final = 60.0  # on top of the grace period
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_CONFLICT: Final = 409

_log = structlog.get_logger(__name__)


class _NameTaken(WorkspaceStartFailed):
    """A workspace of this id is there already, and is not ours to remove."""


class DockerRuntime(WorkspaceRuntime):
    """See `WorkspaceRuntime` for what each call promises.

    Args:
        image: of the workspaces; it has to be there, nothing is pulled.
        link_mount: what is mounted as the folder of the link's sockets: a host folder (absolute) or a volume's name.
        installation: several control planes may share an engine; each sees only what carries its own value.
    """

    def __init__(
        self, *, image: str, limits: WorkspaceLimits, link_mount: str, installation: str, network: str = NETWORK
    ) -> None:
        self._plan = ContainerPlan(installation=installation, image=image, limits=limits, link_mount=link_mount)
        self._network = network
        self._network_id = ""
        self._link_checked = False
        self._engine = Engine(timeout_s=CALL_TIMEOUT_S, threads=32)
        self._prompt_engine = Engine(
            timeout_s=CHECK_TIMEOUT_S, threads=2
        )  # answers while the other one is busy or stuck
        self._starts: dict[str, asyncio.Task[None]] = {}
        self._unwanted: set[str] = set()  # workspaces that are being stopped while they start
        self._tasks: set[asyncio.Task[Any]] = set()

    async def check(self) -> None:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await self._prompt_engine.call(lambda client: client.inspect_image(self._plan.image))  # type: ignore[no-untyped-call]
                await self._check_link()
        except ImageNotFound:
            detail = f"The image {self._plan.image} is missing on the Docker engine: run script/build-images"
            raise RuntimeUnavailable(detail) from None
        except APIError as error:
            raise RuntimeUnavailable(f"The Docker engine is not well: {reason_of(error)}") from error
        except TimeoutError:
            raise RuntimeUnavailable(f"The Docker engine does not answer within {CHECK_TIMEOUT_S:g} s") from None

    async def _check_link(self) -> None:
        if self._link_checked or not self._plan.link_mount.startswith("/"):
            return
        info = await self._prompt_engine.call(lambda client: client.info())
        if refusal := link_refusal(info.get("SecurityOptions") or [], os.getuid()):
            raise RuntimeUnavailable(refusal)
        self._link_checked = True

    async def start(self, spec: WorkspaceSpec) -> None:
        if spec.workspace_id in self._starts:
            raise _NameTaken(f"{spec.workspace_id} is being started already")
        attempt = self._own(self._start_or_remove(spec))
        self._starts[spec.workspace_id] = attempt
        attempt.add_done_callback(lambda _: self._starts.pop(spec.workspace_id, None))
        try:
            # A thread that talks to the engine cannot be interrupted. So a cancelled start goes on until it can be
            # undone, even when the caller does not wait for that.
            await asyncio.shield(attempt)
        except asyncio.CancelledError:
            await asyncio.shield(self._own(self._undo(attempt, spec.workspace_id)))
            raise

    async def stop(self, workspace_id: str, *, grace_s: float) -> None:
        if not is_id(workspace_id, "ws"):
            return  # nothing of ours has such a name, and it does not go into the engine's URLs
        if (attempt := self._starts.get(workspace_id)) is not None:
            self._unwanted.add(workspace_id)
            await asyncio.wait({attempt})
            self._unwanted.discard(workspace_id)
        await self._remove(workspace_id, grace_s)

    async def status(self, workspace_id: str) -> WorkspaceStatus:
        if not is_id(workspace_id, "ws"):
            return WorkspaceStatus(WorkspaceState.GONE)
        name = container_name(workspace_id)
        try:
            container = await self._engine.call(lambda client: client.inspect_container(name))
        except NotFound:
            return await self._status_without_container(name)
        except APIError as error:
            raise RuntimeUnavailable(f"The Docker engine is not well: {reason_of(error)}") from error
        return status_of(container["State"], self._plan.limits)

    async def list_workspaces(self) -> dict[str, str]:
        filters = {"label": [f"{LABEL_INSTALLATION}={self._plan.installation}", LABEL_WORKSPACE]}

        def every(client: docker.APIClient) -> list[dict[str, str]]:
            # Volumes first: a workspace made between the two calls is then seen by its container.
            volumes = client.volumes(filters=filters)["Volumes"] or []
            containers = client.containers(all=True, filters=filters)
            return [thing["Labels"] for thing in (*volumes, *containers)]

        try:
            found = await self._engine.call(every)
        except APIError as error:
            raise RuntimeUnavailable(f"The Docker engine is not well: {reason_of(error)}") from error
        return {labels[LABEL_WORKSPACE]: labels.get(LABEL_SESSION, "") for labels in found}

    async def close(self) -> None:
        """Let starts and removals that nobody waits for any more end, then release clients and threads."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S)
        self._engine.close()
        self._prompt_engine.close()

    async def _start_or_remove(self, spec: WorkspaceSpec) -> None:
        try:
            await self._start(spec)
        except _NameTaken:
            raise
        except BaseException:
            await self._remove_or_log(spec.workspace_id)
            raise

    async def _undo(self, attempt: asyncio.Task[None], workspace_id: str) -> None:
        self._unwanted.add(workspace_id)
        await asyncio.wait({attempt})
        self._unwanted.discard(workspace_id)
        await self._remove_or_log(workspace_id)

    async def _remove_or_log(self, workspace_id: str) -> None:
        try:
            await self._remove(workspace_id, grace_s=0)
        except RuntimeUnavailable as error:
            # Without an engine nothing can be removed; the reconciler finds it by its labels.
            _log.warning("workspace not removed", workspace=workspace_id, reason=error.detail)

    async def _start(self, spec: WorkspaceSpec) -> None:
        try:
            try:
                await self._create_and_start(spec)
            except NotFound as error:
                if "network" not in reason_of(error):
                    raise
                # `docker network prune` takes ours away when no workspace runs.
                self._network_id = ""
                await self._remove(spec.workspace_id, grace_s=0)
                await self._create_and_start(spec)
            await self._refuse_crashed(container_name(spec.workspace_id))
        except ImageNotFound:
            detail = f"The image {self._plan.image} is missing on the Docker engine: run script/build-images"
            raise WorkspaceStartFailed(detail) from None
        except APIError as error:
            raise WorkspaceStartFailed(f"The Docker engine refused: {reason_of(error)}") from error

    async def _create_and_start(self, spec: WorkspaceSpec) -> None:
        if not self._network_id:
            self._network_id = await self._engine.call(lambda client: ensure_network(client, self._network))
        body = create_body(self._plan, spec, self._network_id)
        name = container_name(spec.workspace_id)
        try:
            await self._engine.call(lambda client: client.create_container_from_config(body, name))  # type: ignore[no-untyped-call]
        except APIError as error:
            if error.status_code == _CONFLICT:
                raise _NameTaken(f"{spec.workspace_id} exists already: {reason_of(error)}") from error
            raise
        self._refuse_unwanted(spec.workspace_id)
        await self._engine.call(lambda client: client.start(name))
        self._refuse_unwanted(spec.workspace_id)

    def _refuse_unwanted(self, workspace_id: str) -> None:
        if workspace_id in self._unwanted:
            raise WorkspaceStartFailed("It was stopped while it was starting")

    async def _refuse_crashed(self, name: str) -> None:
        container = await self._engine.call(lambda client: client.inspect_container(name))
        status = status_of(container["State"], self._plan.limits)
        if status.state is WorkspaceState.RUNNING:
            return
        log = await self._engine.call(lambda client: client.logs(name, tail=5))
        lines = [line.strip() for line in log.decode(errors="replace").splitlines() if line.strip()]
        raise WorkspaceStartFailed(f"The workspace {status.reason}" + (f": {lines[-1][:200]}" if lines else ""))

    async def _status_without_container(self, name: str) -> WorkspaceStatus:
        try:
            await self._engine.call(lambda client: client.inspect_volume(name))
        except NotFound:
            return WorkspaceStatus(WorkspaceState.GONE)
        except APIError as error:
            raise RuntimeUnavailable(f"The Docker engine is not well: {reason_of(error)}") from error
        return WorkspaceStatus(WorkspaceState.STOPPED, "its container was removed from outside")

    async def _remove(self, workspace_id: str, grace_s: float) -> None:
        """Stop and remove until the engine says that nothing of it is there.

        Raises:
            RuntimeUnavailable: the engine cannot be reached, or did not manage it in time.
        """
        name = container_name(workspace_id)
        if grace_s > 0:
            await self._engine.call(lambda client: _stop(client, name, math.ceil(grace_s)))
        loop = asyncio.get_running_loop()
        give_up_at, pause_s = loop.time() + REMOVE_TIMEOUT_S, _FIRST_PAUSE_S
        while left := await self._engine.call(lambda client: _remove_all_of(client, name)):
            if loop.time() > give_up_at:
                raise RuntimeUnavailable(f"The Docker engine did not remove {workspace_id}: {left}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._disown)
        return task

    def _disown(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller, who may have been cancelled, is the one to be told


def _stop(client: docker.APIClient, name: str, grace_s: int) -> None:
    try:
        client.stop(name, timeout=grace_s)
    except NotFound:
        pass
    except APIError as error:
        # Not the end: the container is removed with force next.
        _log.warning("workspace not stopped in order", container=name, reason=reason_of(error))


def _remove_all_of(client: docker.APIClient, name: str) -> str:
    """Try to remove container and volume; what is still in the way, or "" when both are confirmed gone."""
    try:
        client.remove_container(name, force=True, v=True)
    except NotFound:
        pass
    except APIError as error:  # a conflict when another caller is removing it: it is gone at one of the next tries
        return reason_of(error)
    try:
        client.remove_volume(name)
    except NotFound:
        pass
    except APIError as error:
        return reason_of(error)
    return ""
