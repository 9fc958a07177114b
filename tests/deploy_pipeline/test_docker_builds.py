"""Builds on a real engine: what they can reach, what ends them, and what of them stays."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import IMAGE, OURS, images
from test_worker_docker import SERVER

from deploy_pipeline.builders.base import BuildLimits
from deploy_pipeline.jobs import DeploymentState

pytestmark = pytest.mark.docker

REACH = """
for url in {urls}; do
  curl -sS -m 5 -o /dev/null -f "$url" && echo "REACHED $url through the proxy" && exit 1
  curl -sS -m 5 -o /dev/null --noproxy '*' "$url" && echo "REACHED $url" && exit 1
done
curl -fsS -m 60 -o /dev/null https://pypi.org/simple/pip/ && curl -fsS -m 60 -o /dev/null https://registry.npmjs.org/is-odd
"""
MEMORY = "python3 -c 'x = [bytearray(10**7) for _ in range(100)]'"
FORKS = "for i in $(seq 1 400); do sleep 1005 & done; wait"
STUBBORN_FORKS = """
import os, time
for _ in range(400):
    try:
        if os.fork() == 0:
            time.sleep(1005)
    except OSError:
        time.sleep(1005)
"""


class Secret(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def on_the_host(engine):
    """A service of this machine on loopback, as the control plane is: its address as seen from a container."""
    gateway = engine.networks.get("bridge").attrs["IPAM"]["Config"][0]["Gateway"]
    server = HTTPServer(("127.0.0.1", 0), Secret)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://{gateway}:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def neighbour(engine):
    """Another container with a server, as a workspace may be one."""
    container = engine.containers.run(IMAGE, ["python3", "-m", "http.server", "8000"], detach=True, init=True)
    container.reload()
    yield f"http://{container.attrs['NetworkSettings']['IPAddress']}:8000/"
    container.remove(force=True)


def project(text="old", **settings):
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    return {"main.py": SERVER % text, "deploy.toml": lines}


async def networks(engine):
    return [network.name for network in await asyncio.to_thread(engine.networks.list, filters=OURS)]


async def test_a_build_reaches_registries_and_nothing_else(on_docker, engine, on_the_host, neighbour):
    urls = f"http://169.254.169.254/ {on_the_host} {neighbour} http://10.0.0.1/"
    done = await on_docker.deploy(project(build="sh reach.sh") | {"reach.sh": REACH.format(urls=urls)})
    assert [line for line in done.log_tail if line.startswith("REACHED")] == []
    assert (done.state, done.reason) == (DeploymentState.RUNNING, ""), "\n".join(done.log_tail)
    assert any("a connection was refused: 169.254.169.254:80" in line for line in done.log_tail)
    assert not [name for name in await networks(engine) if "build" in name]
    # The way out is not in the image, nor in its history.
    for image_id in await asyncio.to_thread(images, engine):
        image = await asyncio.to_thread(engine.images.get, image_id)
        described = json.dumps([image.attrs["Config"], await asyncio.to_thread(image.history)])
        assert "_proxy" not in described.lower()


async def test_a_greedy_or_hanging_build_is_ended_with_its_reason_and_the_old_release_serves_on(
    on_docker,
    engine,
):
    serving = await on_docker.deploy(project())
    assert (serving.state, serving.reason) == (DeploymentState.RUNNING, "")
    runtime = on_docker.worker._runtime
    runtime._build_limits = BuildLimits(memory_bytes=256 * 1024 * 1024, processes=100, timeout_s=100)
    hungry = await on_docker.deploy(project(build=MEMORY))
    assert (hungry.state, hungry.reason) == (DeploymentState.FAILED, "The build ran out of memory: it may use 256 MiB.")
    forking = await on_docker.deploy(project(build=FORKS))
    assert forking.reason == (
        "`docker build` failed with status 1. It seems to have started more than 100 processes at once, its limit."
    )
    stubborn = await on_docker.deploy(project(build="python3 fork.py") | {"fork.py": STUBBORN_FORKS})
    assert stubborn.reason == "The build started more than 100 processes at once and was stopped."
    runtime._build_limits = BuildLimits(timeout_s=5)
    hanging = await on_docker.deploy(project(build="sleep 1006"))
    assert "took longer than 5 s" in hanging.reason
    runtime._build_limits = BuildLimits()
    broken = await on_docker.deploy(project(build="echo this is wrong >&2; exit 3"))
    assert broken.state is DeploymentState.FAILED
    assert any("this is wrong" in line for line in broken.log_tail)
    assert await on_docker.fetch(serving) == (200, "release old")
    assert not [name for name in await networks(engine) if "build" in name]


async def test_a_build_is_held_to_its_processors(on_docker):
    done = await on_docker.deploy(
        project(build="sleep 1; cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu.max 2>/dev/null; true")
    )
    assert done.state is DeploymentState.RUNNING
    assert any(line.startswith("200000") for line in done.log_tail), done.log_tail


async def test_variables_of_the_project_are_there_in_the_build_and_in_the_application(on_docker):
    value = 'a "b" $c \\ d \\$e'
    files = {
        "main.py": (SERVER % "x").replace('b"release x"', 'os.environ["GREETING"].encode()'),
        "check.py": f"import os\nassert os.environ['GREETING'] == {value!r}, os.environ['GREETING']\n",
        "deploy.toml": f"build = 'python3 check.py'\nport = 9000\nenv = {{GREETING = '{value}'}}\n",
    }
    done = await on_docker.deploy(files)
    assert (done.state, done.reason) == (DeploymentState.RUNNING, ""), done.log_tail
    assert await on_docker.fetch(done) == (200, value)


async def test_what_a_dockerignore_names_is_still_served_by_another_kind_of_project(on_docker):
    """A .dockerignore is for the project's own Dockerfile; what is deployed was chosen by .deployignore before."""
    done = await on_docker.deploy({"index.html": "page", "a.txt": "a", ".dockerignore": "*.txt\n", ".deployignore": ""})
    assert await on_docker.fetch(done, "/a.txt") == (200, "a")
    assert (await on_docker.fetch(done, "/.code-sessions.Dockerfile"))[0] == 404


async def test_unchanged_dependencies_are_not_installed_again(on_docker):
    files = {"main.py": SERVER % "one", "requirements.txt": "itsdangerous\n"}
    first = await on_docker.deploy(files)
    assert (first.state, first.reason) == (DeploymentState.RUNNING, "")
    second = await on_docker.deploy(files | {"main.py": SERVER % "two"})
    assert second.state is DeploymentState.RUNNING
    [install] = [number for number, line in enumerate(second.log_tail) if '"pip", "install"' in line]
    assert second.log_tail[install + 1].strip() == "---> Using cache"
    assert not any("Successfully installed" in line for line in second.log_tail)
