"""Life and death of sessions: create, come up, end, fail, and what a restart or a crash left half-done."""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
import unicodedata
from contextlib import suppress
from functools import partial
from typing import Final

import structlog
from redis.exceptions import RedisError

from orchestrator.errors import RuntimeUnavailable
from orchestrator.ids import is_id, new_id
from orchestrator.models import Session, SessionStatus
from orchestrator.runtimes.base import WorkspaceRuntime, WorkspaceSpec, WorkspaceStartFailed, WorkspaceState
from orchestrator.sessions.registry import SessionRegistry, now_ms
from orchestrator.tasks import TaskOwner, end_tasks
from orchestrator.terminal.hub import Hub, Watch
from orchestrator.terminal.link import LinkLost, RequestRefused, started_or_exited
from orchestrator.terminal.link_endpoint import LinkRefused
from orchestrator.terminal.output_store import OutputStore
from sidecar.protocol import Record

SHUTDOWN_S: Final = 8.0  # for the sidecar: hang up, drain its last output, go
STOP_GRACE_S: Final = 2.0
LAST_APPENDS_S: Final = 5.0
LINK_LOST_CHECKS_S: Final = (0.3, 1.0, 3.0)  # after a lost link: is the workspace still there?
RECONCILE_S: Final = 30.0
TAKE_BACK_S: Final = 0.5
RETRY_S: Final = 3.0  # after the engine was out of reach while there was something to remove
_DIR_NAME_MAX: Final = 64

log = structlog.get_logger(__name__)


class SessionLifecycle:
    def __init__(
        self,
        registry: SessionRegistry,
        runtime: WorkspaceRuntime,
        hub: Hub,
        output: OutputStore,
        tasks: TaskOwner,
        *,
        create_timeout_s: float,
    ) -> None:
        self._registry, self._runtime, self._hub, self._tasks = registry, runtime, hub, tasks
        self._output = output
        self._create_timeout_s = create_timeout_s
        self._provisioning: dict[str, asyncio.Task[None]] = {}
        self._finishing: dict[str, asyncio.Task[None]] = {}
        self._unfinished = asyncio.Event()  # an end has to be tried again
        self._unknown: set[str] = set()  # workspaces without a session, as the last reconciliation saw them

    async def create(
        self, *, organization_id: str, user_id: str, name: str, description: str, output_policy: str = "block"
    ) -> Session:
        """A session in `creating`; provisioning goes on behind it.

        Raises:
            RuntimeUnavailable: workspaces cannot be started now; nothing was made.
        """
        await self._runtime.check()
        token = secrets.token_urlsafe(32)
        session_id, at_ms = new_id("cs"), now_ms()
        session = Session(
            id=session_id,
            workspace_id="ws_" + session_id.removeprefix("cs_"),
            organization_id=organization_id,
            user_id=user_id,
            project_name=name,
            project_description=description,
            project_dir_name=safe_dir_name(name),
            status=SessionStatus.CREATING,
            created_at_ms=at_ms,
            updated_at_ms=at_ms,
            link_token_sha256=_hash(token),
            output_policy=output_policy,
        )
        try:
            await self._registry.add(session)
        except RedisError:
            # The caller is told that nothing was made; a store that hung carries it out all the same when it goes on.
            self._tasks.start(self._take_back(session), name=f"take back {session_id}")
            raise
        task = self._tasks.start(self._provision(session, token), name=f"provision {session_id}")
        self._provisioning[session_id] = task
        task.add_done_callback(lambda _: self._provisioning.pop(session_id, None))
        return session

    async def _take_back(self, session: Session) -> None:
        while True:
            await asyncio.sleep(TAKE_BACK_S)
            with suppress(RedisError):
                await self._registry.answers()
                await asyncio.sleep(TAKE_BACK_S)  # so that what was sent before it hung comes before this
                await self._registry.remove(session)
                return

    async def _provision(self, session: Session, token: str) -> None:
        spec = WorkspaceSpec(session.workspace_id, session.id, session.organization_id, session.project_dir_name, token)
        started = False
        try:
            async with asyncio.timeout(self._create_timeout_s):
                await self._runtime.start(spec)
                started = True
                still_there = partial(self._still_there, session)
                async with self._hub.watching(session.id) as watch:
                    if await self._hub.link_within(session.id, self._create_timeout_s, still_there) is None:
                        raise TimeoutError  # noqa: TRY301 - `asyncio.timeout`'s own may be swallowed, before 3.12
                    await self._until_running(session, watch)
        except asyncio.CancelledError:
            if not started:  # this process stops; had a DELETE cancelled it, its end would be decided already
                reason = "the control plane was stopped while the workspace was being created"
                await self._registry.begin_end(session.id, SessionStatus.FAILED, reason=reason)
            raise
        except TimeoutError:
            await self.fail(session.id, f"the terminal did not come up within {self._create_timeout_s:g} s")
        except (WorkspaceStartFailed, RuntimeUnavailable) as error:
            await self.fail(session.id, f"the workspace could not be started: {error}")
        except RedisError:
            log.warning("provisioning lost its store; the reconciler takes over", session_id=session.id)
        current = await self._registry.find(session.id)
        if current is not None and current.ended:  # ended meanwhile, perhaps by another replica
            self._tasks.start(self.finish(session.id), name=f"finish {session.id}")

    async def _still_there(self, session: Session) -> None:
        """
        Raises:
            WorkspaceStartFailed: it is not, with the reason; or the session's end was decided meanwhile.
        """
        # Also by another replica; and before Python 3.12 our own cancellation may be swallowed by `asyncio.wait_for`.
        current = await self._registry.find(session.id)
        if current is None or current.ended:
            raise WorkspaceStartFailed("the session has ended")
        status = await self._runtime.status(session.workspace_id)
        if status.state is not WorkspaceState.RUNNING:
            raise WorkspaceStartFailed(status.reason or "its sidecar ended at once")

    async def _until_running(self, session: Session, watch: Watch) -> None:
        while True:
            watch.clear()
            current = await self._registry.find(session.id)
            if current is None or current.ended or current.status is not SessionStatus.CREATING:
                return
            if await self._hub.find(session.id) is None:
                await self._still_there(session)
            await watch.wait(0.5)

    async def end(self, organization_id: str, session_id: str) -> None:
        """Return when all of the workspace is gone and the session says `completed`; ended already is success.

        Raises:
            SessionNotFound: not in this organization.
            RuntimeUnavailable: it is marked as ending, and the reconciler will finish it.
        """
        session = await self._registry.get(organization_id, session_id)
        if session.status.ended:
            return
        await self._registry.begin_end(session_id, SessionStatus.COMPLETED)
        self._hub.changed(session_id)
        await self._finish_once(session_id)

    async def fail(self, session_id: str, reason: str) -> None:
        """End the session as `failed`, unless its end was decided already; clean-up goes on behind it."""
        if await self._registry.begin_end(session_id, SessionStatus.FAILED, reason=reason):
            log.warning("session failed", session_id=session_id, reason=reason)
        self._hub.changed(session_id)
        self._tasks.start(self._finish_once(session_id), name=f"finish {session_id}")

    async def finish(self, session_id: str) -> None:
        """Bring the end of a session that was decided to its end."""
        with suppress(RuntimeUnavailable):  # the reconciler tries again
            await self._finish_once(session_id)

    async def _finish_once(self, session_id: str) -> None:
        task = self._finishing.get(session_id)
        if task is None:
            task = self._tasks.start(self._finish(session_id), name=f"end {session_id}")
            self._finishing[session_id] = task
            task.add_done_callback(lambda _: self._finishing.pop(session_id, None))
        # A caller that goes away must not leave a workspace half-removed.
        await asyncio.shield(task)

    async def _finish(self, session_id: str) -> None:
        session = await self._registry.find(session_id)
        if session is None or session.ending_as is None:
            return
        provisioning = self._provisioning.get(session_id)
        if provisioning is not None:
            await end_tasks(provisioning)
        async with self._hub.watching(session_id):
            link = await self._hub.find(session_id)
            if link is not None:
                with suppress(LinkLost, RequestRefused, TimeoutError):
                    async with asyncio.timeout(SHUTDOWN_S):
                        await link.request("shutdown")
                        await link.until_closed()
            try:
                await self._runtime.stop(session.workspace_id, grace_s=STOP_GRACE_S)
            except RuntimeUnavailable:
                self._unfinished.set()
                raise
            await self._until_appended(session_id)
        reason = session.status_reason or "the session was ended"
        await self._output.close(session_id, lost_reason=reason, at_ms=now_ms())
        await self._registry.move(session_id, session.ending_as)
        await self._hub.forget(session_id)
        self._hub.changed(session_id)
        log.info("session ended", session_id=session_id, status=session.ending_as)

    async def _until_appended(self, session_id: str) -> None:
        """The workspace is gone: wait until what its link had brought is in the log."""
        deadline = time.monotonic() + LAST_APPENDS_S
        async with self._hub.watching(session_id) as watch:
            while time.monotonic() < deadline and await self._hub.holds(session_id):
                watch.clear()
                await watch.wait(0.1)

    async def authenticate_link(self, session_id: str, token: str) -> Session:
        """The session whose sidecar has this token.

        Raises:
            LinkRefused: wrong token, or the session has ended.
        """
        session = await self._registry.find(session_id) if is_id(session_id, "cs") else None
        if session is None or session.status.ended:
            raise LinkRefused(gone=True)
        if not hmac.compare_digest(session.link_token_sha256, _hash(token)):
            raise LinkRefused(gone=False)
        return session

    async def on_appended(self, session_id: str, records: list[Record]) -> None:
        """The terminal's first record is in the log: the session runs."""
        if started_or_exited(records):
            await self._registry.move(session_id, SessionStatus.RUNNING)
        self._hub.changed(session_id)

    async def on_linked(self, session_id: str) -> None:
        """A sidecar is connected. Its first records may have been appended just before a crash of ours."""
        session = await self._registry.find(session_id)
        if session is not None and session.status is SessionStatus.CREATING:
            await self._registry.move(session_id, SessionStatus.RUNNING)
            self._hub.changed(session_id)
        if session is not None and session.ending_as is not None:
            self._tasks.start(self.finish(session_id), name=f"finish {session_id}")

    def on_link_lost(self, session_id: str) -> None:
        if session_id not in self._finishing and session_id not in self._provisioning:  # they look themselves
            self._tasks.start(self._check_after_loss(session_id), name=f"check {session_id}")

    async def _check_after_loss(self, session_id: str) -> None:
        for wait_s in LINK_LOST_CHECKS_S:
            await asyncio.sleep(wait_s)
            session = await self._registry.find(session_id)
            if session is None or session.ended or self._hub.link(session_id) is not None:
                return
            with suppress(RuntimeUnavailable):
                await self._fail_if_gone(session)

    async def _fail_if_gone(self, session: Session) -> None:
        status = await self._runtime.status(session.workspace_id)
        if status.state is not WorkspaceState.RUNNING:
            reason = status.reason or "nothing of it is there any more"
            await self.fail(session.id, f"the workspace is gone: {reason}")

    async def reconcile_forever(self) -> None:
        while True:
            try:
                await self.reconcile()
            except (RuntimeUnavailable, RedisError) as error:
                log.warning("reconciliation put off", reason=str(error))
            except Exception:
                log.exception("reconciliation failed")
            with suppress(TimeoutError):
                async with asyncio.timeout(RECONCILE_S):
                    await self._unfinished.wait()
                await asyncio.sleep(RETRY_S)
            self._unfinished.clear()

    async def reconcile(self) -> None:
        """Compare the store with the runtime, both ways, and finish what was left half-done."""
        # The runtime first: a session that is created meanwhile is then live but has no workspace here, and not the
        # other way round.
        workspaces = await self._runtime.list_workspaces()
        live = await self._registry.live_ids()
        for session_id in live:
            session = await self._registry.find(session_id)
            if session is None or session.status.ended:
                await self._registry.forget_live(session_id)
            elif session.ending_as is not None:
                self._tasks.start(self.finish(session_id), name=f"finish {session_id}")
            elif self._hub.link(session_id) is None and session_id not in self._provisioning:
                await self._reconcile_unlinked(session)
        unknown = set()
        for workspace_id, session_id in workspaces.items():
            owner = await self._registry.find(session_id)
            if owner is not None and not owner.status.ended:
                continue
            # An ended session's workspace goes at once, an unknown one's when it was unknown a moment ago, too.
            if owner is not None or workspace_id in self._unknown:
                log.warning("removing an orphaned workspace", workspace_id=workspace_id, session_id=session_id)
                await self._runtime.stop(workspace_id, grace_s=STOP_GRACE_S)
            else:
                unknown.add(workspace_id)
        self._unknown = unknown

    async def _reconcile_unlinked(self, session: Session) -> None:
        if session.status is SessionStatus.RUNNING:
            await self._fail_if_gone(session)
        elif time.time() * 1000 - session.created_at_ms > self._create_timeout_s * 1000:
            await self.fail(session.id, "the control plane was restarted while the workspace was being created")


def safe_dir_name(project_name: str) -> str:
    """The project's name as one component of a path: letters, digits, dots, dashes and underscores."""
    plain = unicodedata.normalize("NFKD", project_name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-.")[:_DIR_NAME_MAX].rstrip("-.") or "project"


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
