"""What a stop, a crash or a stranger leaves behind, and what the next look makes of it: real store, real workspaces."""

import asyncio

import pytest

from orchestrator.models import SessionStatus
from orchestrator.runtimes.base import WorkspaceSpec, WorkspaceState
from orchestrator.runtimes.local import LocalRuntime
from orchestrator.sessions.lifecycle import SessionLifecycle
from orchestrator.sessions.registry import SessionRegistry
from tests.orchestrator.terminal.planes import Replica


class SlowToStart(LocalRuntime):
    """The local runtime on a machine where nothing ever gets started."""

    async def start(self, spec):
        await asyncio.Event().wait()


class Plane:
    """The parts of a control plane that a lifecycle needs; no link ever comes up in it."""

    def __init__(self, redis, runtime):
        replica = Replica(redis, "replica-a")
        self.runtime, self.tasks, self.registry = runtime, replica.tasks, SessionRegistry(redis)
        self.lifecycle = SessionLifecycle(
            self.registry, runtime, replica.hub, replica.store, self.tasks, create_timeout_s=30
        )

    async def create(self):
        return await self.lifecycle.create(organization_id="org_a", user_id="user_a", name="demo", description="")

    async def until(self, session_id, status):
        async with asyncio.timeout(10):
            while (session := await self.registry.find(session_id)).status is not status:
                await asyncio.sleep(0.02)
        return session


@pytest.fixture
async def planes(redis, tmp_path):
    """Control planes one after the other on the same store and folder."""
    made = []

    def plane(runtime=LocalRuntime):
        made.append(Plane(redis, runtime(tmp_path / "workspaces", tmp_path / "link")))
        return made[-1]

    yield plane
    for plane in made:
        await plane.tasks.close()
        for workspace_id in await plane.runtime.list_workspaces():
            await plane.runtime.stop(workspace_id, grace_s=0)


async def test_a_creation_that_a_stop_cuts_off_is_failed_by_the_next_start(planes):
    stopped = planes(SlowToStart)
    session = await stopped.create()
    await asyncio.sleep(0.1)
    await stopped.tasks.close()

    started = planes()
    await started.lifecycle.reconcile()

    failed = await started.until(session.id, SessionStatus.FAILED)
    assert "stopped while" in failed.status_reason
    assert await started.registry.live_ids() == set()


async def test_a_workspace_that_was_started_goes_on_over_a_stop(planes):
    stopped = planes()
    session = await stopped.create()
    async with asyncio.timeout(10):
        while (await stopped.runtime.status(session.workspace_id)).state is not WorkspaceState.RUNNING:
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.2)
    await stopped.tasks.close()

    started = planes()
    await started.lifecycle.reconcile()
    await asyncio.sleep(0.2)

    assert (await started.registry.find(session.id)).status is SessionStatus.CREATING
    assert (await started.runtime.status(session.workspace_id)).state is WorkspaceState.RUNNING
    await started.lifecycle.end("org_a", session.id)
    assert (await started.registry.find(session.id)).status is SessionStatus.COMPLETED
    assert await started.runtime.list_workspaces() == {}


async def test_a_workspace_that_no_session_knows_is_removed_at_the_second_look(planes):
    plane = planes()
    spec = WorkspaceSpec("ws_stray", "cs_stray", "org_a", "demo", "token")
    await plane.runtime.start(spec)

    await plane.lifecycle.reconcile()
    assert "ws_stray" in await plane.runtime.list_workspaces(), "it may be one that is being made"
    await plane.lifecycle.reconcile()
    assert await plane.runtime.list_workspaces() == {}


async def test_a_running_session_whose_workspace_is_gone_is_failed_with_the_reason(planes):
    plane = planes()
    session = await plane.create()
    await plane.registry.move(session.id, SessionStatus.RUNNING)
    await asyncio.sleep(0.3)
    await plane.tasks.close()
    await plane.runtime.stop(session.workspace_id, grace_s=0)

    after = planes()
    await after.lifecycle.reconcile()

    failed = await after.until(session.id, SessionStatus.FAILED)
    assert "gone" in failed.status_reason


async def test_an_end_that_was_decided_is_finished_by_whoever_looks_next(planes):
    plane = planes()
    session = await plane.create()
    await asyncio.sleep(0.3)
    await plane.tasks.close()
    await plane.registry.begin_end(session.id, SessionStatus.COMPLETED)

    after = planes()
    await after.lifecycle.reconcile()

    await after.until(session.id, SessionStatus.COMPLETED)
    assert await after.runtime.list_workspaces() == {}
