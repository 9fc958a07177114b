"""Deployments and applications through the REST API, with a real control plane, worker and gateway."""

import asyncio

import pytest

from tests.end_to_end.harness import fetch

SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
print("up", os.environ.get("GREETING", "none"), flush=True)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = "VERSION {}".format(os.environ.get("GREETING", "none")).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Handler).serve_forever()
"""


async def write(session, name, text):
    _, status = await session.run(f"cat > {name} <<'END_OF_FILE'\n{text}\nEND_OF_FILE\n")
    assert status == 0


async def write_server(session, version):
    await write(session, "main.py", SERVER.replace("VERSION", version))


async def begin(session, **headers):
    answer = await session.client.call("POST", f"{session.path}/deploy", headers=headers)
    assert answer.status == 200, answer
    return answer.json["deploymentId"]


async def until_state(client, deployment_id, *states, timeout_s=60):
    async with asyncio.timeout(timeout_s):
        while (shown := (await client.call("GET", f"deployments/{deployment_id}")).json)["state"] not in states:
            await asyncio.sleep(0.1)
    return shown


async def read_log(client, path, until, timeout_s=30):
    """Follow a log with `afterSeq` and `wait` until the text stands in it."""
    text, after = "", 0
    async with asyncio.timeout(timeout_s):
        while until not in text:
            page = (await client.call("GET", f"{path}?afterSeq={after}&wait=10")).json
            assert [chunk["seq"] for chunk in page["chunks"]] == list(range(after + 1, after + 1 + len(page["chunks"])))
            text += "".join(chunk["text"] for chunk in page["chunks"])
            after = page["lastSeq"]
    return text, after


async def test_a_build_is_followed_live_and_cancelled_and_a_repeated_request_finds_it(client):
    session = await client.create("hangs")
    await write(session, "Procfile", "web: x")
    await write(session, "package.json", '{"scripts": {"build": "echo begun; sleep 1006"}}')
    deployment_id = await begin(session, **{"Idempotency-Key": "once"})
    await read_log(client, f"deployments/{deployment_id}/logs", "\nbegun\n")
    assert await begin(session, **{"Idempotency-Key": "once"}) == deployment_id

    cancelled = await client.call("POST", f"deployments/{deployment_id}/cancel")
    assert (cancelled.status, cancelled.json["state"]) == (200, "cancelled")
    assert list(cancelled.json["times"]) == ["queued", "archiving", "building", "cancelled"]
    again = await client.call("POST", f"deployments/{deployment_id}/cancel")
    assert (again.status, again.json["state"]) == (200, "cancelled")
    page = (await client.call("GET", f"deployments/{deployment_id}/logs?afterSeq=999&wait=30", timeout_s=5)).json
    assert page["chunks"] == []
    await session.delete()


async def test_what_a_running_application_writes_can_be_read_and_it_cannot_be_cancelled(client):
    session = await client.create("logs")
    await write_server(session, "one")
    deployed = await session.deploy()
    assert deployed["state"] == "running", deployed
    await read_log(client, f"apps/{deployed['appId']}/logs", "up none")
    assert await fetch(deployed["url"]) == (200, "one none")
    page = (await client.call("GET", f"apps/{deployed['appId']}/logs")).json
    assert {chunk["deploymentId"] for chunk in page["chunks"]} == {deployed["id"]}
    refused = await client.call("POST", f"deployments/{deployed['id']}/cancel")
    assert (refused.status, refused.json["code"], refused.json["state"]) == (409, "deployment-settled", "running")


@pytest.mark.parametrize("path", ["deployments/dep_x/logs", "apps/app_x/logs"])
async def test_an_unknown_log_is_404(client, path):
    answer = await client.call("GET", path)
    assert (answer.status, answer.json["code"].rpartition("-")[2]) == (404, "found")
