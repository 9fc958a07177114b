"""`kill -9` of everything at once, and of the store, in the middle of a deployment: a true state within a minute."""

import asyncio
import time

import pytest

from tests.end_to_end.harness import fetch
from tests.end_to_end.test_deployments import begin, until_state, write, write_server

WITHIN_S = 60


async def prepared(client, state):
    """A session whose application serves "one", and whose next deployment is "two" and takes its time in the state."""
    session = await client.create("crashes")
    await write_server(session, "one")
    first = await session.deploy()
    assert first["state"] == "running", first
    await write_server(session, "two")
    if state == "archiving":
        _, status = await session.run("head -c 120000000 /dev/urandom > big")
        assert status == 0
    elif state == "building":
        await write(session, "deploy.toml", 'kind = "python"\nbuild = "sleep 3"')
    elif state == "starting":
        await session.run("sed -i '1i import time; time.sleep(3)' main.py")
    return session, first


async def settled(client, deployment_id):
    shown = await until_state(client, deployment_id, "running", "failed", "cancelled", "superseded", timeout_s=WITHIN_S)
    assert (shown["state"], shown.get("reason")) == ("running", None)
    return shown


def applications(serve):
    """Processes of applications and builds: their environment names a deployment."""
    return [process for process in serve.processes() if "CODE_SESSIONS_RELEASE" in process.environ()]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("state", ["queued", "archiving", "building", "starting"])
async def test_a_deployment_is_finished_after_everything_was_killed(serve, state):
    async with serve.client() as client:
        session, first = await prepared(client, state)
        deployment_id = await begin(session)
        if state != "queued":  # as soon as it was answered
            await until_state(client, deployment_id, state, timeout_s=30)
        serve.restart()
        began = time.monotonic()
        shown = await settled(client, deployment_id)
        assert time.monotonic() - began < WITHIN_S
        assert await fetch(shown["url"]) == (200, "two none")
        listed = (await client.call("GET", f"apps/{first['appId']}/deployments")).json["deployments"]
        assert [found["state"] for found in listed] == ["running", "replaced"]
        assert (await client.call("DELETE", f"apps/{first['appId']}")).status == 204
        assert applications(serve) == []
        assert list((serve.data_dir / "apps").glob("app_*")) == []
        await session.delete()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("state", ["archiving", "building", "starting"])
async def test_a_deployment_is_finished_after_the_store_was_killed(serve, state):
    async with serve.client() as client:
        session, first = await prepared(client, state)
        deployment_id = await begin(session)
        await until_state(client, deployment_id, state, timeout_s=30)
        await asyncio.sleep(1.1)  # the store writes to disk every second: what is younger is not promised
        serve.store().kill()
        async with asyncio.timeout(30):
            while (await client.call("GET", "/readyz")).status != 200:
                await asyncio.sleep(0.1)
        shown = await settled(client, deployment_id)
        assert await fetch(shown["url"]) == (200, "two none")
        assert (await client.call("GET", f"apps/{first['appId']}")).json["status"] == "running"
        assert (await client.call("DELETE", f"apps/{first['appId']}")).status == 204
        assert applications(serve) == []
        await session.delete()
