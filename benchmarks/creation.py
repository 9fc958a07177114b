"""From the call that creates a session to its first prompt."""

import contextlib
import statistics
import time

import docker
from docker.errors import APIError

from benchmarks.product import product
from benchmarks.rows import Row, number, spread
from orchestrator.ids import new_id
from orchestrator.runtimes.base import WorkspaceSpec
from orchestrator.runtimes.docker_container import ContainerPlan, container_name, create_body
from orchestrator.runtimes.docker_network import NETWORK, ensure_network
from orchestrator.settings import Settings

_TIMES = 10


def to_the_first_prompt(_options):
    return [_local(), _docker()]


def _local():
    with product() as running:
        _ours(running)  # the first one makes folders and loads modules
        times_ms = [_ours(running) for _ in range(_TIMES)]
    return Row("create to first prompt, local", spread(times_ms, "ms"))


def _docker():
    bench = "create to first prompt, Docker / bare create + start"
    try:
        client = docker.APIClient()
        client.inspect_image(Settings().workspace_image)
    except (docker.errors.DockerException, APIError) as error:
        return Row(bench, notes=[f"{bench}: {error}"])
    with contextlib.closing(client), product(docker=True) as running:
        bare = _Bare(client, running)
        _ours(running)
        bare.start()
        pairs = [(_ours(running), bare.start()) for _ in range(_TIMES)]
    ours_ms, bare_ms = zip(*pairs, strict=True)
    return Row(
        bench,
        spread(ours_ms, "ms"),
        spread(bare_ms, "ms"),
        statistics.median(ours_ms) - statistics.median(bare_ms),
        unit=" ms more",
        enough=250,
        aim=120,
        notes=[f"{bench}: p50 of {_TIMES} each, in turn; {number(max(ours_ms))} ms at most."],
    )


def _ours(running):
    """Milliseconds from sending the call to having the first output."""
    began = time.perf_counter()
    session = running.create()
    output = {"chunks": [], "lastSeq": 0}
    while not any(chunk["text"] for chunk in output["chunks"]):
        path = f"code-sessions/{session}/output?afterSeq={output['lastSeq']}&wait=30"
        output = running.connection.call("GET", path)
    took_ms = (time.perf_counter() - began) * 1000
    running.end(session)
    return took_ms


class _Bare:
    """A workspace's container with the very same options, through the same library, and nothing else."""

    def __init__(self, client, running):
        settings, link = Settings(), running.serve.data_dir.parent / "nobody-listens"
        link.mkdir()
        self._client, self._network = client, ensure_network(client, NETWORK)
        self._plan = ContainerPlan("bench", settings.workspace_image, settings.limits, str(link))

    def start(self):
        """Milliseconds until the engine has started one."""
        spec = WorkspaceSpec(new_id("ws"), new_id("cs"), "bench", "bench", "no-token")
        name = container_name(spec.workspace_id)
        body = create_body(self._plan, spec, self._network)
        try:
            began = time.perf_counter()
            self._client.create_container_from_config(body, name)
            self._client.start(name)
            return (time.perf_counter() - began) * 1000
        finally:
            self._client.remove_container(name, force=True, v=True)
            with contextlib.suppress(APIError):
                self._client.remove_volume(name)
