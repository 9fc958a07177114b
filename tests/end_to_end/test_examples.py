"""The examples as a newcomer uses them: typed into a workspace's terminal, previewed, deployed, opened at their URL."""

import base64
import io
import re
import tarfile

import aiohttp
import pytest

from tests.end_to_end.conftest import on_both_runtimes
from tests.end_to_end.harness import fetch
from tests.end_to_end.tour import ROOT

EXAMPLES = ROOT / "examples"
DEPLOY_S = 170


async def typed_in(client, name):
    """A session whose workspace has the example's files, brought there by what is typed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in sorted((EXAMPLES / name).rglob("*")):
            relative = path.relative_to(EXAMPLES / name)
            if path.is_file() and not {"node_modules", "dist", "__pycache__"} & set(relative.parts):
                archive.add(path, arcname=str(relative))
    session = await client.create(name)
    text = base64.encodebytes(buffer.getvalue()).decode()
    _, status = await session.run(f"base64 -d <<'END' | tar xz\n{text}END")
    assert status == 0
    return session


async def deployed(client, name, kind):
    """The URL of the deployed example, which the preview has announced."""
    session = await typed_in(client, name)
    preview = await client.call("GET", f"{session.path}/deploy/preview")
    assert (preview.status, preview.json.get("kind")) == (200, kind), preview
    done = await session.deploy(DEPLOY_S)
    assert (done["status"], done["kind"]) == ("running", kind), done
    return done["url"]


async def call(url, method, path, body=None):
    """Status, content type and body of an application's answer."""
    host = re.match(r"http://([^/:]+)", url)[1]
    address = url.replace(host, "127.0.0.1", 1).rstrip("/") + path
    async with aiohttp.ClientSession() as http, http.request(method, address, json=body, headers={"Host": host}) as got:
        data = await got.read()
        return got.status, await got.json() if got.content_type == "application/json" else data


@on_both_runtimes("shared_serve")
async def test_the_marketing_site(client):
    url = await deployed(client, "marketing-site", "static")
    status, page = await fetch(url)
    assert status == 200
    assert "<title>Lantern Coffee</title>" in page
    status, style = await fetch(url + "assets/site.css")
    assert status == 200
    assert ".button" in style


@on_both_runtimes("shared_serve")
async def test_the_backing_track_service_makes_midi(client):
    url = await deployed(client, "backing-track", "python")
    wishes = {"genre": "blues", "key": "A", "mode": "minor", "tempo": 110, "sections": 1, "with_keys": True}
    status, made = await call(url, "POST", "/sessions", wishes)
    assert (status, made["status"], sorted(made)) == (201, "pending", ["created_at", "id", "status"])
    path = f"/sessions/{made['id']}"
    assert (await call(url, "GET", f"{path}/export"))[0] == 409
    status, ran = await call(url, "POST", f"{path}/run")
    assert (status, ran["status"]) == (200, "completed")
    short = made["id"][:8]
    assert ran["files"] == [f"output/{short}_{part}.mid" for part in ("drums", "bass", "guitar", "keys", "full")]
    assert (await call(url, "POST", f"{path}/run"))[0] == 409
    status, shown = await call(url, "GET", path)
    assert (shown["genre"], shown["tempo"], shown["status"]) == ("blues", 110, "completed")
    status, tracks = await call(url, "GET", f"{path}/tracks")
    assert {track["instrument"]: track["channel"] for track in tracks} == {
        "drums": 9,
        "bass": 1,
        "guitar": 2,
        "keys": 3,
    }
    status, midi = await call(url, "GET", f"{path}/export")
    assert status == 200
    # 1 tempo track and 4 instruments; 12 bars of blues, with a note on channel 9 among them.
    assert midi[:14] == b"MThd\x00\x00\x00\x06\x00\x01\x00\x05\x01\xe0"
    assert midi.count(b"MTrk") == 5
    assert (60_000_000 // 110).to_bytes(3, "big")[:2] in midi
    assert midi.count(b"\x99") > 12 * 4
    assert (await call(url, "POST", "/sessions", {"genre": "polka"}))[0] == 400
    assert (await call(url, "POST", "/sessions", {"tempo": 39}))[0] == 400
    assert (await call(url, "GET", "/sessions/none"))[0] == 404


@on_both_runtimes("shared_serve")
async def test_the_node_application_is_built_from_its_lock_file(client):
    url = await deployed(client, "node-build", "node")
    status, page = await fetch(url)
    assert status == 200
    assert "<em>early</em>" in page
    assert (await fetch(url + "nothing"))[0] == 404


@on_both_runtimes("shared_serve")
async def test_the_procfile_application(client):
    url = await deployed(client, "procfile", "procfile")
    assert await call(url, "POST", "/votes/tea") == (200, {"counted": "tea"})
    assert await call(url, "POST", "/votes/tea") == (200, {"counted": "tea"})
    assert await call(url, "GET", "/") == (200, {"tea": 2})


@pytest.mark.docker
@pytest.mark.parametrize("shared_serve", ["docker"], indirect=True)
async def test_the_dockerfile_application(client):
    url = await deployed(client, "dockerfile", "dockerfile")
    status, page = await fetch(url)
    assert status == 200
    assert "Served by lighttpd" in page


@pytest.mark.parametrize("shared_serve", ["local"], indirect=True)
async def test_the_dockerfile_application_is_refused_by_the_local_runtime(client):
    session = await typed_in(client, "dockerfile")
    preview = await client.call("GET", f"{session.path}/deploy/preview")
    assert (preview.json["deployable"], preview.json["reason"][:20]) == (False, "A Dockerfile project")
    done = await session.deploy()
    assert (done["status"], done["reason"]) == ("failed", preview.json["reason"])
