from collections.abc import AsyncIterator, Callable
from pathlib import Path

import docker
import pytest

from orchestrator.ids import new_id
from orchestrator.runtimes.base import WorkspaceSpec
from orchestrator.runtimes.docker import DockerRuntime
from orchestrator.settings import Settings, WorkspaceLimits

TOKEN = "a-secret-of-one-session"
LIMITS = WorkspaceLimits(memory_bytes=256 * 1024 * 1024, cpus=0.5, pids=64)


@pytest.fixture
def link_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "link"
    folder.mkdir()
    return folder


@pytest.fixture
async def docker_runtime(link_dir: Path) -> AsyncIterator[DockerRuntime]:
    runtime = DockerRuntime(
        image=Settings().workspace_image, limits=LIMITS, link_mount=str(link_dir), installation=new_id("test")
    )
    yield runtime
    for workspace_id in await runtime.list_workspaces():
        await runtime.stop(workspace_id, grace_s=0)
    await runtime.close()


@pytest.fixture
def new_spec() -> Callable[[], WorkspaceSpec]:
    def make() -> WorkspaceSpec:
        return WorkspaceSpec(
            workspace_id=new_id("ws"),
            session_id=new_id("cs"),
            organization_id=new_id("org"),
            project_dir_name="My_Project v2",
            link_token=TOKEN,
        )

    return make


@pytest.fixture
def spec(new_spec: Callable[[], WorkspaceSpec]) -> WorkspaceSpec:
    return new_spec()


@pytest.fixture
def engine() -> docker.DockerClient:
    return docker.from_env()
