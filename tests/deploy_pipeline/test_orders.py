import pytest
from conftest import ORG

from deploy_pipeline.errors import AppIsRemoved, DeploymentInProgress, NothingToRun, ReleaseNotKept
from deploy_pipeline.jobs import DeploymentState, Desired, Health, Stage, app_id_of_session, kept_ids
from deploy_pipeline.logs import Log, LogStore
from deploy_pipeline.orders import Orders, Verb

APP = app_id_of_session("cs_1")


@pytest.fixture
def orders(redis):
    return Orders(redis)


async def submit(queue):
    submitted = await queue.submit(
        session_id="cs_1", workspace_id="ws_1", organization_id=ORG, user_id="u", project_name="My Site"
    )
    return submitted.deployment


async def taken(queue, stage):
    while (claim := await queue.take(stage, "test", block_s=0.5)) is None:
        pass
    return claim


async def run_through(queue, settings_version=0):
    deployment = await submit(queue)
    claim = await taken(queue, Stage.ARCHIVE)
    await queue.advance(claim, DeploymentState.ARCHIVING)
    await queue.advance(claim, DeploymentState.BUILDING, archive_sha256="ab" * 32, archive_bytes=5)
    claim = await taken(queue, Stage.BUILD)
    await queue.advance(claim, DeploymentState.STARTING, kind="static", settings_version=settings_version)
    await queue.finish(claim, DeploymentState.RUNNING, url="http://x/")
    return deployment


async def test_an_order_is_pending_until_it_is_carried_out_and_the_last_one_counts(queue, orders):
    await run_through(queue)
    first = await orders.give(APP, Verb.STOP)
    second = await orders.give(APP, Verb.START)
    [app] = await orders.pending()
    assert (app.order, app.ordered, app.desired) == ("start", second, Desired.RUNNING)
    assert second > first
    await orders.obeyed(app, "it is ill")
    assert await orders.pending() == []
    found = await queue.get_app(ORG, APP)
    assert (found.obeyed, found.order_error) == (second, "it is ill")


async def test_what_never_served_and_what_does_not_exist_takes_no_orders(queue, orders):
    with pytest.raises(NothingToRun):
        await orders.give(APP, Verb.STOP)
    await submit(queue)
    with pytest.raises(NothingToRun):
        await orders.give(APP, Verb.START)


async def test_a_deployment_that_begins_to_serve_makes_earlier_orders_void(queue, orders):
    await run_through(queue)
    await orders.give(APP, Verb.STOP)
    await run_through(queue)
    app = await queue.get_app(ORG, APP)
    assert (app.desired, app.obeyed) == (Desired.RUNNING, app.ordered)
    assert await orders.pending() == []


async def test_the_last_three_healthy_deployments_can_be_gone_back_to_without_a_build(queue, orders):
    done = [await run_through(queue, settings_version=number) for number in range(5)]
    app = await queue.get_app(ORG, APP)
    assert kept_ids(app) == [deployment.id for deployment in done[2:]]
    made = await orders.roll_back(app, "", user_id="u2")
    assert (made.rollback_of, made.user_id, made.state) == (done[3].id, "u2", DeploymentState.QUEUED)
    assert (made.archive_sha256, made.settings_version, made.kind) == ("ab" * 32, 3, "static")
    with pytest.raises(DeploymentInProgress):
        await orders.roll_back(app, done[2].id, user_id="u")
    claim = await taken(queue, Stage.START)
    assert claim.deployment_id == made.id
    await queue.advance(claim, DeploymentState.STARTING)
    await queue.finish(claim, DeploymentState.RUNNING, url="http://x/")
    app = await queue.get_app(ORG, APP)
    assert kept_ids(app) == [done[3].id, done[4].id, made.id]
    assert (await queue.get(ORG, done[4].id)).state is DeploymentState.REPLACED
    for target in (done[0].id, made.id, "dep_nonsense"):
        with pytest.raises(ReleaseNotKept):
            await orders.roll_back(app, target, user_id="u")


async def test_an_application_with_one_release_cannot_go_back(queue, orders):
    await run_through(queue)
    with pytest.raises(ReleaseNotKept):
        await orders.roll_back(await queue.get_app(ORG, APP), "", user_id="u")


async def test_the_environment_of_kept_releases_stays_as_it_was_when_a_new_one_is_set(queue, orders, redis):
    await run_through(queue)
    for number in range(1, 8):
        assert await orders.put_env(APP, {"N": str(number)}) == number
        if number in {2, 3}:
            await run_through(queue, settings_version=number)
    kept = {int(version) for version in await redis.hkeys(f"deploy:{{{APP}}}:env")}
    assert kept == {2, 3, 6, 7}
    assert await orders.env(APP, 2) == {"N": "2"}
    assert await orders.env(APP, 0) == {}
    assert await orders.put_env(app_id_of_session("cs_none"), {"N": "1"}) == 0


async def test_how_a_release_is_is_only_told_of_the_one_that_serves(queue, orders):
    old = await run_through(queue)
    new = await run_through(queue)
    await orders.report(APP, old.id, Health.CRASH_LOOPING, "old", 9)
    assert (await queue.get_app(ORG, APP)).health is Health.RUNNING
    await orders.report(APP, new.id, Health.CRASH_LOOPING, "it ended with status 3", 2)
    app = await queue.get_app(ORG, APP)
    assert (app.health, app.health_reason, app.restarts) == (Health.CRASH_LOOPING, "it ended with status 3", 2)


async def test_a_removed_application_leaves_nothing_but_its_fence_and_can_be_made_again(queue, orders, redis):
    await run_through(queue)
    await LogStore(redis).append(Log(APP), [b"x"], source="s", at="", then="1")
    await orders.put_env(APP, {"A": "1"})
    waiting = await submit(queue)
    await orders.give(APP, Verb.REMOVE)
    app = await queue.get_app(ORG, APP)
    assert not await orders.forget(app), "a deployment is in progress"
    with pytest.raises(AppIsRemoved):
        await submit(queue)
    with pytest.raises(AppIsRemoved):
        await orders.give(APP, Verb.START)
    await queue.request_cancel(waiting.id)
    assert [found.id for found in await orders.pending()] == [APP]
    assert await orders.forget(app)
    assert await queue.get_app(ORG, APP) is None
    assert await queue.list_apps(ORG) == []
    assert await orders.pending() == []
    fence = int(await redis.hget(f"deploy:{{{APP}}}", "fence"))
    left = [key.decode() async for key in redis.scan_iter("deploy:{*")]
    assert left == [f"deploy:{{{APP}}}"]
    await submit(queue)
    assert (await taken(queue, Stage.ARCHIVE)).token > fence
