"""Deployments and applications through the REST API, with a real control plane, worker and gateway."""

import asyncio
import json

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


async def events(client, path, **headers):
    """The events of a stream until it ends: (name, id, data)."""
    found, fields = [], {}
    async with client._http.get(f"{client.origin}/api/v1/{path}", headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        async for line in answer.content:
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name in {"event", "id", "data"}:
                fields[name] = value
            elif not name and fields:
                found.append((fields["event"], fields.get("id", ""), json.loads(fields["data"])))
                fields = {}
    return found


async def test_the_log_of_a_deployment_is_followed_as_events_until_it_settles_and_resumed(client):
    session = await client.create("events")
    await write(session, "Procfile", "web: x")
    await write(session, "package.json", '{"scripts": {"build": "echo one; sleep 1; echo two; sleep 1; exit 3"}}')
    deployment_id = await begin(session)
    path = f"deployments/{deployment_id}/logs/stream"
    async with asyncio.timeout(60):
        live = await events(client, path)
    *chunks, (last, last_id, end) = live
    text = "".join(data["text"] for _, _, data in chunks)
    assert "\none\n" in text
    assert "\ntwo\n" in text
    assert (last, end) == ("end", {"status": "failed"})
    assert [name for name, _, _ in chunks] == ["output"] * len(chunks)
    assert [event_id for _, event_id, _ in chunks] == [str(number) for number in range(1, len(chunks) + 1)]
    assert last_id == f"{len(chunks)}-end"
    assert await events(client, path, **{"Last-Event-ID": "1"}) == live[1:]
    over = await client.call("GET", path, headers={"Last-Event-ID": last_id})
    assert over.status == 204
    wrong = await client.call("GET", path, headers={"Last-Event-ID": "x"})
    assert wrong.status == 400


async def test_the_log_of_an_application_is_followed_as_events(client):
    session = await client.create("app-events")
    await write_server(session, "one")
    deployed = await session.deploy()
    seen = ""
    url = f"{client.origin}/api/v1/apps/{deployed['appId']}/logs/stream"
    async with asyncio.timeout(30), client._http.get(url) as answer:
        async for line in answer.content:
            seen += line.decode()
            if "up none" in seen:
                break
    assert deployed["id"] in seen


@pytest.mark.parametrize(
    "path", ["deployments/dep_x/logs", "apps/app_x/logs", "deployments/dep_x/logs/stream", "apps/app_x/logs/stream"]
)
async def test_an_unknown_log_is_404(client, path):
    answer = await client.call("GET", path)
    assert (answer.status, answer.json["code"].rpartition("-")[2]) == (404, "found")


async def app_of(client, app_id):
    return (await client.call("GET", f"apps/{app_id}")).json


async def test_an_application_is_stopped_started_restarted_and_removed(client, shared_serve):
    session = await client.create("orders")
    await write_server(session, "one")
    deployed = await session.deploy()
    app_id, url = deployed["appId"], deployed["url"]

    for _ in range(2):  # what is so already is true at once
        stopped = await client.call("POST", f"apps/{app_id}/stop")
        assert (stopped.status, stopped.json["status"]) == (200, "stopped")
    status, page = await fetch(url)
    assert (status, "stopped by its owner" in page) == (503, True)
    for verb in ("start", "start", "restart"):
        started = await client.call("POST", f"apps/{app_id}/{verb}")
        assert (started.status, started.json["status"]) == (200, "running"), started
        assert await fetch(url) == (200, "one none")

    removed = await client.call("DELETE", f"apps/{app_id}")
    assert removed.status == 204
    assert (await client.call("GET", f"apps/{app_id}")).status == 404
    assert (await client.call("GET", f"deployments/{deployed['id']}")).status == 404
    assert (await fetch(url))[0] == 404
    assert not (shared_serve.data_dir / "apps" / app_id).exists()
    again = await session.deploy()
    assert (again["state"], again["appId"], again["url"]) == ("running", app_id, url)
    assert await fetch(url) == (200, "one none")


async def test_a_rollback_runs_the_release_before_with_its_own_settings_in_less_than_two_seconds(client):
    session = await client.create("rollback")
    await write_server(session, "one")
    first = await session.deploy()
    app_path = f"apps/{first['appId']}"
    alone = await client.call("POST", f"{app_path}/rollback")
    assert (alone.status, alone.json["code"]) == (409, "release-not-kept")

    secret = await client.call("PUT", f"{app_path}/env", {"env": {"GREETING": "s3cret-value"}})
    assert secret.json == {"appId": first["appId"], "settingsVersion": 1, "envNames": ["GREETING"]}
    assert await fetch(first["url"]) == (200, "one none"), "only the next release picks it up"
    await write_server(session, "two")
    second = await session.deploy()
    assert await fetch(first["url"]) == (200, "two s3cret-value")

    took = []
    for expected in ("one none", "two s3cret-value", "one none"):
        began = asyncio.get_running_loop().time()
        answer = await client.call("POST", f"{app_path}/rollback")
        assert (answer.status, answer.json["state"]) == (200, "running"), answer
        assert await fetch(first["url"]) == (200, expected)
        took.append(asyncio.get_running_loop().time() - began)
    assert min(took) < 2, took
    shown = await app_of(client, first["appId"])
    assert len(shown["keptDeploymentIds"]) == 3
    named = await client.call("POST", f"{app_path}/rollback", {"deploymentId": shown["keptDeploymentIds"][1]})
    assert named.json["rollbackOf"] == shown["keptDeploymentIds"][1]
    assert await fetch(first["url"]) == (200, "two s3cret-value")
    for path in (app_path, f"{app_path}/deployments", f"deployments/{second['id']}", "apps"):
        assert b"s3cret" not in (await client.call("GET", path)).raw


async def test_an_application_that_crashes_again_and_again_says_so(client):
    session = await client.create("crashes")
    await write(
        session,
        "main.py",
        SERVER.replace("if __name__", "").replace(
            "ThreadingHTTPServer((",
            "import threading; threading.Timer(2.5, lambda: os._exit(3)).start()\nThreadingHTTPServer((",
        ),
    )
    deployed = await session.deploy()
    assert deployed["state"] == "running", deployed
    async with asyncio.timeout(40):
        while (shown := await app_of(client, deployed["appId"]))["status"] != "crash-looping":
            await asyncio.sleep(0.2)
    assert shown["statusReason"] == "it ended with status 3"
    assert shown["restarts"] >= 2
    assert shown["deployment"]["state"] == "running"
    assert (await client.call("DELETE", f"apps/{deployed['appId']}")).status == 204


async def test_an_application_is_removed_while_its_deployment_is_in_progress(client):
    session = await client.create("removed")
    await write(session, "Procfile", "web: x")
    await write(session, "package.json", '{"scripts": {"build": "echo begun; sleep 1007"}}')
    deployment_id = await begin(session)
    await read_log(client, f"deployments/{deployment_id}/logs", "\nbegun\n")
    app_id = (await client.call("GET", f"deployments/{deployment_id}")).json["appId"]
    refused = await client.call("POST", f"apps/{app_id}/start")
    assert (refused.status, refused.json["code"]) == (409, "app-not-deployed")
    busy = await client.call("POST", f"apps/{app_id}/rollback")
    assert (busy.status, busy.json["code"], busy.json["deploymentId"]) == (409, "deployment-in-progress", deployment_id)
    assert (await client.call("DELETE", f"apps/{app_id}")).status == 204
    assert (await client.call("GET", f"apps/{app_id}")).status == 404


@pytest.mark.parametrize(
    "variables", [{"1A": "x"}, {"A-B": "x"}, {"PORT": "1"}, {"A": 1}, {"A": "\0"}, {"A": "x" * 40_000}, {"": ""}]
)
async def test_an_environment_that_cannot_be_one_is_refused_without_repeating_it(client, variables):
    answer = await client.call("PUT", "apps/app_x/env", {"env": variables})
    assert (answer.status, answer.json["code"]) == (400, "invalid-request")
    assert b"xxxx" not in answer.raw
