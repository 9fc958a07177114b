import asyncio
import os
import subprocess
import sys
import textwrap
import time

from conftest import ORG, Pipeline, children_of_release, is_gone, running_worker

from deploy_pipeline.builders.base import BuildLimits
from deploy_pipeline.builders.local import _LOG_CAP_BYTES, _read_log
from deploy_pipeline.builders.processes import MARK
from deploy_pipeline.jobs import DeploymentState, Stage
from deploy_pipeline.logs import Log, LogStore
from deploy_pipeline.worker import WorkerConfig

FLASK = """
import os
from flask import Flask
app = Flask(__name__)
@app.get("/")
def home():
    return "flask %s %s" % (os.environ["PORT"].isdigit(), sorted(n for n in os.environ if "SECRET" in n))
"""
NODE = """
const http = require("http");
http.createServer((q, s) => s.end("node " + process.env.NODE_ENV)).listen(process.env.PORT, process.env.HOST);
"""


def script(body="'hello'", before=""):
    """A plain Python server, which needs no packages."""
    return textwrap.dedent(f"""
        import os, sys, time, subprocess
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
        {before}
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/die":
                    os._exit(3)
                body = str({body}).encode()
                self.send_response(500 if body == b"500" else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
        ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Handler).serve_forever()
    """)


async def test_a_static_site_is_served(local):
    done = await local.deploy({"index.html": "<h1>Hi</h1>", "about/index.html": "about"})
    assert (done.state, done.kind, done.reason) == (DeploymentState.RUNNING, "static", "")
    app = await local.queue.get_app(ORG, done.app_id)
    assert done.url == app.url == f"http://{app.name}.localhost/"
    assert await local.fetch(done) == (200, "<h1>Hi</h1>")
    assert await local.fetch(done, "/about/") == (200, "about")


async def test_a_flask_application_with_requirements_runs_without_the_workers_secrets(local, monkeypatch):
    monkeypatch.setenv("CODE_SESSIONS_SECRET", "x")
    done = await local.deploy({"app.py": FLASK, "requirements.txt": "flask\n"})
    assert (done.state, done.reason) == (DeploymentState.RUNNING, "")
    assert await local.fetch(done) == (200, "flask True []")


async def test_a_node_application_is_built_and_runs(local):
    manifest = '{"name": "x", "scripts": {"build": "cp source.js built.js", "start": "node built.js"}}'
    done = await local.deploy({"package.json": manifest, "source.js": NODE})
    assert (done.state, done.kind, done.reason) == (DeploymentState.RUNNING, "node", "")
    assert await local.fetch(done) == (200, "node production")


async def test_a_procfile_application_runs_its_web_line(local):
    done = await local.deploy(
        {"Procfile": "web: GREETING=hey python run.py\n", "run.py": script("os.environ['GREETING']")}
    )
    assert (done.state, done.kind, done.reason) == (DeploymentState.RUNNING, "procfile", "")
    assert await local.fetch(done) == (200, "hey")


async def test_a_new_release_takes_over_without_a_failed_request_and_the_old_one_is_gone(local):
    first = await local.deploy({"main.py": script("1")})
    stop, answers = asyncio.Event(), []

    async def visit():
        while not stop.is_set():
            answers.append(await local.fetch(first))

    visitor = asyncio.create_task(visit())
    second = await local.deploy({"main.py": script("2")})
    await asyncio.sleep(2.5)
    stop.set()
    await visitor
    assert second.state is DeploymentState.RUNNING
    assert set(answers) == {(200, "1"), (200, "2")}
    assert (await local.queue.get(ORG, first.id)).state is DeploymentState.REPLACED
    assert children_of_release(first.id) == []
    assert children_of_release(second.id) != []


async def test_a_release_that_does_not_get_healthy_fails_with_its_log_and_the_old_one_serves_on(local):
    first = await local.deploy({"main.py": script("1")})
    ended = await local.deploy({"main.py": "print('boom', flush=True)\nraise SystemExit(4)"})
    assert ended.state is DeploymentState.FAILED
    assert "status 4" in ended.reason
    assert "boom" in ended.log_tail
    sick = await local.submit({"main.py": script("500", before="print('sick', flush=True)")})
    sick = await local.settled(sick)
    assert "answered with status 500" in sick.reason
    assert "sick" in sick.log_tail
    assert await local.fetch(first) == (200, "1")
    for failed in (ended, sick):
        assert children_of_release(failed.id) == []
        assert not local.folder(failed).exists()


async def test_a_broken_build_fails_with_the_builds_output(local):
    done = await local.deploy({"package.json": '{"scripts": {"build": "echo oh no; exit 7", "start": "x"}}'})
    assert done.state is DeploymentState.FAILED
    assert done.reason == "`npm run build` failed with status 7."
    assert "oh no" in done.log_tail
    assert not local.folder(done).exists()


async def test_what_cannot_be_deployed_says_why(local):
    empty = await local.deploy({})
    docker = await local.deploy({"Dockerfile": "FROM scratch"})
    hostile = await local.deploy({"../x": ""})
    assert "empty" in empty.reason
    assert "docker runtime" in docker.reason
    assert "not a path inside" in hostile.reason
    assert {empty.state, docker.state, hostile.state} == {DeploymentState.FAILED}


async def test_two_applications_build_at_once(local):
    slow = {"Procfile": "web: python main.py", "main.py": script(), "package.json": '{"scripts": {"build": "sleep 4"}}'}
    one = await local.submit(slow, "cs_1")
    await local.reached(one, DeploymentState.BUILDING)
    await asyncio.sleep(0.3)
    two = await local.deploy({"index.html": "quick"}, "cs_2")
    assert two.state is DeploymentState.RUNNING
    assert (await local.queue.get(ORG, one.id)).state is DeploymentState.BUILDING
    assert (await local.settled(one)).state is DeploymentState.RUNNING


async def test_a_crashed_application_is_started_again(local):
    done = await local.deploy({"main.py": script("os.getpid()")})
    before = await local.fetch(done)
    await local.fetch(done, "/die")
    async with asyncio.timeout(10):
        while (after := await local.fetch(done))[0] != 200:
            assert after[0] in {502, 503}
            await asyncio.sleep(0.2)
    assert before[1] != after[1]


async def test_processes_that_left_their_group_are_ended_with_their_release(local):
    escape = "subprocess.Popen(['sleep', '1000'], start_new_session=True)"
    first = await local.deploy({"main.py": script("1", before=escape)})
    escaped = [process for process in children_of_release(first.id) if process.name() == "sleep"]
    assert len(escaped) == 1
    await local.deploy({"main.py": script("2")})
    async with asyncio.timeout(10):
        while children_of_release(first.id):
            await asyncio.sleep(0.1)
    assert is_gone(escaped[0])


async def test_only_the_last_three_healthy_releases_keep_their_files(local):
    done = [await local.deploy({"index.html": str(number)}) for number in range(5)]
    await asyncio.sleep(2)
    assert [local.folder(deployment).exists() for deployment in done] == [False, False, True, True, True]
    assert await local.fetch(done[-1]) == (200, "4")


async def test_a_second_worker_of_the_machine_leaves_running_applications_alone(redis, local):
    done = await local.deploy({"main.py": script("os.getpid()")})
    before = await local.fetch(done)
    async with running_worker(redis, local.config):
        await asyncio.sleep(1.5)
        assert await local.fetch(done) == before


async def test_a_worker_that_is_stopped_leaves_applications_running_and_the_next_one_adopts_them(
    redis, queue, gateway, tmp_path
):
    config = WorkerConfig("local", tmp_path, "http://{app}.localhost/")
    pipeline = Pipeline(queue, config, gateway)
    async with running_worker(redis, config):
        done = await pipeline.deploy({"main.py": script("os.getpid()")})
        before = await pipeline.fetch(done)
    assert await pipeline.fetch(done) == before
    async with running_worker(redis, config) as worker:
        await asyncio.sleep(1.5)
        assert await pipeline.fetch(done) == before
        for process in children_of_release(done.id):
            process.kill()
        async with asyncio.timeout(10):
            while (await pipeline.fetch(done))[0] != 200:
                await asyncio.sleep(0.1)
        await worker.releases.remove_app(done.app_id)
    assert children_of_release(done.id) == []
    assert (await pipeline.fetch(done))[0] in {404, 503}


WORKER_PROGRAM = """
import asyncio, sys
from pathlib import Path
from redis.asyncio import Redis
from deploy_pipeline.worker import Worker, WorkerConfig
config = WorkerConfig("local", Path(sys.argv[2]), "http://{app}.localhost/", lease_s=1.5)
asyncio.run(Worker(Redis(unix_socket_path=sys.argv[1]), config).run())
"""


async def test_a_build_whose_worker_is_killed_is_done_by_the_next_one_and_leaves_no_processes(
    redis, queue, gateway, valkey_socket, tmp_path
):
    config = WorkerConfig("local", tmp_path, "http://{app}.localhost/", lease_s=1.5)
    pipeline = Pipeline(queue, config, gateway)
    command = [sys.executable, "-c", WORKER_PROGRAM, str(valkey_socket), str(tmp_path)]
    doomed = await asyncio.create_subprocess_exec(*command)
    # The build hangs for the first worker only.
    build = f"test -e {tmp_path}/second || {{ touch {tmp_path}/second; sleep 1000; }}"
    files = {"main.py": script("'built'"), "deploy.toml": f'kind = "python"\nbuild = "{build}"'}
    deployment = await pipeline.submit(files)
    async with asyncio.timeout(20):
        while not (tmp_path / "second").exists():
            await asyncio.sleep(0.05)
    hanging = children_of_release(deployment.id)
    assert hanging
    doomed.kill()
    await doomed.wait()
    async with running_worker(redis, config) as worker:
        done = await pipeline.settled(deployment, within_s=30)
        assert (done.state, done.reason) == (DeploymentState.RUNNING, "")
        assert await pipeline.fetch(done) == (200, "built")
        assert all(is_gone(process) for process in hanging)
        await worker.releases.remove_app(done.app_id)


async def test_a_worker_that_is_stopped_in_the_middle_of_a_build_gives_it_back_at_once(redis, queue, gateway, tmp_path):
    config = WorkerConfig("local", tmp_path, "http://{app}.localhost/")
    pipeline = Pipeline(queue, config, gateway)
    async with running_worker(redis, config):
        files = {"Procfile": "web: x", "package.json": '{"scripts": {"build": "sleep 1000"}}'}
        deployment = await pipeline.submit(files)
        async with asyncio.timeout(20):
            while not any(process.name() == "sleep" for process in children_of_release(deployment.id)):
                await asyncio.sleep(0.05)
    assert children_of_release(deployment.id) == []
    claim = await queue.take(Stage.BUILD, "next", block_s=1)
    assert (claim.deployment_id, claim.attempt) == (deployment.id, 1)


async def log_text(pipeline, log):
    page = await LogStore(pipeline.queue._redis).read(log, after=0, limit=1000)
    return "".join(chunk.text for chunk in page.chunks), {chunk.source for chunk in page.chunks}


async def test_the_log_of_a_build_can_be_read_while_it_runs_and_afterwards(local):
    build = '{"scripts": {"build": "echo compiling; sleep 2; echo compiled; exit 3"}}'
    deployment = await local.submit({"Procfile": "web: x", "package.json": build})
    log = Log(deployment.app_id, deployment.id)
    async with asyncio.timeout(20):
        while "\ncompiling\n" not in (text := (await log_text(local, log))[0]):
            await asyncio.sleep(0.05)
    assert "\ncompiled\n" not in text
    done = await local.settled(deployment)
    text, _ = await log_text(local, log)
    assert "\ncompiled\n" in text
    assert text.endswith(f"Failed: {done.reason}\n")


async def test_what_applications_write_is_kept_across_releases_with_the_release_that_wrote_it(local):
    first = await local.deploy({"main.py": script("1", before="print('one ü', flush=True)")})
    ended = await local.deploy({"main.py": "print('boom', flush=True)\nraise SystemExit(4)"})
    second = await local.deploy({"main.py": script("2", before="print('two', flush=True)")})
    async with asyncio.timeout(10):
        while "two" not in (await log_text(local, Log(first.app_id)))[0]:
            await asyncio.sleep(0.1)
    await asyncio.sleep(1.5)  # the supervisor copies as well
    text, sources = await log_text(local, Log(first.app_id))
    assert [line for line in text.splitlines() if line in {"one ü", "boom", "two"}] == ["one ü", "boom", "two"]
    assert sources == {first.id, ended.id, second.id}


async def test_a_flood_of_an_application_is_bounded_on_disk_and_what_is_missing_is_said(tmp_path, redis):
    log = tmp_path / "app.log"
    written = 0
    with log.open("ab", buffering=0) as file:
        position, text = "", b""
        for _ in range(40):
            file.write(b"x" * 1_000_000)
            written += 1_000_000
            piece = _read_log(log, int(position or 0), 100_000)
            text += piece.data + (b"MISSING" if piece.skipped else b"")
            position = piece.position
            assert log.stat().st_size <= _LOG_CAP_BYTES + 2_000_000
    assert b"MISSING" in text


HANGING = {"Procfile": "web: x", "package.json": '{"scripts": {"build": "(setsid sleep 1004 &) ; sleep 1005"}}'}


async def hangs(deployment):
    async with asyncio.timeout(20):
        while sum(process.name() == "sleep" for process in children_of_release(deployment.id)) < 2:
            await asyncio.sleep(0.05)


async def cancelled(pipeline, deployment, within_s):
    """The state, and what still ran when it was first seen."""
    await pipeline.queue.request_cancel(deployment.id)
    done = await pipeline.settled(deployment, within_s=within_s)
    return done.state, children_of_release(deployment.id)


async def test_cancelled_is_said_when_nothing_of_the_build_runs_any_more(local):
    serving = await local.deploy({"main.py": script("1")})
    deployment = await local.submit(HANGING)
    await hangs(deployment)
    assert await cancelled(local, deployment, within_s=10) == (DeploymentState.CANCELLED, [])
    assert not local.folder(deployment).exists()
    assert await local.fetch(serving) == (200, "1")


async def test_a_deployment_is_cancelled_while_it_waits_to_become_healthy(local):
    deployment = await local.submit({"main.py": "import time; time.sleep(1000)"})
    await local.reached(deployment, DeploymentState.STARTING)
    assert await cancelled(local, deployment, within_s=10) == (DeploymentState.CANCELLED, [])


async def test_a_build_whose_worker_was_killed_is_cancelled_by_another_one(
    redis, queue, gateway, valkey_socket, tmp_path
):
    config = WorkerConfig("local", tmp_path, "http://{app}.localhost/", lease_s=1.5)
    pipeline = Pipeline(queue, config, gateway)
    doomed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER_PROGRAM, str(valkey_socket), str(tmp_path)
    )
    deployment = await pipeline.submit(HANGING)
    await hangs(deployment)
    doomed.kill()
    await doomed.wait()
    async with running_worker(redis, config):
        assert await cancelled(pipeline, deployment, within_s=20) == (DeploymentState.CANCELLED, [])


async def test_traffic_that_had_moved_when_the_worker_died_is_left_alone_and_the_state_becomes_true(local):
    done = await local.deploy({"main.py": script("os.getpid()")})
    before = await local.fetch(done)
    record = f"deploy:{{{done.app_id}}}"
    # As if the worker had been killed between the two steps.
    await local.queue._redis.hset(f"{record}:{done.id}", mapping={"state": "starting"})
    await local.queue._redis.hset(record, mapping={"active_deployment_id": done.id, "stage": "build"})
    await local.queue._redis.sadd("deploy:busy", done.app_id)
    await local.queue.sweep()
    assert (await local.settled(done)).state is DeploymentState.RUNNING
    assert await local.fetch(done) == before


async def test_what_a_crash_left_of_an_ended_deployment_is_cleared_away(local):
    done = await local.deploy({"main.py": ""})
    assert done.state is DeploymentState.FAILED
    left = local.folder(done)
    left.mkdir(parents=True)
    orphan = subprocess.Popen(["sleep", "1000"], env={MARK: done.id}, start_new_session=True)
    await local.worker.housekeeping.round()
    assert await asyncio.to_thread(orphan.wait, 5) != 0
    assert not left.exists()


async def test_archives_that_nothing_needs_are_removed_and_others_stay(local):
    done = await local.deploy({"index.html": "kept"})
    failed = await local.deploy({"main.py": "raise SystemExit(1)"})
    waiting = await local.submit(HANGING)
    archives = {path.stem: path for path in local.config.archives_dir.glob("*.zip")}
    half = local.config.archives_dir / ".1234.part"
    half.write_bytes(b"x")
    await local.worker.housekeeping.round()
    assert all(path.exists() for path in [*archives.values(), half]), "too young to be judged"
    long_ago = time.time() - 2 * 3600
    for path in [*archives.values(), half]:
        os.utime(path, (long_ago, long_ago))
    await local.worker.housekeeping.round()
    waiting = await local.queue.get(ORG, waiting.id)
    left = {path.stem for path in local.config.archives_dir.iterdir()}
    assert left == {done.archive_sha256, waiting.archive_sha256}
    assert failed.archive_sha256 not in left
    assert await cancelled(local, waiting, within_s=10) == (DeploymentState.CANCELLED, [])


async def test_an_application_that_never_listens_says_so_and_the_old_release_serves_on(local):
    first = await local.deploy({"main.py": script("1")})
    mute = await local.deploy({"main.py": "import time; print('mute', flush=True); time.sleep(1000)"})
    assert (mute.state, "nothing listens on the port in PORT" in mute.reason) == (DeploymentState.FAILED, True)
    assert "mute" in mute.log_tail
    deaf = await local.deploy(
        {
            "main.py": "import os, socket, time; s = socket.create_server(('127.0.0.1', int(os.environ['PORT'])))\n"
            "while True: s.accept()[0].send(b'no HTTP at all\\r\\n\\r\\n')"
        }
    )
    assert (deaf.state, "gave no valid answer" in deaf.reason) == (DeploymentState.FAILED, True)
    assert await local.fetch(first) == (200, "1")
    assert children_of_release(mute.id) == children_of_release(deaf.id) == []


async def test_a_rolled_back_release_keeps_its_files_when_the_one_that_built_them_is_no_longer_kept(local):
    orders = local.worker._orders
    first = await local.deploy({"main.py": script("1")})
    second = await local.deploy({"main.py": script("2")})

    async def back_to(target):
        app = await local.queue.get_app(ORG, first.app_id)
        return await local.settled(await orders.roll_back(app, target.id, user_id="u"))

    again = await back_to(first)
    assert (again.state, again.reason, again.rollback_of) == (DeploymentState.RUNNING, "", first.id)
    third, fourth = [await local.deploy({"main.py": script(number)}) for number in "34"]
    await asyncio.sleep(1.5)
    await local.worker.housekeeping.round()
    assert not local.folder(second).exists()
    assert local.folder(first).exists(), "the rolled back release runs in it"
    assert await local.fetch(fourth) == (200, "4")
    once_more = await back_to(again)
    assert (once_more.state, once_more.reason) == (DeploymentState.RUNNING, "")
    assert await local.fetch(first) == (200, "1")
    last = [await local.deploy({"main.py": script(number)}) for number in "567"]
    await asyncio.sleep(1.5)
    await local.worker.housekeeping.round()
    left = sorted(path.name for path in local.folder(first).parent.glob("dep_*"))
    assert left == sorted(deployment.id for deployment in last)
    assert third.state is DeploymentState.RUNNING


async def test_a_build_that_takes_too_long_is_ended_with_all_that_it_started(local):
    local.worker._runtime._build_limits = BuildLimits(timeout_s=2)
    escape = "(setsid sleep 1001 &) ; sleep 1002"
    files = {"Procfile": "web: x", "deploy.toml": f'build = "{escape}"'}
    done = await local.deploy(files)
    assert "took longer than" in done.reason
    assert children_of_release(done.id) == []


async def test_a_step_that_leaves_something_in_the_background_does_not_hold_the_build_up(local):
    done = await local.deploy({"index.html": "hi", "deploy.toml": 'build = "sleep 1003 & echo started"'})
    assert done.state is DeploymentState.RUNNING
    assert children_of_release(done.id) == []
