"""The whole way on a Redis Cluster: keys of one session share a slot, and nothing else is asked for together."""

import re

import pytest

from tests.end_to_end.harness import Serve
from tests.orchestrator.store.cluster import running_cluster


@pytest.fixture
def serve(tmp_path):
    with running_cluster(tmp_path) as url:
        serve = Serve(tmp_path / "data", CODE_SESSIONS_REDIS_URL=url).start()
        yield serve
        serve.stop()
        serve.remove_all()


async def test_sessions_output_input_and_keys_work_on_a_cluster(serve):
    async with serve.client() as client:
        sessions = [await client.create(f"on a cluster {place}") for place in range(6)]  # in different slots
        for session in sessions:
            text, status = await session.run("seq 1 20000")
            assert status == 0
            assert re.findall(r"^(\d+)\r?$", text, re.MULTILINE)[-19999:] == [str(n) for n in range(2, 20001)]
        listed = (await client.call("GET", "code-sessions")).json["sessions"]
        assert {session["id"] for session in listed} == {session.id for session in sessions}
        once = {"Idempotency-Key": "once"}
        for _ in range(2):
            await sessions[0].send("echo n=$((++n))\n", **once)
        text, _ = await sessions[0].run("echo total=$n")
        assert "total=1" in text
        deployment = await client.call("POST", f"{sessions[0].path}/deploy")
        assert deployment.status == 200
        found = await client.call("GET", f"deployments/{deployment.json['deploymentId']}")
        assert found.status == 200
        assert (await client.call("GET", "/readyz")).status == 200
        assert (await client.call("GET", "code-sessions", headers={"X-API-Key": "wrong"})).status in {400, 401}
        for session in sessions:
            await session.delete()
            assert (await session.show())["status"] == "completed"
