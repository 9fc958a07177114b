"""The deploy worker: takes jobs of the build stage, turns archives into running applications, keeps them running.

Any number of workers share the load. One that dies is noticed by its lease; the next one ends what it left and builds
again. Folders are only ever touched by workers of the same machine.
"""

import asyncio
import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import structlog
from redis.exceptions import RedisError

from deploy_pipeline.archive_s3 import open_archives
from deploy_pipeline.builders.base import BuildLimits, BuildLog, Release, Runtime
from deploy_pipeline.builders.docker import DockerRuntime
from deploy_pipeline.builders.local import LocalRuntime
from deploy_pipeline.errors import DeployFailed, EngineUnavailable, LostClaim
from deploy_pipeline.jobs import App, DeploymentState, Stage
from deploy_pipeline.queue import LEASE_S, SWEEP_INTERVAL_S, Claim, DeploymentQueue
from deploy_pipeline.releases import DRAIN_S, HEALTHY_WITHIN_S, Releases
from deploy_pipeline.routing import Routes, Target

if TYPE_CHECKING:
    from redis.asyncio import Redis

_ENDED: Final = frozenset(
    {DeploymentState.REPLACED, DeploymentState.FAILED, DeploymentState.CANCELLED, DeploymentState.SUPERSEDED}
)
_BLOCK_S: Final = 2.0  # redis-py's default socket timeout is 5 s
_RETRY_S: Final = 1.0
_SUPERVISE_S: Final = 1.0
_RECONCILE_S: Final = 30.0
# A folder this young may belong to a deployment that another worker is about to record.
_YOUNG_S: Final = 60.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """How a worker works. `data_dir` has `archives/` and `apps/`; the control plane writes archives to the former."""

    runtime: Literal["local", "docker"]
    data_dir: Path
    app_url_template: str  # with "{app}" where the application's name goes
    app_image: str = "code-sessions/app:latest"
    gateway_container: str = ""  # see DockerRuntime
    installation: str = "default"  # labels what this installation's containers belong to
    parallel: int = 2
    healthy_within_s: float = HEALTHY_WITHIN_S
    drain_s: float = DRAIN_S
    lease_s: float = LEASE_S
    archive_url: str = ""  # "s3://bucket/prefix" instead of the folder; see `open_archives`
    archive_endpoint_url: str = ""
    build_allowed_hosts: frozenset[str] = frozenset()  # see BuildLimits

    @property
    def archives_dir(self) -> Path:
        return self.data_dir / "archives"

    @property
    def apps_dir(self) -> Path:
        return self.data_dir / "apps"


class Worker:
    """`run` works until it is cancelled; then jobs in progress are given back and applications go on running."""

    def __init__(self, redis: "Redis", config: WorkerConfig) -> None:
        self._config = config
        self._queue = DeploymentQueue(redis, lease_s=config.lease_s)
        self._runtime = make_runtime(config)
        config.apps_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.releases = Releases(
            self._runtime,
            Routes(redis),
            open_archives(config.archives_dir, config.archive_url, config.archive_endpoint_url),
            config.apps_dir,
            healthy_within_s=config.healthy_within_s,
            drain_s=config.drain_s,
        )
        self._name = f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(3)}"
        self._retiring: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._config.parallel):
                    group.create_task(self._take_jobs(f"{self._name}-{number}"))
                group.create_task(self._every(SWEEP_INTERVAL_S, self._sweep, "sweep"))
                group.create_task(self._look_after_this_machine())
        finally:
            for task in self._retiring:
                task.cancel()  # the next reconciliation finishes what it did not
            await asyncio.gather(*self._retiring, return_exceptions=True)
            await self._runtime.close()

    async def _take_jobs(self, consumer: str) -> None:
        while not _cancelling():
            try:
                claim = await self._queue.take(Stage.BUILD, consumer, block_s=_BLOCK_S)
                if claim is not None:
                    await self._work_on(claim)
            except (RedisError, OSError, EngineUnavailable) as error:
                _log.warning("deploy.worker_waits", error=str(error))
                await asyncio.sleep(_RETRY_S)

    async def _work_on(self, claim: Claim) -> None:
        """Deploy with the lease held. What cannot be ended here is left to whoever takes the job next."""
        log = _log.bind(deployment=claim.deployment_id, app=claim.app_id, attempt=claim.attempt)
        work = asyncio.create_task(self._deploy(claim))
        renewing = asyncio.create_task(self._renew(claim))
        try:
            await asyncio.wait({work, renewing}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                log.warning("deploy.lost")
                return
            work.result()
        except LostClaim:
            log.warning("deploy.lost")
        except asyncio.CancelledError:
            await _cancelled(work)
            with contextlib.suppress(RedisError, OSError):
                await self._queue.release(claim)
            raise
        finally:
            await _cancelled(work)
            await _cancelled(renewing)

    async def _renew(self, claim: Claim) -> None:
        """Returns when the claim is lost. A store out of reach for a moment is no reason to throw a build away."""
        while True:
            await asyncio.sleep(self._config.lease_s / 3)
            try:
                await self._queue.renew(claim)
            except LostClaim:
                return
            except (RedisError, OSError) as error:
                _log.warning("deploy.lease_not_renewed", deployment=claim.deployment_id, error=str(error))

    async def _deploy(self, claim: Claim) -> None:
        """From a stored archive to a running release, or to `failed` with the reason."""
        deployment = claim.deployment
        app = await self._queue.get_app(deployment.organization_id, deployment.app_id)
        if app is None:
            raise LostClaim(deployment.id)
        tail: list[str] = []
        try:
            release = await self._release(claim, app, tail)
        except (LostClaim, RedisError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this deployment and not the worker
            await self._fail(claim, error, tail)
            return
        url = self._config.app_url_template.replace("{app}", app.name)
        await self._queue.finish(claim, DeploymentState.RUNNING, url=url)
        _log.info("deploy.running", deployment=deployment.id, kind=release.plan.kind.value, url=url)
        self._retire_older(release)

    async def _release(self, claim: Claim, app: App, tail: list[str]) -> Release:
        """Unpack, build, start and swap in; `tail` becomes the log lines that say most about where it got to."""
        release = await self.releases.prepare(claim.deployment, app)
        # The same state again: a job that was taken over may be further on already, and never goes back.
        await self._queue.advance(claim, claim.deployment.state, kind=release.plan.kind.value)
        with BuildLog(release.build_log) as build_log:
            try:
                await self.releases.build(release, build_log)
            finally:
                tail[:] = build_log.tail()
        await self._queue.advance(claim, DeploymentState.STARTING, log_tail=tail)
        target = await self._start(release, tail)
        await self._queue.renew(claim)  # traffic moves only under a claim that is still ours
        if not await self.releases.swap(release, target, token=claim.token):
            raise LostClaim(claim.deployment_id)
        return release

    async def _fail(self, claim: Claim, error: Exception, tail: list[str]) -> None:
        log = _log.bind(deployment=claim.deployment_id)
        if isinstance(error, (DeployFailed, EngineUnavailable)):
            reason = str(error)
            log.info("deploy.failed", reason=reason)
        elif isinstance(error, OSError):
            reason = f"The machine that worked on it could not go on: {error.strerror or error}."
            log.error("deploy.failed", reason=str(error))
        else:
            reason = "An internal error ended this deployment; the worker's log has the details."
            log.error("deploy.failed", exc_info=error)
        try:
            await self.releases.discard(claim.app_id, claim.deployment_id)
        except (DeployFailed, EngineUnavailable, OSError) as left:
            log.warning("deploy.left_behind", error=str(left))  # for the next reconciliation
        await self._queue.finish(claim, DeploymentState.FAILED, reason=reason, log_tail=tail)

    async def _start(self, release: Release, tail: list[str]) -> Target:
        try:
            return await self.releases.start(release)
        except DeployFailed:
            tail[:] = await self.releases.log_tail(release) or tail
            raise

    def _retire_older(self, release: Release) -> None:
        async def retire() -> None:
            try:
                await self.releases.retire_older(release)
            except (RedisError, OSError, EngineUnavailable, DeployFailed) as error:
                _log.warning("deploy.old_release_not_removed", app=release.app_id, error=str(error))

        task = asyncio.create_task(retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _sweep(self) -> None:
        await self._queue.sweep()

    async def _look_after_this_machine(self) -> None:
        """Supervise and clean up; only one worker of a machine does, the others wait for its place."""
        with (self._config.apps_dir / ".supervisor").open("w") as file:
            while not _locked(file.fileno()):  # noqa: ASYNC110 - another process holds it: no event to wait for
                await asyncio.sleep(_SUPERVISE_S)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._every(_SUPERVISE_S, self.releases.keep_running, "supervise"))
                group.create_task(self._every(_RECONCILE_S, self._reconcile, "reconcile"))

    async def _reconcile(self) -> None:
        """End what runs or lies here although its deployment has ended: what a crash left in between."""
        serving = await self.releases.serving()
        for app_id, deployment_id in await self.releases.known():
            if deployment_id in serving:
                continue
            deployment = await self._queue.find(deployment_id)
            if deployment is None:
                if _is_young(self._config.apps_dir / app_id / deployment_id):
                    continue
            elif deployment.state not in _ENDED:
                continue
            await self.releases.retire(app_id, deployment_id)

    async def _every(self, interval_s: float, step: Callable[[], Awaitable[None]], name: str) -> None:
        while not _cancelling():
            try:
                await step()
            except (RedisError, OSError, EngineUnavailable, DeployFailed) as error:
                _log.warning("deploy.upkeep_failed", step=name, error=str(error))
            await asyncio.sleep(interval_s)


def make_runtime(config: WorkerConfig) -> Runtime:
    if config.runtime == "docker":
        return DockerRuntime(
            app_image=config.app_image,
            installation=config.installation,
            gateway_container=config.gateway_container,
            build_limits=BuildLimits(allowed_hosts=config.build_allowed_hosts),
        )
    return LocalRuntime(config.apps_dir)


def _cancelling() -> bool:
    """Whether this task was cancelled and something below swallowed it, as `asyncio.wait_for` may before Python 3.12.

    A task group cancels its tasks once and then waits for them.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Cancel and wait until it has ended; how it ended is not asked."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # looked at, or asyncio complains


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_young(folder: Path) -> bool:
    try:
        return time.time() - folder.stat().st_mtime < _YOUNG_S
    except FileNotFoundError:
        return False
