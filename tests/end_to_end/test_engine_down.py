"""The container engine is away: said at once, nothing half-done, and everything goes on when it is back."""

import asyncio
import contextlib
import socket
import time

import pytest

from tests.end_to_end.docker_harness import DockerServe


@contextlib.contextmanager
def nobody(path):
    yield


@contextlib.contextmanager
def somebody_silent(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        yield


@pytest.mark.parametrize("engine", [nobody, somebody_silent])
async def test_create_is_refused_and_nothing_is_made(tmp_path, engine):
    with engine(tmp_path / "engine.sock"):
        serve = DockerServe(tmp_path / "data", DOCKER_HOST=f"unix://{tmp_path}/engine.sock").start()
        try:
            async with serve.client() as client:
                for _ in range(2):
                    began = time.monotonic()
                    refused = await client.call(
                        "POST", "code-sessions", {"projectName": "nowhere", "projectDescription": ""}
                    )
                    assert time.monotonic() - began < 4
                    assert (refused.status, refused.headers["Content-Type"]) == (503, "application/problem+json")
                    assert "Docker engine" in refused.json["detail"]
                    assert int(refused.headers["Retry-After"]) > 0
                assert (await client.call("GET", "code-sessions")).json["sessions"] == []
                assert (await client.call("GET", "/readyz")).status == 503
                assert (await client.call("GET", "/healthz")).status == 200
        finally:
            serve.stop(timeout_s=10)
        assert "Traceback" not in serve.log.read_text()
        serve.remove_all()


class PathToEngine:
    """A socket in front of the engine's that can be taken away."""

    def __init__(self, path):
        self.path, self.server, self.open = path, None, set()

    async def up(self):
        self.server = await asyncio.start_unix_server(self._relay, str(self.path))

    async def down(self):
        self.server.close()
        for writer in self.open:
            writer.transport.abort()
        self.path.unlink(missing_ok=True)

    async def _relay(self, reader, writer):
        upstream_reader, upstream_writer = await asyncio.open_unix_connection("/var/run/docker.sock")
        self.open |= {writer, upstream_writer}
        with contextlib.suppress(OSError):
            await asyncio.gather(_copy(reader, upstream_writer), _copy(upstream_reader, writer))
        self.open -= {writer, upstream_writer}


async def _copy(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


@pytest.mark.docker
async def test_an_engine_that_goes_away_and_comes_back_is_survived(tmp_path):
    engine = PathToEngine(tmp_path / "engine.sock")
    await engine.up()
    serve = DockerServe(tmp_path / "data", DOCKER_HOST=f"unix://{engine.path}")
    try:
        await asyncio.to_thread(serve.start)
        async with serve.client() as client:
            kept, ended = await client.create("kept"), await client.create("ended")
            await kept.run("true")
            await ended.run("true")
            halfway = await client.create("halfway")
            await asyncio.sleep(0.05)
            await engine.down()

            text, _ = await kept.run("echo still-$((40 + 2))")
            assert "still-42" in text, "a terminal needs no engine"
            refused = await client.call("DELETE", ended.path)
            assert (refused.status, "Retry-After" in refused.headers) == (503, True), refused
            assert (await client.call("POST", f"{ended.path}/input", {"text": "x"})).status == 409
            assert (await client.call("GET", "/readyz")).status == 503

            await engine.up()
            async with asyncio.timeout(10):
                while (await client.call("GET", "/readyz")).status != 200:
                    await asyncio.sleep(0.1)
            await ended.delete()
            text, _ = await kept.run("echo and-$((40 + 2))")
            assert "and-42" in text
            failed = await halfway.until_status("failed", timeout_s=10)
            assert "engine" in failed["statusReason"].lower()
            await kept.delete()
            async with asyncio.timeout(10):
                while await asyncio.to_thread(serve.on_engine.workspaces):
                    await asyncio.sleep(0.1)
    finally:
        await asyncio.to_thread(serve.stop)
        serve.remove_all()
        await engine.down()
