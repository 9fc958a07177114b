"""The deploy worker: takes jobs of the build stage, turns archives into running applications, keeps them running.

Any number of workers share the load. One that dies is noticed by its lease; the next one ends what it left and builds
again. Folders are only ever touched by workers of the same machine.
"""

import asyncio
import contextlib
import fcntl
import os
import secrets
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
from deploy_pipeline.errors import CancelRequested, DeployFailed, EngineUnavailable, LostClaim
from deploy_pipeline.housekeeping import Housekeeping
from deploy_pipeline.jobs import App, DeploymentState, Stage
from deploy_pipeline.logs import Log, LogStore, LogWriter, deployment_log
from deploy_pipeline.orders import Orders
from deploy_pipeline.queue import EXHAUSTED, LEASE_S, SWEEP_INTERVAL_S, Claim, DeploymentQueue
from deploy_pipeline.releases import DRAIN_S, HEALTHY_WITHIN_S, Releases
from deploy_pipeline.routing import Routes, Target
from deploy_pipeline.supervisor import Supervisor
from deploy_pipeline.tasks import end_task, is_cancelled

if TYPE_CHECKING:
    from redis.asyncio import Redis

_BLOCK_S: Final = 2.0  # redis-py's default socket timeout is 5 s
_RETRY_S: Final = 1.0
_CLEAN_UP_S: Final = 15.0  # what a build may need to end its processes
_SUPERVISE_S: Final = 1.0
_OBEY_S: Final = 0.2
_RECONCILE_S: Final = 30.0

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
        self._logs, self._routes, self._orders = LogStore(redis), Routes(redis), Orders(redis)
        config.apps_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        archives = open_archives(config.archives_dir, config.archive_url, config.archive_endpoint_url)
        self.releases = Releases(
            self._runtime,
            self._routes,
            self._orders,
            self._logs,
            archives,
            config.apps_dir,
            healthy_within_s=config.healthy_within_s,
            drain_s=config.drain_s,
        )
        self._name = f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(3)}"
        self.supervisor = Supervisor(self.releases, self._routes, self._orders)
        self.housekeeping = Housekeeping(
            self._queue, self.releases, archives, apps_dir=config.apps_dir, drain_s=config.drain_s
        )
        self._retiring: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._config.parallel):
                    group.create_task(self._take_jobs(Stage.BUILD, f"{self._name}-{number}"))
                group.create_task(self._take_jobs(Stage.START, self._name))
                group.create_task(self._every(min(SWEEP_INTERVAL_S, self._config.lease_s / 2), self._sweep, "sweep"))
                group.create_task(self._look_after_this_machine())
        finally:
            for task in self._retiring:
                task.cancel()  # the next reconciliation finishes what it did not
            await asyncio.gather(*self._retiring, return_exceptions=True)
            await self._runtime.close()

    async def _take_jobs(self, stage: Stage, consumer: str) -> None:
        while not is_cancelled():
            try:
                claim = await self._queue.take(stage, consumer, block_s=_BLOCK_S)
                if claim is not None:
                    await self._work_on(claim)
            except (RedisError, OSError, EngineUnavailable, DeployFailed) as error:
                _log.warning("deploy.worker_waits", error=str(error))
                await asyncio.sleep(_RETRY_S)

    async def _work_on(self, claim: Claim) -> None:
        """Deploy with the lease held. What cannot be ended here is left to whoever takes the job next."""
        log = _log.bind(deployment=claim.deployment_id, app=claim.app_id, attempt=claim.attempt)
        work = asyncio.create_task(self._deploy(claim))
        holding = asyncio.create_task(self._queue.hold(claim))
        try:
            await asyncio.wait({work, holding}, return_when=asyncio.FIRST_COMPLETED)
            await (work if work.done() else holding)
        except LostClaim:
            log.warning("deploy.lost")
        except CancelRequested:
            await end_task(work, again_s=_CLEAN_UP_S)
            with contextlib.suppress(LostClaim):  # it had just ended by itself
                await self._cancel(claim)
        except asyncio.CancelledError:
            await end_task(work, again_s=_CLEAN_UP_S)
            with contextlib.suppress(RedisError, OSError):
                await self._queue.release(claim)
            raise
        finally:
            await end_task(work, again_s=_CLEAN_UP_S)
            await end_task(holding)

    async def _cancel(self, claim: Claim) -> None:
        """End all that runs for the deployment, see that it is gone, and only then say so.

        When that fails, the lease runs out, and the next consumer tries again.
        """
        with contextlib.suppress(CancelRequested):
            await self._queue.renew(claim)
        if claim.deployment_id in await self.releases.serving():
            await self._say_running(claim)  # the traffic had moved before anybody looked: too late to cancel
            return
        holding = asyncio.create_task(self._hold_to_the_end(claim))
        try:
            await self.releases.discard(claim.app_id, claim.deployment_id)
        finally:
            await end_task(holding)
        await self._queue.finish(claim, DeploymentState.CANCELLED)
        _log.info("deploy.cancelled", deployment=claim.deployment_id)

    async def _hold_to_the_end(self, claim: Claim) -> None:
        """Hold the lease of a job that is being ended."""
        while True:
            with contextlib.suppress(RedisError, OSError, CancelRequested):
                await self._queue.renew(claim)
            await asyncio.sleep(self._config.lease_s / 3)

    async def _deploy(self, claim: Claim) -> None:
        """From a stored archive to a running release, or to `failed` with the reason."""
        deployment = claim.deployment
        if deployment.id in await self.releases.serving():
            await self._say_running(claim)  # an earlier worker moved the traffic and died before it could say so
            return
        if deployment.cancel_requested:
            raise CancelRequested(deployment.id)
        if claim.exhausted:
            await self._fail(claim, DeployFailed(EXHAUSTED), [])
            return
        app = await self._queue.get_app(deployment.organization_id, deployment.app_id)
        if app is None:
            raise LostClaim(deployment.id)
        tail: list[str] = []
        failure: Exception | None = None
        async with deployment_log(self._logs, Log(app.id, deployment.id), fence=claim.token) as log:
            try:
                release = await self._release(claim, app, tail, log)
            except (LostClaim, CancelRequested, RedisError):
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, it ends this deployment and not the worker
                failure = error
                log.say(f"Failed: {_reason_of(error)}")
        if failure is not None:
            await self._fail(claim, failure, tail)
            return
        await self._say_running(claim)
        self._retire_older(release)

    async def _say_running(self, claim: Claim) -> None:
        """The route leads to it already. The releases before it are the next reconciliation's, unless who calls this
        has them retired."""
        app = await self._queue.get_app(claim.deployment.organization_id, claim.app_id)
        if app is None:
            raise LostClaim(claim.deployment_id)
        url = self._config.app_url_template.replace("{app}", app.name)
        await self._queue.finish(claim, DeploymentState.RUNNING, url=url)
        _log.info("deploy.running", deployment=claim.deployment_id, url=url)

    async def _release(self, claim: Claim, app: App, tail: list[str], log: LogWriter) -> Release:
        """Make it, start it and swap it in; `tail` becomes the log lines that say most about where it got to."""
        if claim.deployment.rollback_of:
            release = await self.releases.again(claim.deployment)
        else:
            release = await self._build(claim, app, tail, log)
        await self._queue.advance(
            claim, DeploymentState.STARTING, log_tail=tail, settings_version=release.settings_version
        )
        log.say("It is started, and has to answer before it gets traffic.")
        await self._queue.renew(claim)  # a start ends what runs of the release, which may be another worker's by now
        target = await self._start(release, tail)
        log.say("It is healthy: traffic moves now.")
        await self._queue.renew(claim)  # traffic moves only under a claim that is still ours
        if not await self.releases.swap(release, target, token=claim.token):
            raise LostClaim(claim.deployment_id)
        return release

    async def _build(self, claim: Claim, app: App, tail: list[str], log: LogWriter) -> Release:
        release = await self.releases.prepare(claim.deployment, app)
        # The same state again: a job that was taken over may be further on already, and never goes back.
        await self._queue.advance(claim, claim.deployment.state, kind=release.plan.kind.value)
        with BuildLog(release.build_log, sink=log.write) as build_log:
            try:
                return await self.releases.build(release, build_log)
            finally:
                tail[:] = build_log.tail()

    async def _fail(self, claim: Claim, error: Exception, tail: list[str]) -> None:
        log = _log.bind(deployment=claim.deployment_id)
        reason = _reason_of(error)
        if isinstance(error, (DeployFailed, EngineUnavailable)):
            log.info("deploy.failed", reason=reason)
        else:
            log.error("deploy.failed", exc_info=error)
        # What failed may have been ended by another worker that took over, and what is there now would be that one's.
        await self._queue.renew(claim)
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
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._every(_SUPERVISE_S, self.supervisor.round, "supervise"))
                    group.create_task(self._every(_OBEY_S, self.supervisor.obey, "obey"))
                    group.create_task(self._every(_RECONCILE_S, self.housekeeping.round, "reconcile"))
            finally:
                await self.supervisor.close()

    async def _every(self, interval_s: float, step: Callable[[], Awaitable[None]], name: str) -> None:
        while not is_cancelled():
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


def _reason_of(error: Exception) -> str:
    """For the application's owner."""
    if isinstance(error, (DeployFailed, EngineUnavailable)):
        return str(error)
    if isinstance(error, OSError):
        return f"The machine that worked on it could not go on: {error.strerror or error}."
    return "An internal error ended this deployment; the worker's log has the details."


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
