"""compose.yaml as an operator starts it: the whole way once, the orchestrator killed in the middle, nothing left."""

import asyncio
import json
import os
import re
import secrets
import signal
import subprocess
import time
from pathlib import Path

import docker
import pytest
from aiohttp import ClientError

from tests.end_to_end.docker_harness import OnEngine
from tests.end_to_end.harness import ADMIN_KEY, Client, fetch, free_port
from tests.end_to_end.polling import poll_through
from tests.end_to_end.tour import assert_the_tour_went_through, paste, readme_tour

pytestmark = pytest.mark.docker
ROOT = Path(__file__).parents[2]


class Stack:
    def __init__(self):
        self.name = f"cstest{secrets.token_hex(4)}"
        self.port, self.gateway_port = free_port(), free_port()
        self.origin = f"http://127.0.0.1:{self.port}"
        self.engine = docker.from_env()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("CODE_SESSIONS_")}
        self.environment |= {
            "CODE_SESSIONS_STACK": self.name,
            "CODE_SESSIONS_PORT": str(self.port),
            "CODE_SESSIONS_GATEWAY_PORT": str(self.gateway_port),
            "CODE_SESSIONS_PUBLIC_URL": self.origin,
            "CODE_SESSIONS_GATEWAY_PUBLIC_URL": f"http://{{app}}.localhost:{self.gateway_port}/",
            "CODE_SESSIONS_ADMIN_KEY": ADMIN_KEY,
        }
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
        self.command = ["docker", "compose"] if plugin else ["docker-compose"]

    def compose(self, *arguments):
        command = [*self.command, "-f", str(ROOT / "compose.yaml"), "-p", self.name, *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def container(self, service):
        [found] = self.engine.containers.list(
            all=True,
            filters={"label": [f"com.docker.compose.project={self.name}", f"com.docker.compose.service={service}"]},
        )
        return found

    def left(self):
        named = [
            *self.engine.containers.list(all=True, ignore_removed=True),
            *self.engine.networks.list(),
            *self.engine.volumes.list(),
        ]
        return [thing.name for thing in named if thing.name.startswith(self.name)]

    async def until_ready(self, timeout_s=60):
        async with asyncio.timeout(timeout_s), Client(self.origin, "") as client:
            while True:
                try:
                    if (await client.call("GET", "/readyz", timeout_s=5)).status == 200:
                        return
                except (OSError, TimeoutError, ClientError):
                    pass  # not ready
                await asyncio.sleep(0.2)


@pytest.fixture(scope="module")
def stack():
    stack = Stack()
    on_engine = None
    try:
        stack.compose("up", "-d")
        asyncio.run(stack.until_ready())
        socket = "/run/code-sessions-redis/redis.sock"
        answer = stack.container("redis").exec_run(["redis-cli", "-s", socket, "get", "cs:installation"])
        on_engine = stack.on_engine = OnEngine(answer.output.decode().strip())
        yield stack
    finally:
        stack.compose("down", "-v", "--timeout", "5")
        if on_engine is not None:
            on_engine.remove_all()
    assert stack.left() == []


async def test_the_whole_way_and_a_kill_in_the_middle(stack):
    async with Client(stack.origin, ADMIN_KEY) as client:
        session = await client.create("composed", "On the stack")
        await session.run("stty -echo; PS1= PS2=; bind 'set enable-bracketed-paste off'")
        assert (await session.show())["ptyEndpoint"].startswith(stack.origin.split("//")[0])
        await session.run("echo '<h1>composed</h1>' > index.html")
        deployment = await session.deploy()
        assert deployment["status"] == "running", deployment
        assert await fetch(deployment["url"]) == (200, "<h1>composed</h1>\n")

        await session.send("seq 1 300000 | while mapfile -n 5000 -t a && ((${#a[@]})); do printf '%s\\n' \"${a[@]}\"; ")
        await session.send("sleep 0.05; done; echo all-''done\n")
        polling = asyncio.create_task(poll_through(client, session, lambda text: "all-done" in text))
        for _ in range(2):
            await asyncio.sleep(1)
            assert not polling.done(), "in the middle"
            # Killed as by the kernel, not through the engine: then the engine starts it again.
            await asyncio.to_thread(kill_within, stack.container("orchestrator"))
            await stack.until_ready()
        text = await polling
        numbers = re.findall(r"^(\d+)\r?$", text, re.MULTILINE)
        assert numbers == [str(number) for number in range(1, 300_001)]

        assert await fetch(deployment["url"]) == (200, "<h1>composed</h1>\n")
        await session.delete()
        assert (await session.show())["status"] == "completed"
        assert stack.on_engine.workspaces() == []
        assert (await fetch(deployment["url"]))[0] == 200, "an application outlives its session"


async def test_readmes_tour_goes_through_as_it_is_written(stack, tmp_path):
    printed = await asyncio.to_thread(paste, readme_tour(f"{stack.origin}/api/v1", ADMIN_KEY), tmp_path)
    assert_the_tour_went_through(printed)


def kill_within(container):
    before = container.attrs["State"]["StartedAt"]
    os.kill(container.attrs["State"]["Pid"], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while container.attrs["State"]["StartedAt"] == before:
        assert time.monotonic() < deadline, "it is started again"
        time.sleep(0.05)
        container.reload()


async def test_from_inside_a_workspace_nothing_of_the_stack_is_reachable(stack):
    async with Client(stack.origin, ADMIN_KEY) as client:
        session = await client.create("outgoing")
        await session.run("stty -echo; PS1= PS2=; bind 'set enable-bracketed-paste off'")
        targets = []
        pools = [network.attrs["IPAM"]["Config"] or [{}] for network in stack.engine.networks.list()]
        gateways = {pool[0].get("Gateway") for pool in pools} - {None}
        for host in (*gateways, "127.0.0.1", "host.docker.internal"):
            targets += [(host, port) for port in (stack.port, stack.gateway_port, 8000, 8080, 6379, 2375, 2376)]
        containers = [stack.container(service) for service in ("redis", "orchestrator", "worker", "gateway")]
        for container in containers:
            names = [container.name, container.labels["com.docker.compose.service"]]
            addresses = [network["IPAddress"] for network in container.attrs["NetworkSettings"]["Networks"].values()]
            targets += [(host, port) for host in (*names, *filter(None, addresses)) for port in (6379, 8000, 8080)]
        program = f"""
import json, socket
from concurrent.futures import ThreadPoolExecutor
def reaches(target):
    try:
        socket.create_connection(target, timeout=1.5).close()
    except OSError:
        return False
    return True
with ThreadPoolExecutor(32) as threads:
    targets = {targets!r}
    print(json.dumps([target for target, reached in zip(targets, threads.map(reaches, targets)) if reached]))
"""
        await session.send(f"cat > /tmp/probe.py <<'END'\n{program}\nEND\n")
        text, status = await session.run("python3 /tmp/probe.py")
        assert status == 0, text
        assert json.loads(re.search(r"^\[.*\]", text, re.MULTILINE)[0]) == []
        text, _ = await session.run("ls /run /run/code-sessions /run/code-sessions-redis /var/run/docker.sock")
        assert "redis.sock" not in text
        assert text.count("docker.sock") == 1, "only in the complaint that it is not there"
        await session.delete()
        for container in containers:
            host = container.attrs["HostConfig"]
            assert (host["CapDrop"], host["ReadonlyRootfs"], host["Privileged"]) == (["ALL"], True, False)
            published = [one["HostIp"] for bindings in (host["PortBindings"] or {}).values() for one in bindings]
            assert set(published) <= {"127.0.0.1"}
