"""The runtimes that the contract suite runs against: one entry in `RUNTIMES` for each."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from orchestrator.ids import new_id
from orchestrator.runtimes.base import WorkspaceRuntime, WorkspaceSpec
from orchestrator.settings import Settings


@dataclass(frozen=True)
class RuntimeUnderTest:
    """A runtime and its relatives."""

    runtime: WorkspaceRuntime
    successor: WorkspaceRuntime  # the same installation after a restart of the control plane
    neighbour: WorkspaceRuntime  # another installation on the same machine or engine
    broken: WorkspaceRuntime  # the same installation, but whatever it starts fails


@asynccontextmanager
async def docker_runtimes(folder: Path) -> AsyncIterator[RuntimeUnderTest]:
    from orchestrator.runtimes.docker import DockerRuntime

    settings = Settings()
    link_dir = folder / "link"
    link_dir.mkdir()
    installation = new_id("test")

    def make(image: str, installation: str) -> DockerRuntime:
        return DockerRuntime(image=image, limits=settings.limits, link_mount=str(link_dir), installation=installation)

    runtimes = RuntimeUnderTest(
        runtime=make(settings.workspace_image, installation),
        successor=make(settings.workspace_image, installation),
        neighbour=make(settings.workspace_image, new_id("test")),
        broken=make("code-sessions/no-such-image:never", installation),
    )
    try:
        yield runtimes
    finally:
        for runtime in (runtimes.successor, runtimes.neighbour):  # a test may have closed the first
            for workspace_id in await runtime.list_workspaces():
                await runtime.stop(workspace_id, grace_s=0)
        for runtime in (runtimes.runtime, runtimes.successor, runtimes.neighbour, runtimes.broken):
            await runtime.close()


@asynccontextmanager
async def local_runtimes(folder: Path) -> AsyncIterator[RuntimeUnderTest]:
    from orchestrator.runtimes.local import LocalRuntime

    link_dir = folder / "link"
    link_dir.mkdir()
    not_a_folder = folder / "file"
    not_a_folder.touch()
    runtimes = RuntimeUnderTest(
        runtime=LocalRuntime(folder / "workspaces", link_dir),
        successor=LocalRuntime(folder / "workspaces", link_dir),
        neighbour=LocalRuntime(folder / "neighbour", link_dir),
        broken=LocalRuntime(not_a_folder, link_dir),
    )
    try:
        yield runtimes
    finally:
        for workspace_id in await runtimes.successor.list_workspaces():
            await runtimes.successor.stop(workspace_id, grace_s=0)
        forgotten = processes_in(folder)
        for process in forgotten:
            process.kill()
        assert not forgotten, "a process that no list of workspaces shows"


def processes_in(folder: Path) -> list[psutil.Process]:
    """Those that work in it, also when it is deleted."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd().startswith(f"{folder}/") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


RUNTIMES: dict[str, Callable[[Path], AbstractAsyncContextManager[RuntimeUnderTest]]] = {
    "local": local_runtimes,
    "docker": docker_runtimes,
}


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.docker] * (name == "docker")) for name in RUNTIMES])
async def under_test(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RuntimeUnderTest]:
    async with RUNTIMES[request.param](tmp_path) as runtimes:
        yield runtimes


@pytest.fixture
def new_spec() -> Callable[[], WorkspaceSpec]:
    def make() -> WorkspaceSpec:
        return WorkspaceSpec(
            workspace_id=new_id("ws"),
            session_id=new_id("cs"),
            organization_id=new_id("org"),
            project_dir_name="my-project",
            link_token="a-secret-of-one-session",
        )

    return make


@pytest.fixture
def spec(new_spec: Callable[[], WorkspaceSpec]) -> WorkspaceSpec:
    return new_spec()
