"""What `orchestrator/runtimes/base.py` promises, for every runtime."""

import asyncio

import pytest

from orchestrator.ids import new_id
from orchestrator.runtimes.base import WorkspaceStartFailed, WorkspaceState

GONE, RUNNING = WorkspaceState.GONE, WorkspaceState.RUNNING


async def test_a_started_workspace_runs_and_is_listed_with_its_session(under_test, spec):
    await under_test.runtime.start(spec)

    assert (await under_test.runtime.status(spec.workspace_id)).state is RUNNING
    assert await under_test.runtime.list_workspaces() == {spec.workspace_id: spec.session_id}


async def test_a_workspace_still_runs_seconds_after_its_start(under_test, spec):
    await under_test.runtime.start(spec)
    await asyncio.sleep(2)

    assert (await under_test.runtime.status(spec.workspace_id)).state is RUNNING


async def test_a_stopped_workspace_is_gone_and_no_longer_listed(under_test, spec):
    await under_test.runtime.start(spec)
    await under_test.runtime.stop(spec.workspace_id, grace_s=5)

    assert (await under_test.runtime.status(spec.workspace_id)).state is GONE
    assert await under_test.runtime.list_workspaces() == {}


async def test_stopping_twice_is_success_both_times(under_test, spec):
    await under_test.runtime.start(spec)
    await under_test.runtime.stop(spec.workspace_id, grace_s=0)
    await under_test.runtime.stop(spec.workspace_id, grace_s=0)


async def test_several_callers_may_stop_a_workspace_at_once_and_each_finds_it_gone(under_test, spec):
    await under_test.runtime.start(spec)

    async def stop_and_look(runtime) -> WorkspaceState:
        await runtime.stop(spec.workspace_id, grace_s=1)
        return (await runtime.status(spec.workspace_id)).state

    callers = (under_test.runtime, under_test.successor, under_test.runtime)
    assert await asyncio.gather(*map(stop_and_look, callers)) == [GONE] * 3


@pytest.mark.parametrize("unknown", [new_id("ws"), "ws_", "../../containers", "", "ws_ü"])
async def test_an_unknown_id_is_gone_and_stopping_it_is_success(under_test, unknown):
    assert (await under_test.runtime.status(unknown)).state is GONE
    await under_test.runtime.stop(unknown, grace_s=0)


async def test_stopping_what_is_no_id_touches_nothing_else(under_test, spec):
    await under_test.runtime.start(spec)
    for not_an_id in ("", ".", "..", f"{spec.workspace_id}/../{spec.workspace_id}"):
        await under_test.runtime.stop(not_an_id, grace_s=0)

    assert (await under_test.runtime.status(spec.workspace_id)).state is RUNNING


async def test_a_start_that_fails_says_why_and_leaves_nothing_behind(under_test, spec):
    with pytest.raises(WorkspaceStartFailed, match=r"\w{3,}"):
        await under_test.broken.start(spec)

    assert (await under_test.runtime.status(spec.workspace_id)).state is GONE
    assert await under_test.runtime.list_workspaces() == {}


@pytest.mark.parametrize("after_s", [0, 0.02, 0.1, 0.3, 0.6])
async def test_a_cancelled_start_leaves_nothing_behind(under_test, spec, after_s):
    start = asyncio.create_task(under_test.runtime.start(spec))
    await asyncio.sleep(after_s)
    start.cancel()
    await asyncio.wait({start})

    if start.cancelled():
        assert (await under_test.runtime.status(spec.workspace_id)).state is GONE
        assert await under_test.runtime.list_workspaces() == {}
    else:
        assert start.exception() is None, "it was faster than its cancellation"


@pytest.mark.parametrize("after_s", [0, 0.02, 0.1, 0.3])
async def test_a_workspace_stopped_while_it_starts_is_gone_when_stop_returns_and_stays_gone(under_test, spec, after_s):
    start = asyncio.create_task(under_test.runtime.start(spec))
    await asyncio.sleep(after_s)
    await under_test.runtime.stop(spec.workspace_id, grace_s=0)

    assert (await under_test.runtime.status(spec.workspace_id)).state is GONE
    result = (await asyncio.gather(start, return_exceptions=True))[0]
    assert result is None or isinstance(result, WorkspaceStartFailed)
    assert await under_test.runtime.list_workspaces() == {}


async def test_an_id_that_is_in_use_is_refused_and_the_workspace_that_has_it_goes_on(under_test, spec):
    await under_test.runtime.start(spec)
    for runtime in (under_test.runtime, under_test.successor):
        with pytest.raises(WorkspaceStartFailed):
            await runtime.start(spec)

    assert (await under_test.runtime.status(spec.workspace_id)).state is RUNNING


async def test_workspaces_outlive_their_runtime_object_and_the_next_one_knows_them(under_test, spec):
    await under_test.runtime.start(spec)
    await under_test.runtime.close()

    assert (await under_test.successor.status(spec.workspace_id)).state is RUNNING
    assert await under_test.successor.list_workspaces() == {spec.workspace_id: spec.session_id}
    await under_test.successor.stop(spec.workspace_id, grace_s=0)
    assert await under_test.successor.list_workspaces() == {}


async def test_an_installation_does_not_list_what_belongs_to_another(under_test, spec):
    await under_test.runtime.start(spec)

    assert await under_test.neighbour.list_workspaces() == {}


async def test_ten_workspaces_start_and_stop_at_once_and_nothing_stays(under_test, new_spec):
    specs = [new_spec() for _ in range(10)]
    await asyncio.gather(*(under_test.runtime.start(spec) for spec in specs))
    assert await under_test.runtime.list_workspaces() == {spec.workspace_id: spec.session_id for spec in specs}

    await asyncio.gather(*(under_test.runtime.stop(spec.workspace_id, grace_s=0) for spec in specs))
    assert await under_test.runtime.list_workspaces() == {}


async def test_check_passes_when_workspaces_can_be_started(under_test):
    await under_test.runtime.check()
