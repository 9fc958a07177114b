"""`kill -9` of the worker wherever it stands: the next one ends what was left, and says what is true."""

import asyncio
import os
import secrets
import subprocess
import sys
from contextlib import asynccontextmanager, suppress

import docker
import psutil
import pytest
from conftest import ORG, Pipeline, children_of_release, running_worker

from deploy_pipeline.jobs import DeploymentState
from deploy_pipeline.worker import WorkerConfig

IMAGE = "code-sessions/app:latest"
INSTALLATION = f"killed-tests-{os.getpid()}-{secrets.token_hex(3)}"
OURS = {"label": f"code-sessions.installation={INSTALLATION}"}
SERVER = """
import os, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
time.sleep(DELAY)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "VERSION".__len__().__str__())
        self.end_headers()
        self.wfile.write(b"VERSION")
ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Handler).serve_forever()
"""
PROGRAM = """
import asyncio, sys
from pathlib import Path
from redis.asyncio import Redis
from deploy_pipeline.worker import Worker, WorkerConfig
runtime, socket, data, installation, drain_s = sys.argv[1:]
url = "http://{app}.localhost/"
config = WorkerConfig(runtime, Path(data), url, installation=installation, lease_s=1.5, drain_s=float(drain_s))
asyncio.run(Worker(Redis(unix_socket_path=socket), config).run())
"""
# When the worker is killed: the state that was just reached, and how much later.
MOMENTS = [
    (DeploymentState.BUILDING, 0.0),
    (DeploymentState.BUILDING, 1.0),
    (DeploymentState.STARTING, 0.0),
    (DeploymentState.STARTING, 1.2),
    (DeploymentState.RUNNING, 0.0),
]
RUNTIMES = ["local", pytest.param("docker", marks=pytest.mark.docker)]


def application(version, delay_s=0.0):
    build = 'build = "sleep 1.5"\n'
    return {
        "main.py": SERVER.replace("VERSION", version).replace("DELAY", str(delay_s)),
        "deploy.toml": f'kind = "python"\n{build}',
    }


@asynccontextmanager
async def worker_to_kill(config, socket):
    arguments = [config.runtime, str(socket), str(config.data_dir), config.installation, str(config.drain_s)]
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, *arguments)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def left_in_the_engine():
    """Names of the containers and networks, and tags of the images, of these tests' applications."""
    engine = docker.from_env()
    try:
        return (
            [container.name for container in engine.containers.list(all=True, filters=dict(OURS))],
            [network.name for network in engine.networks.list(filters=dict(OURS))],
            [image.tags for image in engine.images.list(filters=dict(OURS))],
            [volume.name for volume in engine.volumes.list(filters=dict(OURS))],
        )
    finally:
        engine.close()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("state", "later_s"), MOMENTS, ids=str)
async def test_the_next_worker_finishes_the_deployment_and_nothing_is_left(
    redis, queue, gateway, valkey_socket, tmp_path, runtime, state, later_s
):
    config = WorkerConfig(
        runtime, tmp_path, "http://{app}.localhost/", IMAGE, "", INSTALLATION, lease_s=1.5, drain_s=1.2
    )
    pipeline = Pipeline(queue, config, gateway)
    async with worker_to_kill(config, valkey_socket) as doomed:
        first = await pipeline.deploy(application("one"))
        assert (first.state, first.reason) == (DeploymentState.RUNNING, "")
        second = await pipeline.submit(application("two", delay_s=2))
        await pipeline.reached(second, state)
        await asyncio.sleep(later_s)
        doomed.kill()
        await doomed.wait()
    assert (await pipeline.fetch(first))[0] == 200, "it serves without a worker"
    async with running_worker(redis, config) as worker:
        done = await pipeline.settled(second, within_s=60)
        assert (done.state, done.reason) == (DeploymentState.RUNNING, "")
        assert await pipeline.fetch(second) == (200, "two")
        assert (await queue.get(ORG, first.id)).state is DeploymentState.REPLACED
        await asyncio.sleep(1.3)  # the time that old connections have
        await worker.housekeeping.round()
        assert await worker._runtime.running() == {(second.app_id, second.id)}
        assert {path.name for path in config.apps_dir.glob("app_*/dep_*")} == {first.id, second.id}, "both are kept"
        await worker.releases.remove_app(second.app_id)
    assert children_of_release(second.id) == children_of_release(first.id) == []
    assert not list(config.apps_dir.glob("app_*"))
    if runtime == "docker":
        assert await asyncio.to_thread(left_in_the_engine) == ([], [], [], [])


@pytest.mark.parametrize("runtime", RUNTIMES)
async def test_a_build_whose_every_worker_dies_ends_as_failed_and_leaves_nothing(
    redis, queue, gateway, valkey_socket, tmp_path, runtime
):
    config = WorkerConfig(
        runtime, tmp_path, "http://{app}.localhost/", IMAGE, "", INSTALLATION, lease_s=1.5, drain_s=1.2
    )
    pipeline = Pipeline(queue, config, gateway)
    deployment = await pipeline.submit({"main.py": "", "deploy.toml": 'kind = "python"\nbuild = "sleep 77"'})
    for _ in range(3):
        async with worker_to_kill(config, valkey_socket) as doomed:
            attempts = int(await redis.hget(f"deploy:{{{deployment.app_id}}}", "attempts"))
            async with asyncio.timeout(40):
                while int(await redis.hget(f"deploy:{{{deployment.app_id}}}", "attempts")) == attempts:
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0.7)
            doomed.kill()
    async with running_worker(redis, config) as worker:
        done = await pipeline.settled(deployment, within_s=60)
        assert (done.state, "3 attempts" in done.reason) == (DeploymentState.FAILED, True)
        assert children_of_release(deployment.id) == []
        assert await worker._runtime.running() == set()
        assert not list(config.apps_dir.glob("app_*/dep_*"))
    if runtime == "docker":
        assert await asyncio.to_thread(left_in_the_engine) == ([], [], [], [])
        assert "sleep 77" not in subprocess.check_output(["ps", "-eo", "args"], text=True)


async def test_a_worker_that_was_frozen_while_another_took_over_changes_nothing(
    redis, queue, gateway, valkey_socket, tmp_path
):
    config = WorkerConfig("local", tmp_path, "http://{app}.localhost/", lease_s=1.5, drain_s=1.2)
    pipeline = Pipeline(queue, config, gateway)
    async with worker_to_kill(config, valkey_socket) as frozen:
        deployment = await pipeline.submit(application("one", delay_s=1))
        await pipeline.reached(deployment, DeploymentState.STARTING)
        psutil.Process(frozen.pid).suspend()
        async with running_worker(redis, config) as worker:
            done = await pipeline.settled(deployment, within_s=60)
            assert (done.state, done.reason) == (DeploymentState.RUNNING, "")
            psutil.Process(frozen.pid).resume()
            for _ in range(20):
                await asyncio.sleep(0.2)
                assert await pipeline.fetch(deployment) == (200, "one")
            after = await queue.get(ORG, deployment.id)
            assert (after.state, after.times) == (done.state, done.times)
            frozen.kill()
            await frozen.wait()
            await worker.releases.remove_app(deployment.app_id)
