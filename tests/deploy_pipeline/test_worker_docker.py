"""On a real engine, with the application image built from this repository (layers are cached after the first time)."""

import asyncio
import subprocess

import pytest
from conftest import IMAGE, INSTALLATION, ORG, OURS, Pipeline, images, running_worker

from deploy_pipeline.jobs import DeploymentState
from deploy_pipeline.worker import WorkerConfig

pytestmark = pytest.mark.docker


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
        engine.containers.run, IMAGE, ["sleep", "600"], detach=True, init=True, name=INSTALLATION
    )
    config = WorkerConfig(
        "docker", tmp_path, "http://{app}.localhost/", IMAGE, INSTALLATION, INSTALLATION, healthy_within_s=8
    )
    try:
        async with running_worker(redis, config) as worker:
            runtime = worker._runtime
            pipeline = Pipeline(queue, config, gateway)
            deployment = await pipeline.submit({"main.py": SERVER % "one"})
            await pipeline.reached(deployment, DeploymentState.STARTING)
            name = "code-sessions-" + deployment.id.replace("_", "-")
            ask = ["curl", "-sS", "--retry", "20", "--retry-connrefused", "--retry-delay", "1", f"http://{name}:8080/"]
            code, output = await asyncio.to_thread(stand_in.exec_run, ask)
            assert (code, output.splitlines()[-1]) == (0, b"release one")  # after what curl says of its retries
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
