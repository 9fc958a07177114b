"""Every call works on every replica: one of the two holds the session's link, and no client knows which."""

import asyncio
import json
import time

import aiohttp

from tests.end_to_end.harness import ADMIN_KEY, SessionClient
from tests.end_to_end.test_proof_replicas import two_replicas


async def test_each_call_about_a_session_works_on_both_replicas(tmp_path):
    async with two_replicas(tmp_path) as replicas:
        created = await replicas.create("anywhere")
        for place, replica in enumerate(replicas.replicas):
            async with replica.client() as client:
                session = SessionClient(client, created.id)
                session.after = (await client.call("GET", f"{session.path}/output?afterSeq={2**40}")).json["lastSeq"]
                text, status = await session.run(f"echo here-{place}")
                assert (status, f"here-{place}\r\n" in text) == (0, True)
                size = {"cols": 100 + place, "rows": 30}
                resized = await client.call("POST", f"{session.path}/resize", size)
                assert (resized.status, resized.json["terminal"]["cols"]) == (200, 100 + place)
                await session.run("stty size; true")
                await session.send("sleep 100\n")
                await asyncio.sleep(0.3)
                signalled = await client.call("POST", f"{session.path}/signal", {"signal": "SIGINT"})
                assert signalled.json == {"sent": True}
                _, status = await session.run("true")
                assert status == 0
                recording = await client.call("GET", f"{session.path}/recording")
                assert f"here-{place}".encode() in recording.raw
                await session.send(f"exit {place}\n")
                await session.until_state("exited")
                started = await client.call("POST", f"{session.path}/terminal")
                assert (started.status, started.json["terminal"]["state"]) == (201, "running")
                assert await _typed_over_a_socket(replica.port, session.id) == b"so-cket"
                assert await _first_event(replica.port, session.id) == 1
        clients = replicas._clients
        session = SessionClient(clients[0], created.id)
        await session.run("echo '<h1>anywhere</h1>' > index.html")
        for client in clients:  # an archive is fetched by whichever replica takes the job
            deployed = SessionClient(client, created.id)
            deployment = await client.call("POST", f"{deployed.path}/deploy")
            assert deployment.status == 200
        await SessionClient(clients[1], created.id).delete()
        assert (await SessionClient(clients[0], created.id).show())["status"] == "completed"


async def test_a_poll_held_at_the_replica_without_the_link_is_woken_within_milliseconds(tmp_path):
    async with two_replicas(tmp_path) as replicas:
        created = await replicas.create("quick")
        delays_s = {}
        for place, client in enumerate(replicas._clients):
            session = SessionClient(client, created.id)
            session.after = (await client.call("GET", f"{session.path}/output?afterSeq={2**40}")).json["lastSeq"]
            await session.run("stty -echo; PS1=; true")
            times = []
            for number in range(20):
                after = session.after
                held = asyncio.create_task(client.call("GET", f"{session.path}/output?afterSeq={after}&wait=20"))
                await asyncio.sleep(0.05)
                typed = time.monotonic()
                await session.send(f"echo {number}\n")
                answer = await held
                times.append(time.monotonic() - typed)
                assert answer.json["chunks"]
                session.after = answer.json["lastSeq"]
            delays_s[place] = sorted(times)[len(times) // 2]
        # Far below the second look of a waiter that is told nothing, however slow the machine.
        assert max(delays_s.values()) < 0.2, delays_s


async def _typed_over_a_socket(port, session_id):
    headers = {"X-API-Key": ADMIN_KEY}
    url = f"ws://127.0.0.1:{port}/pty/{session_id}?tailBytes=0"
    shown = b""
    async with aiohttp.ClientSession(headers=headers) as http, http.ws_connect(url) as socket:
        await socket.send_str("echo so''-cket\n")
        async with asyncio.timeout(20):
            while b"so-cket" not in shown:
                shown += await socket.receive_bytes()
    return b"so-cket"


async def _first_event(port, session_id):
    url = f"http://127.0.0.1:{port}/api/v1/code-sessions/{session_id}/output/stream"
    async with aiohttp.ClientSession(headers={"X-API-Key": ADMIN_KEY}) as http, http.get(url) as answer:
        async for line in answer.content:
            if line.startswith(b"data: "):
                return json.loads(line[6:])["seq"]
    return None
