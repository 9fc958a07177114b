"""Deployments as the control plane sees them: accept them, and bring each one's archive from its workspace."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import structlog
from redis.exceptions import RedisError

from deploy_pipeline import errors as pipeline
from deploy_pipeline.archive import ArchiveStore
from deploy_pipeline.errors import ArchiveRefused, ArchivesUnavailable, CancelRequested, LostClaim
from deploy_pipeline.jobs import SETTLED, App, Deployment, DeploymentState, Stage
from deploy_pipeline.queue import SWEEP_INTERVAL_S, Claim, DeploymentQueue
from orchestrator.errors import (
    AppIsRemoved,
    AppNotFound,
    DeploymentNotFound,
    DeploymentSettled,
    IdempotencyKeyReused,
    SessionEnded,
    TerminalUnavailable,
)
from orchestrator.models import Session
from orchestrator.sessions.registry import SessionRegistry
from orchestrator.sessions.terminals import Terminals
from orchestrator.tasks import end_tasks
from orchestrator.terminal.link import LinkLost, RequestRefused
from sidecar.protocol import JsonObject

ARCHIVES_AT_ONCE: Final = 4
ATTEMPTS: Final = 3  # for a link that breaks in the middle
ARCHIVE_S: Final = 300.0
_TAKE_BLOCK_S: Final = 2.0
_PAUSE_S: Final = 1.0  # after the store was out of reach

CANCEL_S: Final = 30.0
_CANCEL_LOOK_S: Final = 0.1

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """What tells a repeated request from a new one."""

    key: str = ""  # of the caller, made unique for each; empty: every request is a new one
    body_hash: str = ""


class Deployments:
    def __init__(
        self,
        registry: SessionRegistry,
        terminals: Terminals,
        queue: DeploymentQueue,
        archives: ArchiveStore,
        *,
        consumer: str,
    ) -> None:
        self._registry, self._terminals, self._queue, self._archives = registry, terminals, queue, archives
        self._consumer = consumer

    async def submit(self, organization_id: str, session_id: str, *, user_id: str, request: Request) -> Deployment:
        """Queue a deployment of the session's workspace; a repeated request gets the deployment it made before.

        Raises:
            SessionNotFound, SessionEnded, IdempotencyKeyReused, AppIsRemoved: as named.
        """
        session = await self._registry.get(organization_id, session_id)
        made = await self._queue.submitted(organization_id, session_id, request.key)
        if made is None:
            if session.ended:
                raise SessionEnded(f"code session {session_id} has ended, its workspace is gone")
            try:
                made = await self._queue.submit(
                    session_id=session.id,
                    workspace_id=session.workspace_id,
                    organization_id=organization_id,
                    user_id=user_id,
                    project_name=session.project_name,
                    request_key=request.key,
                    body_hash=request.body_hash,
                )
            except pipeline.AppIsRemoved:
                raise AppIsRemoved("the session's application is being removed; deploy again when it is gone") from None
        if made.body_hash != request.body_hash:
            raise IdempotencyKeyReused("the Idempotency-Key was used for a deployment with other options")
        return made.deployment

    async def cancel(self, organization_id: str, deployment_id: str) -> Deployment:
        """Cancel a deployment and wait up to `CANCEL_S` until nothing of it runs any more; the deployment then.

        Raises:
            DeploymentNotFound: not in this organization.
            DeploymentSettled: it has ended in another way, or ended so before the worker was reached.
        """
        await self.get(organization_id, deployment_id)
        await self._queue.request_cancel(deployment_id)
        deadline = time.monotonic() + CANCEL_S
        while True:
            deployment = await self.get(organization_id, deployment_id)
            if deployment.state is DeploymentState.CANCELLED:
                return deployment
            if deployment.state in SETTLED:
                raise DeploymentSettled(f"the deployment is {deployment.state} already", state=deployment.state.value)
            if time.monotonic() > deadline:
                return deployment
            await asyncio.sleep(_CANCEL_LOOK_S)

    async def get(self, organization_id: str, deployment_id: str) -> Deployment:
        """
        Raises:
            DeploymentNotFound: not in this organization.
        """
        deployment = await self._queue.get(organization_id, deployment_id)
        if deployment is None:
            raise DeploymentNotFound(f"no deployment {deployment_id[:64]}")
        return deployment

    async def get_app(self, organization_id: str, app_id: str) -> tuple[App, Deployment | None]:
        """The application and its newest deployment.

        Raises:
            AppNotFound: not in this organization.
        """
        app = await self._queue.get_app(organization_id, app_id)
        if app is None:
            raise AppNotFound(f"no application {app_id[:64]}")
        newest = await self._queue.list_deployments(organization_id, app_id)
        return app, newest[0] if newest else None

    async def apps(self, organization_id: str) -> list[tuple[App, Deployment | None]]:
        """The organization's applications, each with its newest deployment, the newest first."""
        found = []
        for app in await self._queue.list_apps(organization_id):
            with suppress(AppNotFound):  # removed meanwhile
                found.append(await self.get_app(organization_id, app.id))
        return found

    async def deployments(self, organization_id: str, app_id: str) -> list[Deployment]:
        """
        Raises:
            AppNotFound: not in this organization.
        """
        await self.get_app(organization_id, app_id)
        return await self._queue.list_deployments(organization_id, app_id)

    async def sweep_forever(self) -> None:
        while True:
            try:
                await self._queue.sweep()
            except RedisError as error:
                log.warning("cannot sweep deployments", error=str(error))
            except Exception:  # one odd record must not end the sweeping of all others for good
                log.exception("sweeping deployments failed")
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def archive_forever(self) -> None:
        """Take the archive jobs, a few at a time; until cancelled, which gives unfinished ones back."""
        places = asyncio.Semaphore(ARCHIVES_AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            while True:
                await places.acquire()
                try:
                    claim = await self._queue.take(Stage.ARCHIVE, self._consumer, block_s=_TAKE_BLOCK_S)
                except RedisError as error:
                    log.warning("cannot take archive jobs", error=str(error))
                    await asyncio.sleep(_PAUSE_S)
                    claim = None
                except Exception:  # one odd job must not end the archiving of all others for good
                    log.exception("taking an archive job failed")
                    await asyncio.sleep(_PAUSE_S)
                    claim = None
                if claim is None:
                    places.release()
                    continue
                task = tasks.create_task(self._work(claim))
                task.add_done_callback(lambda _: places.release())

    async def _work(self, claim: Claim) -> None:
        holding = asyncio.create_task(self._queue.hold(claim))
        working = asyncio.create_task(self._archive(claim))
        try:
            await asyncio.wait({holding, working}, return_when=asyncio.FIRST_COMPLETED)
            await (working if working.done() else holding)
        except CancelRequested:
            await end_tasks(working)  # and with it the zip in the workspace
            with suppress(RedisError, LostClaim):
                await self._queue.finish(claim, DeploymentState.CANCELLED)
        except LostClaim:
            log.warning("another consumer has the deployment", deployment_id=claim.deployment_id)
        except RedisError as error:  # the lease runs out, and somebody takes the job again
            log.warning("archiving lost its store", deployment_id=claim.deployment_id, error=str(error))
        except asyncio.CancelledError:
            with suppress(RedisError):
                await self._queue.release(claim)
            raise
        except Exception:
            log.exception("archiving failed", deployment_id=claim.deployment_id)
            with suppress(RedisError):
                await self._fail(claim, "the control plane could not archive the workspace")
        finally:
            await end_tasks(holding, working)

    async def _archive(self, claim: Claim) -> None:
        await self._queue.advance(claim, DeploymentState.ARCHIVING)
        session = await self._registry.find(claim.deployment.session_id)
        if session is None or session.ended:
            await self._fail(claim, "the code session ended before its workspace was archived")
            return
        try:
            async with asyncio.timeout(ARCHIVE_S):
                sha256, size_bytes = await self._fetch(session)
        except (RequestRefused, SessionEnded, TerminalUnavailable, ArchiveRefused, ArchivesUnavailable) as error:
            await self._fail(claim, f"the workspace could not be archived: {getattr(error, 'detail', error)}")
        except TimeoutError:
            await self._fail(claim, f"the workspace could not be archived within {ARCHIVE_S:.0f} seconds")
        else:
            await self._queue.advance(claim, DeploymentState.BUILDING, archive_sha256=sha256, archive_bytes=size_bytes)

    async def _fetch(self, session: Session) -> tuple[str, int]:
        """The stored archive's SHA-256 and size."""
        for attempt in range(1, ATTEMPTS + 1):
            writer = self._archives.writer()
            try:
                facts: JsonObject = {}
                async for piece in self._terminals.archive(session, facts, None):
                    writer.write(piece)
                return await writer.commit()
            except LinkLost:
                if attempt == ATTEMPTS:
                    raise TerminalUnavailable("the workspace's link broke again and again") from None
            finally:
                writer.abort()
        raise AssertionError("unreachable")

    async def _fail(self, claim: Claim, reason: str) -> None:
        with suppress(LostClaim):
            await self._queue.finish(claim, DeploymentState.FAILED, reason=reason)
