import pytest

from tests.end_to_end.harness import Serve


@pytest.fixture(scope="module")
def shared_serve(tmp_path_factory):
    """One control plane for the tests of a module that neither kill nor count anything."""
    serve = Serve(tmp_path_factory.mktemp("serve") / "data").start()
    yield serve
    serve.stop()


@pytest.fixture
def serve(tmp_path):
    """A control plane of the test's own, to be killed at will."""
    serve = Serve(tmp_path / "data").start()
    yield serve
    serve.stop()
    for process in serve.processes():
        process.kill()


@pytest.fixture
async def client(shared_serve):
    async with shared_serve.client() as client:
        yield client
