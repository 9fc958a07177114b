import asyncio
import contextlib

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as StoreConnectionError

from deploy_pipeline.errors import CancelRequested, ForbiddenChange, LostClaim
from deploy_pipeline.jobs import DeploymentState, Stage
from deploy_pipeline.queue import MAX_ATTEMPTS, DeploymentQueue
from deploy_pipeline.steps import stream_key

ORG = "org_1"


async def submit(queue, session_id="cs_1", organization_id=ORG, **options):
    submitted = await queue.submit(
        session_id=session_id,
        workspace_id="ws_1",
        organization_id=organization_id,
        user_id="user_1",
        project_name="My Site",
        **options,
    )
    return submitted.deployment


async def take(queue, stage=Stage.ARCHIVE, consumer="one"):
    return await queue.take(stage, consumer, block_s=0.05)


async def archived(queue):
    """A claim of the archive stage, handed over to the build stage."""
    claim = await take(queue)
    await queue.advance(claim, DeploymentState.ARCHIVING)
    await queue.advance(claim, DeploymentState.BUILDING, archive_sha256="ab" * 32, archive_bytes=5)
    return claim


async def run_through(queue):
    """Takes the next deployment all the way to running."""
    await archived(queue)
    claim = await take(queue, Stage.BUILD)
    await queue.advance(claim, DeploymentState.STARTING)
    await queue.finish(claim, DeploymentState.RUNNING, url="http://x/")
    return claim


async def test_a_deployment_goes_from_queued_to_running_through_both_stages(queue):
    deployment = await submit(queue)
    assert deployment.state is DeploymentState.QUEUED
    assert await take(queue, Stage.BUILD) is None
    claim = await run_through(queue)
    found = await queue.get(ORG, deployment.id)
    assert claim.deployment_id == deployment.id
    assert claim.deployment.archive_sha256 == "ab" * 32
    assert claim.deployment.archive_bytes == 5
    assert found.state is DeploymentState.RUNNING
    assert found.url == "http://x/"
    assert [*found.times] == ["queued", "archiving", "building", "starting", "running"]
    assert list(found.times.values()) == sorted(found.times.values())
    app = await queue.get_app(ORG, deployment.app_id)
    assert (app.current_deployment_id, app.active_deployment_id, app.url) == (deployment.id, "", "http://x/")


async def test_two_first_deployments_at_once_share_one_application(queue):
    one, two = await asyncio.gather(submit(queue), submit(queue))
    assert one.app_id == two.app_id
    app = await queue.app_of_session(ORG, "cs_1")
    assert {app.active_deployment_id, app.waiting_deployment_id} == {one.id, two.id}
    assert len(await queue.list_apps(ORG)) == 1


async def test_one_runs_one_waits_and_the_newest_supersedes_the_waiting_one(queue):
    first, second, third = [await submit(queue) for _ in range(3)]
    assert (await queue.get(ORG, second.id)).state is DeploymentState.SUPERSEDED
    assert (await queue.get(ORG, second.id)).superseded_by == third.id
    claim = await archived(queue)
    assert claim.deployment_id == first.id
    assert await take(queue) is None, "the waiting one must not start while another is in progress"
    building = await take(queue, Stage.BUILD)
    finished = await queue.finish(building, DeploymentState.FAILED, reason="broken", log_tail=["x"] * 300)
    assert finished.activated == third.id
    assert len((await queue.get(ORG, first.id)).log_tail) == 100
    assert (await run_through(queue)).deployment_id == third.id
    assert [d.id for d in await queue.list_deployments(ORG, first.app_id)] == [third.id, second.id, first.id]


async def test_the_release_that_served_is_replaced_by_the_next_one_that_runs(queue):
    first = await submit(queue)
    await run_through(queue)
    second = await submit(queue)
    await run_through(queue)
    assert (await queue.get(ORG, first.id)).state is DeploymentState.REPLACED
    assert (await queue.get_app(ORG, first.app_id)).current_deployment_id == second.id


async def test_another_organizations_deployments_and_apps_do_not_exist(queue):
    deployment = await submit(queue)
    assert await queue.get("org_2", deployment.id) is None
    assert await queue.get_app("org_2", deployment.app_id) is None
    assert await queue.app_of_session("org_2", "cs_1") is None
    assert await queue.list_deployments("org_2", deployment.app_id) == []
    assert await queue.list_apps("org_2") == []
    assert await queue.get(ORG, "dep_nonsense") is None


async def test_a_dead_consumers_job_is_taken_over_and_its_own_writes_are_refused(redis):
    queue = DeploymentQueue(redis, lease_s=0.2)
    await submit(queue)
    stale = await take(queue)
    assert await queue.sweep() == 0, "a live lease is left alone"
    await asyncio.sleep(0.25)
    assert await queue.sweep() == 1
    assert await queue.sweep() == 0, "announced once is enough"
    fresh = await take(queue, consumer="two")
    assert fresh.deployment_id == stale.deployment_id
    assert (fresh.attempt, fresh.token > stale.token) == (2, True)
    for write in (
        queue.renew(stale),
        queue.advance(stale, DeploymentState.ARCHIVING),
        queue.finish(stale, DeploymentState.FAILED, reason="stale"),
    ):
        with pytest.raises(LostClaim):
            await write
    await queue.advance(fresh, DeploymentState.ARCHIVING)


async def test_a_renewed_lease_is_not_taken_over(redis):
    queue = DeploymentQueue(redis, lease_s=0.3)
    await submit(queue)
    claim = await take(queue)
    for _ in range(4):
        await asyncio.sleep(0.15)
        await queue.renew(claim)
        assert await queue.sweep() == 0
    await queue.advance(claim, DeploymentState.ARCHIVING)


async def test_a_job_whose_consumers_keep_dying_ends_as_failed(redis):
    queue = DeploymentQueue(redis, lease_s=0.05)
    deployment = await submit(queue)
    for _ in range(MAX_ATTEMPTS):
        assert await take(queue)
        await asyncio.sleep(0.07)
        await queue.sweep()
    assert await take(queue) is None
    found = await queue.get(ORG, deployment.id)
    assert found.state is DeploymentState.FAILED
    assert "3 attempts" in found.reason


async def test_a_job_given_back_is_taken_at_once_and_costs_no_attempt(queue):
    await submit(queue)
    first = await take(queue)
    await queue.release(first)
    second = await take(queue, consumer="two")
    assert second.attempt == 1
    with pytest.raises(LostClaim):
        await queue.renew(first)


async def test_a_deployment_whose_announcement_was_lost_is_announced_again(queue, redis):
    await submit(queue)
    await redis.delete(stream_key(Stage.ARCHIVE))
    assert await take(queue) is None
    assert await queue.sweep() == 1
    assert await take(queue) is not None


async def test_a_doubled_announcement_is_worked_on_once(queue, redis):
    deployment = await submit(queue)
    await redis.xadd(stream_key(Stage.ARCHIVE), {"deployment": deployment.id})
    assert await take(queue) is not None
    assert await take(queue, consumer="two") is None
    assert await redis.xlen(stream_key(Stage.ARCHIVE)) == 0


async def test_an_entry_whose_reader_died_before_it_claimed_is_read_by_another(queue, redis, monkeypatch):
    await submit(queue)
    await redis.xreadgroup("consumers", "dead", {stream_key(Stage.ARCHIVE): ">"}, count=1)
    assert await take(queue) is None
    assert await queue.sweep() == 0, "the entry still speaks of it"
    monkeypatch.setattr("deploy_pipeline.queue._PENDING_IDLE_MS", 0)
    assert await take(queue) is not None


class Dying(Redis):
    """A client whose process is killed after some commands."""

    left = 0

    async def execute_command(self, *args, **options):
        if self.left == 0:
            raise StoreConnectionError("killed")
        self.left -= 1
        return await super().execute_command(*args, **options)


@pytest.mark.parametrize("commands", range(1, 7))
async def test_wherever_a_consumer_is_killed_while_it_takes_a_job_another_one_gets_it(
    redis, valkey_socket, monkeypatch, commands
):
    queue = DeploymentQueue(redis, lease_s=0.2)
    deployment = await submit(queue)
    async with Dying(unix_socket_path=str(valkey_socket)) as client:
        client.left = 100
        doomed = DeploymentQueue(client, lease_s=0.2)
        await take(doomed, stage=Stage.BUILD)  # so that its scripts are known and its groups made
        client.left = commands
        with contextlib.suppress(StoreConnectionError):
            await take(doomed)
    await asyncio.sleep(0.25)
    monkeypatch.setattr("deploy_pipeline.queue._PENDING_IDLE_MS", 0)
    await queue.sweep()
    async with asyncio.timeout(5):
        while (claim := await take(queue)) is None:
            pass
    assert claim.deployment_id == deployment.id


async def test_a_change_that_the_table_has_not_is_refused(queue):
    await submit(queue)
    claim = await take(queue)
    with pytest.raises(ForbiddenChange):
        await queue.advance(claim, DeploymentState.BUILDING)
    with pytest.raises(ForbiddenChange):
        await queue.finish(claim, DeploymentState.BUILDING)


async def test_an_emptied_store_is_worked_with_again(queue, redis):
    await submit(queue)
    await take(queue)
    await redis.flushall()
    assert await take(queue) is None
    await submit(queue)
    assert await take(queue) is not None


async def test_old_records_are_trimmed_but_never_the_one_that_serves(queue):
    first = await submit(queue)
    await run_through(queue)
    for _ in range(105):
        await submit(queue)
    kept = {d.id for d in await queue.list_deployments(ORG, first.app_id)}
    assert first.id in kept
    assert len(kept) <= 102


async def test_a_repeated_request_gets_the_deployment_that_it_made_before_and_queues_nothing(queue, redis):
    first = await submit(queue, request_key="k1", body_hash="b1")
    again = await queue.submit(
        session_id="cs_1",
        workspace_id="ws_1",
        organization_id=ORG,
        user_id="user_1",
        project_name="My Site",
        request_key="k1",
        body_hash="b2",
    )
    assert (again.deployment.id, again.body_hash) == (first.id, "b1")
    assert (await queue.submitted(ORG, "cs_1", "k1")).deployment.id == first.id
    assert await queue.submitted(ORG, "cs_1", "") is None
    assert await queue.submitted("org_2", "cs_1", "k1") is None
    other = await submit(queue, request_key="k2", body_hash="b1")
    assert other.id != first.id
    assert len(await queue.list_deployments(ORG, first.app_id)) == 2
    remembered_s = await redis.ttl(f"deploy:{{{first.app_id}}}:asked:k1")
    assert 24 * 3600 - 60 < remembered_s <= 24 * 3600


async def test_a_deployment_that_nobody_works_on_is_cancelled_at_once_and_the_waiting_one_goes_on(queue):
    first, second = await submit(queue), await submit(queue)
    await queue.request_cancel(first.id)
    assert (await queue.get(ORG, first.id)).state is DeploymentState.CANCELLED
    async with asyncio.timeout(10):
        while (claim := await take(queue)) is None:
            pass  # the cancelled one's announcement comes first
    assert claim.deployment_id == second.id


async def test_a_waiting_deployment_is_cancelled_at_once(queue):
    first, second = await submit(queue), await submit(queue)
    await queue.request_cancel(second.id)
    assert (await queue.get(ORG, second.id)).state is DeploymentState.CANCELLED
    assert (await run_through(queue)).deployment_id == first.id
    assert await take(queue) is None


async def test_who_works_on_a_cancelled_deployment_is_told_and_says_when_it_is_gone(queue):
    deployment = await submit(queue)
    await archived(queue)
    claim = await take(queue, Stage.BUILD)
    holding = asyncio.create_task(queue.hold(claim))
    await queue.request_cancel(deployment.id)
    with pytest.raises(CancelRequested):
        await holding
    with pytest.raises(CancelRequested):
        await queue.advance(claim, DeploymentState.STARTING)
    assert (await queue.get(ORG, deployment.id)).state is DeploymentState.BUILDING, "its processes may still run"
    await queue.finish(claim, DeploymentState.CANCELLED)
    assert (await queue.get(ORG, deployment.id)).state is DeploymentState.CANCELLED


async def test_a_cancelled_deployment_whose_worker_died_is_taken_over_to_be_ended(redis):
    queue = DeploymentQueue(redis, lease_s=0.2)
    deployment = await submit(queue)
    await archived(queue)
    assert await take(queue, Stage.BUILD)
    await asyncio.sleep(0.25)
    await queue.request_cancel(deployment.id)
    claim = await take(queue, Stage.BUILD, consumer="two")
    assert claim.deployment.cancel_requested
    assert (await queue.get(ORG, deployment.id)).state is DeploymentState.BUILDING


async def test_cancelling_a_settled_or_unknown_deployment_changes_nothing(queue):
    deployment = await submit(queue)
    await run_through(queue)
    await queue.request_cancel(deployment.id)
    await queue.request_cancel("dep_nonsense")
    found = await queue.get(ORG, deployment.id)
    assert (found.state, found.cancel_requested) == (DeploymentState.RUNNING, 0)
