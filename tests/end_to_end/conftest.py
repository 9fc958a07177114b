from pathlib import Path

import pytest

from tests.end_to_end.harness import Serve


def on_both_runtimes(fixture):
    """Run a test once with processes and once with containers; `fixture` is the control plane that it uses."""
    runtimes = ["local", pytest.param("docker", marks=pytest.mark.docker)]
    return pytest.mark.parametrize(fixture, runtimes, indirect=True)


def _started(folder: Path, runtime: str):
    if runtime == "docker":
        # docker-py is only needed here.
        from tests.end_to_end.docker_harness import DockerServe

        return DockerServe(folder / "data").start()
    return Serve(folder / "data").start()


@pytest.fixture(scope="module")
def shared_serve(request, tmp_path_factory):
    """One control plane for the tests of a module that neither kill nor count anything."""
    serve = _started(tmp_path_factory.mktemp("serve"), getattr(request, "param", "local"))
    yield serve
    serve.stop()
    serve.remove_all()


@pytest.fixture
def serve(request, tmp_path):
    """A control plane of the test's own, to be killed at will."""
    serve = _started(tmp_path, getattr(request, "param", "local"))
    yield serve
    serve.stop()
    serve.remove_all()


@pytest.fixture
async def client(shared_serve):
    async with shared_serve.client() as client:
        yield client
