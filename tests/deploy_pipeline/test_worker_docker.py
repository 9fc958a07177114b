"""On a real engine, with the application image built from this repository (layers are cached after the first time)."""

import asyncio
import contextlib
import subprocess
import time

import pytest
from conftest import IMAGE, INSTALLATION, ORG, OURS, Pipeline, images, running_worker

from deploy_pipeline.jobs import DeploymentState, Health
from deploy_pipeline.logs import Log, LogStore
from deploy_pipeline.orders import Verb
from deploy_pipeline.worker import WorkerConfig

pytestmark = pytest.mark.docker

GATEWAY = f"{INSTALLATION}-gateway"

FLASK = """
import os, pathlib
from flask import Flask
app = Flask(__name__)
@app.get("/")
def home():
    status = pathlib.Path("/proc/self/status").read_text()
    wanted = ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp:")
    return " ".join([str(os.getuid()), *(line.split()[1] for line in status.splitlines() if line.startswith(wanted))])
"""
SERVER = """
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"release %s")
HTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
"""


async def containers(engine):
    return await asyncio.to_thread(engine.containers.list, all=True, filters=OURS)


async def test_a_static_site_runs_in_a_container_and_keeps_its_dot_files_private(on_docker):
    done = await on_docker.deploy({"index.html": "<h1>Hi</h1>", ".secret": "x", "404.html": "lost"})
    assert (done.state, done.kind, done.reason) == (DeploymentState.RUNNING, "static", "")
    assert await on_docker.fetch(done) == (200, "<h1>Hi</h1>")
    assert await on_docker.fetch(done, "/.secret") == (404, "lost")
    assert await on_docker.fetch(done, "/nowhere") == (404, "lost")


async def test_a_flask_application_runs_hardened(on_docker, engine):
    done = await on_docker.deploy({"app.py": FLASK, "requirements.txt": "flask\n"})
    assert (done.state, done.kind, done.reason) == (DeploymentState.RUNNING, "python", "")
    assert await on_docker.fetch(done) == (200, "10001 0000000000000000 0000000000000000 1 2")
    [container] = await containers(engine)
    host = container.attrs["HostConfig"]
    assert (host["PidsLimit"], host["Memory"], host["NanoCpus"]) == (256, 512 * 1024 * 1024, 10**9)
    assert host["Memory"] == host["MemorySwap"]
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert {binding["HostIp"] for bindings in host["PortBindings"].values() for binding in bindings} == {"127.0.0.1"}
    assert list(container.attrs["NetworkSettings"]["Networks"]) != ["bridge"]


async def test_what_a_container_writes_is_in_the_applications_log_once(on_docker):
    before = 'import threading, time\nfor n in range(300):\n    print("line", n, flush=True)\n'
    done = await on_docker.deploy({"main.py": before + SERVER % "one"})
    store, text = LogStore(on_docker.queue._redis), ""
    async with asyncio.timeout(15):
        while "line 299" not in text:
            page = await store.read(Log(done.app_id), after=0, limit=1000)
            text = "".join(chunk.text for chunk in page.chunks)
            await asyncio.sleep(0.2)
    await asyncio.sleep(1.5)
    page = await store.read(Log(done.app_id), after=0, limit=1000)
    lines = "".join(chunk.text for chunk in page.chunks).splitlines()
    assert [line for line in lines if line.startswith("line")] == [f"line {number}" for number in range(300)]


async def test_an_unchanged_archive_is_not_built_again_and_the_new_release_takes_over(on_docker, engine):
    files = {"main.py": SERVER % "one"}
    first = await on_docker.deploy(files)
    assert (first.state, first.reason) == (DeploymentState.RUNNING, "")
    before = await asyncio.to_thread(images, engine)
    again = await on_docker.deploy(files)
    assert await asyncio.to_thread(images, engine) == before
    assert any("used again" in line for line in again.log_tail)
    assert await on_docker.fetch(again) == (200, "release one")
    async with asyncio.timeout(20):
        while len(await containers(engine)) > 1:
            await asyncio.sleep(0.2)
    assert (await on_docker.queue.get(ORG, first.id)).state is DeploymentState.REPLACED


async def test_a_dockerfile_is_built_as_it_is_and_a_failing_one_leaves_the_old_release(on_docker, engine):
    dockerfile = f'FROM {IMAGE}\nCOPY main.py /\nEXPOSE 5000\nCMD ["python3", "/main.py"]\n'
    done = await on_docker.deploy({"Dockerfile": dockerfile, "main.py": SERVER % "mine"})
    assert (done.state, done.kind, done.reason) == (DeploymentState.RUNNING, "dockerfile", "")
    assert await on_docker.fetch(done) == (200, "release mine")
    broken = await on_docker.deploy({"Dockerfile": f"FROM {IMAGE}\nRUN echo oh no && exit 7\n"})
    assert broken.state is DeploymentState.FAILED
    assert "oh no" in "\n".join(broken.log_tail)
    crashing = await on_docker.deploy({"Dockerfile": f'FROM {IMAGE}\nCMD ["sh", "-c", "echo bye; exit 9"]\n'})
    assert "status 9" in crashing.reason
    assert "bye" in crashing.log_tail
    assert await on_docker.fetch(done) == (200, "release mine")
    assert len(await containers(engine)) == 1
    assert len(await asyncio.to_thread(images, engine)) == 1


async def test_a_rollback_runs_the_very_image_of_then_within_two_seconds(on_docker, engine):
    orders = on_docker.worker._orders
    first = await on_docker.deploy({"main.py": SERVER % "one"})
    assert await orders.put_env(first.app_id, {"LATER": "1"}) == 1
    second = await on_docker.deploy({"main.py": SERVER % "two"})
    assert (second.state, second.settings_version) == (DeploymentState.RUNNING, 1)
    took = []
    for expected in ("one", "two", "one"):
        began = time.monotonic()
        app = await on_docker.queue.get_app(ORG, first.app_id)
        back = await on_docker.settled(await orders.roll_back(app, "", user_id="u"))
        took.append(time.monotonic() - began)
        assert (back.state, back.reason) == (DeploymentState.RUNNING, "")
        assert await on_docker.fetch(first) == (200, f"release {expected}")
    assert min(took) < 2, took
    assert "LATER=1" not in engine.containers.get(container_of(back)).attrs["Config"]["Env"]


async def test_a_container_that_ends_again_and_again_is_said_to_crash_and_removing_it_leaves_nothing(on_docker, engine):
    files = {"main.py": "import os, threading\nthreading.Timer(3, lambda: os._exit(3)).start()\n" + SERVER % "ill"}
    done = await on_docker.deploy(files)
    assert (done.state, done.reason) == (DeploymentState.RUNNING, "")
    async with asyncio.timeout(60):
        while (app := await on_docker.queue.get_app(ORG, done.app_id)).health is not Health.CRASH_LOOPING:
            await asyncio.sleep(0.2)
    assert app.health_reason == "it ended with status 3"
    assert app.restarts >= 2
    orders = on_docker.worker._orders
    await orders.give(done.app_id, Verb.STOP)
    async with asyncio.timeout(30):
        while (app := await on_docker.queue.get_app(ORG, done.app_id)).health is not Health.STOPPED:
            await asyncio.sleep(0.1)
    assert await containers(engine) == []
    await orders.give(done.app_id, Verb.REMOVE)
    async with asyncio.timeout(30):
        while await on_docker.queue.get_app(ORG, done.app_id) is not None:
            await asyncio.sleep(0.1)
    assert await asyncio.to_thread(images, engine) == set()


async def test_a_container_that_somebody_removed_is_made_again(on_docker, engine):
    done = await on_docker.deploy({"main.py": SERVER % "here"})
    await asyncio.sleep(1.5)  # the supervisor has seen it
    await asyncio.to_thread(engine.containers.get(container_of(done)).remove, force=True)
    async with asyncio.timeout(30):
        while (await on_docker.fetch(done)) != (200, "release here"):
            await asyncio.sleep(0.1)


def container_of(deployment):
    return "code-sessions-" + deployment.id.replace("_", "-")


async def test_a_dockerfile_outside_the_project_is_not_read(on_docker):
    done = await on_docker.deploy({"deploy.toml": 'kind = "dockerfile"', "main.py": ""})
    assert "does not look like it" in done.reason


async def test_a_build_that_is_given_up_is_ended_in_the_engine(redis, queue, gateway, tmp_path, engine):
    config = WorkerConfig("docker", tmp_path, "http://{app}.localhost/", IMAGE, "", INSTALLATION)
    pipeline = Pipeline(queue, config, gateway)

    def sleeping():
        command = ["ps", "-eo", "args"]
        return "sleep 98765" in subprocess.run(command, capture_output=True, text=True, check=True).stdout

    async with running_worker(redis, config):
        await pipeline.submit({"Dockerfile": f"FROM {IMAGE}\nRUN exec sleep 98765\n"})
        async with asyncio.timeout(30):
            while not sleeping():
                await asyncio.sleep(0.1)
    async with asyncio.timeout(15):
        while sleeping():
            await asyncio.sleep(0.1)


async def test_the_gateways_container_is_joined_to_the_applications_network(redis, queue, gateway, tmp_path, engine):
    stand_in = await asyncio.to_thread(
        engine.containers.run, IMAGE, ["sleep", "600"], detach=True, init=True, name=GATEWAY
    )
    config = WorkerConfig(
        "docker", tmp_path, "http://{app}.localhost/", IMAGE, GATEWAY, INSTALLATION, healthy_within_s=10
    )
    try:
        async with running_worker(redis, config) as worker:
            runtime = worker._runtime
            pipeline = Pipeline(queue, config, gateway)
            deployment = await pipeline.submit({"main.py": SERVER % "one"})
            await pipeline.reached(deployment, DeploymentState.STARTING)
            name = "code-sessions-" + deployment.id.replace("_", "-")
            answer = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(9):
                    while answer != (0, b"release one"):
                        answer = await asyncio.to_thread(stand_in.exec_run, ["curl", "-sS", f"http://{name}:8080/"])
            assert answer == (0, b"release one")
            # This worker runs on the host, where the container's name means nothing: that is told, and undone.
            failed = await pipeline.settled(deployment)
            assert "did not answer" in failed.reason
            assert await runtime.running() == set()
            await worker.releases.remove_app(deployment.app_id)
        assert await asyncio.to_thread(engine.networks.list, filters=OURS) == []
    finally:
        await asyncio.to_thread(stand_in.remove, force=True)


async def test_a_workspace_of_the_same_installation_is_none_of_the_workers_business(on_docker, engine):
    labels = {"code-sessions.installation": INSTALLATION, "code-sessions.workspace": "ws_a"}
    workspace = await asyncio.to_thread(
        engine.containers.run, IMAGE, ["sleep", "600"], detach=True, init=True, labels=labels
    )
    try:
        assert await on_docker.worker.releases.known() == set()
    finally:
        await asyncio.to_thread(workspace.remove, force=True)
