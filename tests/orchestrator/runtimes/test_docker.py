"""What only the Docker runtime promises; what all runtimes promise is in tests/contracts."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager

import docker
import pytest

from orchestrator.errors import RuntimeUnavailable
from orchestrator.ids import new_id
from orchestrator.runtimes.base import WorkspaceStartFailed, WorkspaceState
from orchestrator.runtimes.docker import DockerRuntime
from orchestrator.runtimes.docker_container import container_name, hostname, link_refusal, status_of
from orchestrator.runtimes.docker_network import ensure_network
from orchestrator.settings import Settings, WorkspaceLimits

LIMITS = WorkspaceLimits(memory_bytes=256 * 1024 * 1024, cpus=0.5, pids=64)


def make_runtime(link_dir, **changes) -> DockerRuntime:
    arguments = {"image": Settings().workspace_image, "limits": LIMITS, "link_mount": str(link_dir)}
    return DockerRuntime(**(arguments | {"installation": new_id("test")} | changes))


async def until_stopped(runtime, workspace_id, timeout_s=10):
    async with asyncio.timeout(timeout_s):
        while (status := await runtime.status(workspace_id)).state is WorkspaceState.RUNNING:
            await asyncio.sleep(0.05)
    return status


@pytest.mark.docker
async def test_what_a_workspace_leaves_is_named_and_labelled_with_what_it_belongs_to(docker_runtime, spec, engine):
    await docker_runtime.start(spec)

    container = engine.containers.get(f"cs-{spec.workspace_id}")
    volume = engine.volumes.get(f"cs-{spec.workspace_id}")
    ours = {name: value for name, value in container.labels.items() if name.startswith("code-sessions.")}
    assert ours == volume.attrs["Labels"]
    assert ours.pop("code-sessions.installation").startswith("test_")
    assert ours == {
        "code-sessions.workspace": spec.workspace_id,
        "code-sessions.session": spec.session_id,
        "code-sessions.organization": spec.organization_id,
    }


@pytest.mark.docker
async def test_a_volume_without_its_container_is_listed_and_removed(docker_runtime, spec, engine):
    await docker_runtime.start(spec)
    engine.containers.get(container_name(spec.workspace_id)).remove(force=True)

    status = await docker_runtime.status(spec.workspace_id)
    assert (status.state, status.reason) == (WorkspaceState.STOPPED, "its container was removed from outside")
    assert await docker_runtime.list_workspaces() == {spec.workspace_id: spec.session_id}
    await docker_runtime.stop(spec.workspace_id, grace_s=0)
    assert await docker_runtime.list_workspaces() == {}
    with pytest.raises(docker.errors.NotFound):
        engine.volumes.get(container_name(spec.workspace_id))


@pytest.mark.docker
async def test_a_workspace_killed_from_outside_says_so(docker_runtime, spec, engine):
    await docker_runtime.start(spec)
    engine.containers.get(container_name(spec.workspace_id)).kill()

    status = await until_stopped(docker_runtime, spec.workspace_id)
    assert (status.state, status.reason) == (WorkspaceState.STOPPED, "killed from outside (SIGKILL)")


@pytest.mark.docker
async def test_a_stop_gives_the_sidecar_its_grace_period(docker_runtime, spec, engine):
    await docker_runtime.start(spec)
    await asyncio.sleep(1.5)  # it handles SIGTERM once Python is up
    events = engine.events(filters={"container": container_name(spec.workspace_id), "event": "die"}, decode=True)
    await docker_runtime.stop(spec.workspace_id, grace_s=20)

    exit_code = await asyncio.to_thread(lambda: next(iter(events))["Actor"]["Attributes"]["exitCode"])
    events.close()
    assert exit_code == "0"


@pytest.mark.docker
async def test_what_the_engine_refuses_fails_the_start_with_its_reason_and_leaves_nothing(link_dir, spec, engine):
    missing = make_runtime(link_dir / "never-made")
    with pytest.raises(WorkspaceStartFailed, match="never-made"):
        await missing.start(spec)
    greedy = make_runtime(link_dir, limits=LIMITS.model_copy(update={"cpus": 100_000.0}))
    with pytest.raises(WorkspaceStartFailed, match="CPUs"):
        await greedy.start(spec)
    for runtime in (missing, greedy):
        assert await runtime.list_workspaces() == {}
        await runtime.close()


@pytest.mark.docker
async def test_the_link_folder_may_be_a_volume_that_the_control_plane_shares(spec, engine):
    volume = engine.volumes.create(new_id("link"))
    runtime = make_runtime(volume.name)
    try:
        await runtime.start(spec)
        mounts = engine.containers.get(container_name(spec.workspace_id)).attrs["Mounts"]
        link = next(mount for mount in mounts if mount["Destination"] == "/run/code-sessions")
        assert (link["Type"], link["Name"], link["RW"]) == ("volume", volume.name, False)
        await runtime.stop(spec.workspace_id, grace_s=0)
        assert volume.name in {other.name for other in engine.volumes.list()}, "it is not the workspace's to remove"
    finally:
        await runtime.close()
        volume.remove()


@pytest.mark.docker
async def test_check_says_how_to_get_an_image_that_is_missing(link_dir, spec):
    runtime = make_runtime(link_dir, image="code-sessions/no-such-image:never")
    with pytest.raises(RuntimeUnavailable, match="script/build-images"):
        await runtime.check()
    with pytest.raises(WorkspaceStartFailed, match="script/build-images"):
        await runtime.start(spec)
    await runtime.close()


@pytest.mark.docker
async def test_a_removed_network_is_made_anew(link_dir, new_spec, engine):
    name = new_id("net").replace("_", "-")
    runtime = make_runtime(link_dir, network=name)
    first, second = new_spec(), new_spec()
    try:
        await runtime.start(first)
        await runtime.stop(first.workspace_id, grace_s=0)
        engine.networks.get(name).remove()
        await runtime.start(second)
        assert (await runtime.status(second.workspace_id)).state is WorkspaceState.RUNNING
        await runtime.stop(second.workspace_id, grace_s=0)
    finally:
        engine.networks.get(name).remove()
        await runtime.close()


@pytest.mark.docker
async def test_many_callers_that_miss_the_network_at_once_end_up_with_one(engine):
    name = new_id("net").replace("_", "-")
    try:
        made = await asyncio.gather(*(asyncio.to_thread(ensure_network, engine.api, name) for _ in range(8)))
        # A caller may have seen a double that is gone by now: its start then finds no such network, and asks again.
        assert [network["Id"] for network in engine.api.networks(names=[name])] == [ensure_network(engine.api, name)]
        assert ensure_network(engine.api, name) in made
    finally:
        for network in engine.networks.list(names=[name]):
            network.remove()


@pytest.mark.docker
async def test_a_network_in_which_workspaces_reach_each_other_is_refused(link_dir, spec, engine):
    name = new_id("net").replace("_", "-")
    open_network = engine.networks.create(name)
    runtime = make_runtime(link_dir, network=name)
    try:
        with pytest.raises(RuntimeUnavailable, match="reach each other"):
            await runtime.start(spec)
        assert await runtime.list_workspaces() == {}
    finally:
        open_network.remove()
        await runtime.close()


@contextmanager
def silent_engine(path):
    """Accepts connections and never answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(50)
        yield


async def test_an_engine_that_is_down_is_runtime_unavailable_in_every_call(link_dir, spec, monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    runtime = make_runtime(link_dir)
    for call in (
        runtime.check(),
        runtime.start(spec),
        runtime.stop(spec.workspace_id, grace_s=0),
        runtime.status(spec.workspace_id),
        runtime.list_workspaces(),
    ):
        with pytest.raises(RuntimeUnavailable, match="cannot be reached"):
            await call
    await runtime.close()


async def test_a_start_that_is_cancelled_while_the_engine_is_down_ends_as_cancelled(
    link_dir, spec, monkeypatch, tmp_path
):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    runtime = make_runtime(link_dir)
    start = asyncio.create_task(runtime.start(spec))
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await runtime.close()


async def test_check_gives_up_within_two_seconds_on_an_engine_that_does_not_answer(link_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/silent.sock")
    with silent_engine(tmp_path / "silent.sock"):
        runtime = make_runtime(link_dir)
        before = time.monotonic()
        results = await asyncio.gather(*(runtime.check() for _ in range(5)), return_exceptions=True)
        assert time.monotonic() - before < 2.5
        assert all(isinstance(result, RuntimeUnavailable) for result in results)
        await runtime.close()
    assert threading.active_count() < 20


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"Status": "exited", "ExitCode": 137, "OOMKilled": True}, "out of memory: it needed more than its 256 MiB"),
        ({"Status": "exited", "ExitCode": 137, "OOMKilled": False}, "killed from outside (SIGKILL)"),
        ({"Status": "exited", "ExitCode": 0, "OOMKilled": True}, "stopped from outside, or its sidecar ended"),
        ({"Status": "exited", "ExitCode": 1, "OOMKilled": False}, "exited with code 1"),
        ({"Status": "exited", "ExitCode": 127, "Error": "no such file"}, "the engine reports: no such file"),
        ({"Status": "created", "ExitCode": 0}, "created but not started"),
    ],
)
def test_the_reason_of_a_stopped_workspace_tells_what_the_engine_knows(state, reason):
    status = status_of(state, LIMITS)
    assert (status.state, status.reason) == (WorkspaceState.STOPPED, reason)


@pytest.mark.parametrize(
    ("project", "expected"),
    [
        ("marketing-site", "marketing-site"),
        ("My_Project v2", "my-project-v2"),
        ("..", "workspace"),
        ("é" * 99, "workspace"),
    ],
)
def test_the_hostname_is_the_project_name_as_far_as_a_hostname_can_be(project, expected):
    assert hostname(project) == expected


def test_a_hostname_stays_short_and_ends_in_a_letter_or_digit():
    assert hostname("a" * 39 + "-" + "b" * 50) == "a" * 39


@pytest.mark.parametrize(
    ("options", "uid", "said"),
    [
        (["name=seccomp,profile=default"], 0, ""),
        (["name=seccomp,profile=default"], 1000, "has to run as root"),
        (["name=seccomp,profile=default", "name=rootless"], 1000, ""),
        (["name=seccomp,profile=default", "name=userns"], 0, "userns-remap"),
    ],
)
def test_a_sidecar_that_could_not_reach_the_link_is_said_before_a_session_is_made(options, uid, said):
    refusal = link_refusal(options, uid)
    assert said in refusal
    assert bool(said) == bool(refusal)
