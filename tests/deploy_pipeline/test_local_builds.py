"""Local builds: what is used again, what is not, and what ends a build that takes too much."""

import asyncio
import json

from conftest import ORG, children_of_release

from deploy_pipeline.builders.base import BuildLimits
from deploy_pipeline.jobs import DeploymentState

SERVER = """
import os, pathlib
from http.server import BaseHTTPRequestHandler, HTTPServer
seen = pathlib.Path("written-by-the-application").exists()
pathlib.Path("written-by-the-application").write_text("x")
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"%s " + str(seen).encode())
HTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Handler).serve_forever()
"""
MEMORY = "python3 -c 'x = [bytearray(10**7) for _ in range(40)]; import time; time.sleep(600)'"
# Bounded, so that a failing test is no danger to the machine.
FORKS = "for i in $(seq 1 60); do sleep 1004 & done; wait"


def built_with(build, text="one"):
    return {"main.py": SERVER % text, "deploy.toml": f"build = {json.dumps(build)}\n"}


async def answers(local, deployment, text):
    """Once the gateway has seen that the release changed."""
    async with asyncio.timeout(10):
        while (got := await local.fetch(deployment)) != (200, text):
            assert got[0] == 200
            await asyncio.sleep(0.1)


async def test_an_unchanged_project_is_not_built_again_and_starts_from_what_was_built(local, tmp_path):
    files = built_with(f"echo ran >> {tmp_path}/builds; echo made > made-by-the-build")
    first = await local.deploy(files)
    assert (first.state, first.reason) == (DeploymentState.RUNNING, "")
    await answers(local, first, "one False")
    again = await local.deploy(files)
    assert (tmp_path / "builds").read_text() == "ran\n"
    assert any("used again" in line for line in again.log_tail)
    assert (local.folder(again) / "src/made-by-the-build").read_text() == "made\n"
    # What the application wrote is not part of what was built.
    await answers(local, again, "one False")
    changed = await local.deploy(built_with(f"echo ran >> {tmp_path}/builds", "two"))
    assert (tmp_path / "builds").read_text() == "ran\nran\n"
    await answers(local, changed, "two False")


async def test_unchanged_dependencies_are_not_installed_again(local):
    files = {"main.py": SERVER % "one", "requirements.txt": "itsdangerous\n"}
    first = await local.deploy(files)
    assert any("Successfully installed" in line for line in first.log_tail), first
    second = await local.deploy(files | {"main.py": SERVER % "two"})
    await answers(local, second, "two False")
    assert any("virtual environment is used again" in line for line in second.log_tail)
    assert not any("pip install" in line for line in second.log_tail)
    third = await local.deploy(files | {"requirements.txt": "itsdangerous\n# changed\n"})
    assert any("pip install" in line for line in third.log_tail)


async def test_unchanged_node_modules_are_used_again(local):
    package = {"scripts": {"start": "node server.js"}, "dependencies": {"is-number": "7.0.0"}}
    server = """
        const isNumber = require("is-number");
        require("http").createServer((q, s) => s.end("%s " + isNumber(5))).listen(process.env.PORT, process.env.HOST);
    """
    files = {"package.json": json.dumps(package), "server.js": server % "one"}
    first = await local.deploy(files)
    assert "$ npm install" in first.log_tail
    await answers(local, first, "one true")
    second = await local.deploy(files | {"server.js": server % "two"})
    assert "$ npm install" not in second.log_tail
    assert any("node_modules is used again" in line for line in second.log_tail)
    await answers(local, second, "two true")


async def test_what_no_release_uses_any_more_is_removed(local):
    deployed = [await local.deploy(built_with("true", text)) for text in ("one", "two", "three", "four", "five")]
    await local.worker.releases.retire_older(
        next(release for release in local.worker.releases._healthy(deployed[0].app_id)[::-1])
    )
    builds = local.folder(deployed[0]).parent / "builds"
    assert len(list(builds.glob("result-*"))) == 3
    await local.worker.releases.remove_app(deployed[0].app_id)
    assert not builds.exists()


async def test_a_greedy_build_is_ended_with_its_reason_and_the_old_release_serves_on(local):
    serving = await local.deploy({"main.py": SERVER % "old"})
    local.worker._runtime._build_limits = BuildLimits(memory_bytes=200 * 1024 * 1024, processes=40, timeout_s=60)
    hungry = await local.deploy(built_with(MEMORY))
    assert (hungry.state, hungry.reason) == (
        DeploymentState.FAILED,
        "The build ran out of memory: it may use 200 MiB.",
    )
    forking = await local.deploy(built_with(FORKS))
    assert forking.reason == "The build started more than 40 processes at once and was stopped."
    for failed in (hungry, forking):
        assert children_of_release(failed.id) == []
        assert not local.folder(failed).exists()
    await answers(local, serving, "old False")


async def test_a_pipe_that_a_build_leaves_behind_is_no_reason_to_fail_or_to_build_again(local):
    files = built_with("mkfifo left-behind; echo made > made")
    first = await local.deploy(files)
    assert (first.state, first.reason) == (DeploymentState.RUNNING, "")
    again = await local.deploy(files)
    assert any("used again" in line for line in again.log_tail)
    assert (local.folder(again) / "src/made").exists()
    assert not (local.folder(again) / "src/left-behind").exists()


async def test_a_rolled_back_release_keeps_the_environment_of_the_one_that_was_built(local):
    first = await local.deploy({"main.py": SERVER % "one", "requirements.txt": "# nothing\n"})
    assert (first.state, first.reason) == (DeploymentState.RUNNING, "")
    await local.deploy({"main.py": SERVER % "two"})
    app = await local.queue.get_app(ORG, first.app_id)
    back = await local.settled(await local.worker._orders.roll_back(app, first.id, user_id="u"))
    assert (back.state, back.reason) == (DeploymentState.RUNNING, "")
    for text in ("three", "four"):
        await local.deploy({"main.py": SERVER % text})
    await asyncio.sleep(local.config.drain_s + 0.3)
    await local.worker.housekeeping.round()
    assert local.worker.releases.load(first.app_id, first.id) is None, "only the rollback is kept"
    assert (local.folder(first) / "venv/bin/python").exists()


async def test_what_the_owner_sets_goes_before_what_the_project_sets(local):
    shown = '(os.environ["A"] + os.environ["B"] + os.environ["HOST"]).encode()'
    files = {"main.py": (SERVER % "x").replace('b"x " + str(seen).encode()', shown)}
    files["deploy.toml"] = 'env = {A = "project ", B = "project "}\n'
    first = await local.deploy(files)
    await answers(local, first, "project project 127.0.0.1")
    await local.worker._orders.put_env(first.app_id, {"B": "owner ", "HOST": "0.0.0.0"})
    second = await local.deploy(files)
    await answers(local, second, "project owner 127.0.0.1")
