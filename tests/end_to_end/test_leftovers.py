"""Sessions that end at bad moments: no process, no folder and no entry in the store is left of any of them."""

import asyncio
import contextlib
import time

import aiohttp
import psutil
import pytest

from orchestrator.store.connection import connect
from tests.end_to_end.harness import Serve, SessionClient, fetch

# Each leaves its shell in another way, and by its number of seconds it is found again among all processes.
DAEMONS = """\
setsid sleep {0}1 </dev/null >/dev/null 2>&1 &
nohup sleep {0}2 </dev/null >/dev/null 2>&1 &
( (sleep {0}3 </dev/null >/dev/null 2>&1 &) & )
env -i setsid sleep {0}4 </dev/null >/dev/null 2>&1 &
( (env -i setsid nohup sleep {0}5 </dev/null >/dev/null 2>&1 &) & )
setsid bash -c 'trap "" TERM HUP INT; (trap "" TERM HUP INT; exec env -i sleep {0}6) & disown; exit' &
"""
DAEMONS_EACH = 6


def sleeping(number):
    """The daemons of this number, whatever their environment and parent are."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if command[:1] == ["sleep"] and command[1].startswith(str(number)):
                found.append(process)
    return found


def children_of(serve):
    return {process.pid for process in psutil.Process(serve.process.pid).children(recursive=True)}


async def live_ids(serve):
    async with connect(serve.data_dir / "run" / "store.sock") as store:
        return await store.smembers("cs:sessions:live")


async def nothing_is_left(serve, within_s=0.0):
    """Of any session: at once, or within some seconds where nobody was told that it is over."""
    deadline = time.monotonic() + within_s
    while True:
        workspaces = [path.name for path in (serve.data_dir / "workspaces").glob("*")]
        sidecars = [process for process in serve.processes() if "sidecar" in process.cmdline()]
        live = await live_ids(serve)
        if not workspaces and not sidecars and not live:
            return
        assert time.monotonic() < deadline, (workspaces, sidecars, live)
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("after_ms", [0, 5, 20, 50, 80, 120, 160, 220, 300])
async def test_a_session_deleted_while_it_is_created_leaves_nothing(shared_serve, client, after_ms):
    session = await client.create("deleted")
    await asyncio.sleep(after_ms / 1000)
    await session.delete()
    await nothing_is_left(shared_serve)
    assert (await session.show())["status"] == "completed"
    await asyncio.sleep(0.3)  # nothing of the creation goes on behind it
    await nothing_is_left(shared_serve)
    assert (await session.show())["status"] == "completed"


async def test_sessions_deleted_at_all_moments_of_their_creation_leave_nothing(shared_serve, client):
    async def one(place):
        session = await client.create("deleted")
        await asyncio.sleep(place * 0.01)
        await session.delete()
        return session

    sessions = await asyncio.gather(*(one(place) for place in range(16)))
    await nothing_is_left(shared_serve)
    assert {(await session.show())["status"] for session in sessions} == {"completed"}


async def test_deleting_twice_at_once_and_again_is_one_deletion(shared_serve, client):
    for started in (False, True):
        session = await client.create("deleted")
        if started:
            await session.run("sleep 1000 &")
        answers = await asyncio.gather(*(client.call("DELETE", session.path) for _ in range(5)))
        assert [answer.status for answer in answers] == [204] * 5
        await nothing_is_left(shared_serve)
        shown = await session.show()
        assert shown["status"] == "completed"
        await session.delete()
        assert await session.show() == shown


async def test_input_posted_while_it_is_created_and_then_deleted_gets_a_true_answer(shared_serve, client):
    for after_ms in (0, 30, 100):
        session = await client.create("deleted")
        typing = asyncio.create_task(client.call("POST", f"{session.path}/input", {"text": "echo typed\n"}))
        await asyncio.sleep(after_ms / 1000)
        await session.delete()
        answer = await asyncio.wait_for(typing, 5)
        assert (answer.status, answer.json.get("code")) in {(200, None), (409, "session-ended")}, answer
        await nothing_is_left(shared_serve)


async def until_settled(client, deployment_id, timeout_s=60):
    async with asyncio.timeout(timeout_s):
        while True:
            shown = (await client.call("GET", f"deployments/{deployment_id}")).json
            if shown["status"] != "deploying":
                return shown
            await asyncio.sleep(0.1)


async def test_a_deployment_asked_for_while_the_session_is_created_ends_with_the_truth(client):
    session = await client.create("early")
    deployment = await session.deploy()  # of an empty folder: there is nothing to run
    assert deployment["status"] == "failed"
    assert deployment["reason"]
    await session.run("echo '<p>later' > index.html")
    assert (await session.deploy())["status"] == "running"
    await session.delete()


async def test_two_deployments_in_a_row_both_end_with_the_truth_and_the_application_serves_the_newer(client):
    session = await client.create("twice")
    await session.run("echo '<p>first' > index.html")
    first = await client.call("POST", f"{session.path}/deploy")
    second = await client.call("POST", f"{session.path}/deploy")
    third = await client.call("POST", f"{session.path}/deploy")
    assert len({answer.json["appId"] for answer in (first, second, third)}) == 1
    ended = [await until_settled(client, answer.json["deploymentId"]) for answer in (first, second, third)]
    assert ended[2]["status"] == "running", ended
    for deployment in ended[:2]:
        assert deployment["status"] in {"running", "replaced", "superseded"}, ended
        assert (deployment["status"] == "superseded") == ("supersededBy" in deployment)
    app = (await client.call("GET", f"apps/{first.json['appId']}")).json
    assert (app["status"], app["currentDeploymentId"]) == ("running", third.json["deploymentId"])
    assert await fetch(app["url"]) == (200, "<p>first\n")
    await session.delete()
    assert await fetch(app["url"]) == (200, "<p>first\n")


async def test_a_deployment_and_the_end_of_its_session_at_once_leave_no_open_question(shared_serve, client):
    for pause_s in (0, 0.02, 0.1):
        session = await client.create("leaving")
        await session.run("echo '<p>last' > index.html; head -c 20000000 /dev/urandom > big.bin")
        answer = await client.call("POST", f"{session.path}/deploy")
        await asyncio.sleep(pause_s)
        await session.delete()
        await nothing_is_left(shared_serve)
        deployment = await until_settled(client, answer.json["deploymentId"])
        assert deployment["status"] in {"running", "failed"}, deployment
        if deployment["status"] == "failed":
            assert "ended" in deployment["reason"]
        again = await client.call("POST", f"{session.path}/deploy")
        assert (again.status, again.json["code"]) == (409, "session-ended")


async def test_twenty_sessions_with_daemons_that_are_deleted_at_once_leave_nothing(shared_serve, client):
    number = 5_000_000 + time.monotonic_ns() % 1_000_000
    sessions = await asyncio.gather(*(client.create(f"many-{place}") for place in range(20)))
    await asyncio.gather(*(session.run(DAEMONS.format(number), 60) for session in sessions))
    async with asyncio.timeout(10):
        while len(sleeping(number)) < 20 * DAEMONS_EACH:
            await asyncio.sleep(0.1)
    await asyncio.gather(*(session.delete() for session in sessions))
    assert sleeping(number) == []
    await nothing_is_left(shared_serve)
    for session in sessions:
        assert (await session.show())["status"] == "completed"
        assert (await client.call("GET", f"{session.path}/output")).json["chunks"]


async def test_a_client_that_leaves_in_the_middle_of_its_delete_has_deleted(shared_serve, client):
    number = 6_000_000 + time.monotonic_ns() % 1_000_000
    for patience_s in (0.001, 0.02, 0.1):
        session = await client.create("left")
        await session.run(DAEMONS.format(number), 30)
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            await client.call("DELETE", session.path, timeout_s=patience_s)
        await client.call("GET", session.path)
        if patience_s > 0.01:  # a request that did not leave the client deletes nothing
            await session.until_status("completed", 10)
        await session.delete()
        assert sleeping(number) == []
        await nothing_is_left(shared_serve)


async def test_a_workspace_with_obstinate_files_is_removed(shared_serve, client):
    session = await client.create("obstinate")
    await session.run(
        "mkdir -p locked/below; touch locked/below/file; chmod 0 locked/below/file locked/below locked; "
        "ln -s / root; ln -s loop loop; mkfifo pipe; touch $'new\\nline' $'\\xff'; "
        "d=deep; for i in $(seq 50); do d=$d/deeper; done; mkdir -p $d"
    )
    await session.delete()
    await nothing_is_left(shared_serve)


async def test_a_shell_that_ended_before_the_delete_leaves_no_daemon(shared_serve, client):
    number = 7_000_000 + time.monotonic_ns() % 1_000_000
    session = await client.create("exited")
    await session.run(DAEMONS.format(number), 30)
    await session.send("exit\n")
    await session.until_state("exited")
    assert sleeping(number)
    await session.delete()
    assert sleeping(number) == []
    await nothing_is_left(shared_serve)


async def test_a_fork_bomb_of_short_lived_processes_ends_with_its_session(shared_serve, client):
    number = 8_000_000 + time.monotonic_ns() % 1_000_000
    session = await client.create("restless")
    await session.run(
        f"cat > again.sh <<'EOF'\ntrap '' HUP TERM\nsleep {number} & sleep 0.02; kill $!\n"
        "setsid bash again.sh </dev/null >/dev/null 2>&1 &\nEOF\n"
        "for i in 1 2 3; do setsid bash again.sh </dev/null >/dev/null 2>&1 & done",
        30,
    )
    await asyncio.sleep(0.3)
    await session.delete()
    await asyncio.sleep(0.3)
    assert sleeping(number) == []
    assert not [process for process in shared_serve.processes() if "again.sh" in process.cmdline()]
    await nothing_is_left(shared_serve)


@pytest.fixture
def hasty_serve(tmp_path):
    """No session comes up within its time."""
    serve = Serve(tmp_path / "data", CODE_SESSIONS_CREATE_TIMEOUT_S="0.01").start()
    yield serve
    serve.stop()


async def test_a_session_that_does_not_come_up_fails_with_a_reason_and_leaves_nothing(hasty_serve):
    async with hasty_serve.client() as client:
        sessions = [await client.create("late") for _ in range(3)]
        typing = asyncio.create_task(client.call("POST", f"{sessions[0].path}/input", {"text": "x"}))
        for session in sessions:
            shown = await session.until_status("failed", 15)
            assert "did not come up" in shown["statusReason"]
            assert shown["terminal"]["state"] == "lost"
        assert (await typing).json["code"] == "session-ended"
        await nothing_is_left(hasty_serve)
        assert [(await client.call("DELETE", session.path)).status for session in sessions] == [204] * 3
        assert {(await session.show())["status"] for session in sessions} == {"failed"}


async def test_a_workspace_that_cannot_be_made_fails_with_a_reason_and_leaves_nothing(serve):
    folder = serve.data_dir / "workspaces"
    async with serve.client() as client:
        folder.rmdir() if folder.exists() else None
        folder.write_text("somebody's file")
        session = await client.create("impossible")
        shown = await session.until_status("failed", 15)
        assert "could not be started" in shown["statusReason"]
        folder.unlink()
        await nothing_is_left(serve, within_s=5)
        fresh = await client.create("possible")
        _, status = await fresh.run("true")
        assert status == 0
        await fresh.delete()
        await nothing_is_left(serve)


async def test_serve_that_is_stopped_or_killed_in_the_middle_of_creates_and_deletes_leaves_nothing(serve):
    async with serve.client() as client:
        for end in (serve.stop, serve.kill):
            kept = await client.create("kept")
            await kept.run("true")
            deleted = [await client.create("deleted") for _ in range(3)]
            for session in deleted[:2]:
                await session.run("sleep 1000 &")
            deleting = [asyncio.create_task(client.call("DELETE", session.path)) for session in deleted]
            await asyncio.sleep(0.03)
            await asyncio.to_thread(end)
            await asyncio.gather(*deleting, return_exceptions=True)
            serve.start()
            for session in deleted:
                again = SessionClient(client, session.id)
                await again.delete()
                assert (await again.show())["status"] == "completed"
            await kept.run("true")
            await kept.delete()
            await nothing_is_left(serve, within_s=3)
