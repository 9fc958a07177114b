"""Containers through the whole product: their walls as the real sidecar leaves them, their ends, nothing left over."""

import asyncio
import json
import re
import signal
import socket
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.settings import Settings
from tests.end_to_end.docker_harness import DockerServe
from tests.end_to_end.harness import fetch

pytestmark = pytest.mark.docker

MEMORY_MB, PIDS = 256, 200


@pytest.fixture(scope="module")
def shared_serve(tmp_path_factory):
    limits = {
        "CODE_SESSIONS_WORKSPACE_MEMORY_MB": str(MEMORY_MB),
        "CODE_SESSIONS_WORKSPACE_CPUS": "0.75",
        "CODE_SESSIONS_WORKSPACE_PIDS": str(PIDS),
    }
    serve = DockerServe(tmp_path_factory.mktemp("docker") / "data", **limits).start()
    yield serve
    serve.stop()
    serve.remove_all()


@pytest.fixture
async def client(shared_serve):
    """At the end of each test every session is deleted, and nothing of them may be left."""
    async with shared_serve.client() as client:
        yield client
        listed = await client.call("GET", "code-sessions?limit=200")
        for session in listed.json["sessions"]:
            if session["status"] in {"creating", "running"}:
                answer = await client.call("DELETE", f"code-sessions/{session['id']}")
                assert answer.status == 204, answer
        await until_nothing_is_left(shared_serve)


async def until_nothing_is_left(serve, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while left := await asyncio.to_thread(serve.on_engine.workspaces):
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.1)


async def quiet_session(client, name):
    session = await client.create(name)
    await session.run("stty -echo; PS1= PS2=; bind 'set enable-bracketed-paste off'")
    return session


async def probe(session, program):
    """What a Python program, typed into the terminal and run by its shell, prints as JSON."""
    await session.send(f"cat > /tmp/probe.py <<'END'\n{textwrap.dedent(program)}\nEND\n")
    text, status = await session.run("python3 /tmp/probe.py")
    assert status == 0, text
    return json.loads(re.search(r"^[\[{].*$", text, re.MULTILINE)[0])


def sidecar_of(container):
    """The sidecar's process, as the host sees it."""
    [pid] = [
        int(row[1]) for row in container.top()["Processes"] if row[-1].endswith("-m sidecar") and "init" not in row[-1]
    ]
    return psutil.Process(pid)


async def test_the_shell_and_its_container_are_as_locked_in_as_promised(client, shared_serve):
    session = await quiet_session(client, "walls")
    shell = await probe(
        session,
        """
        import json, os
        from pathlib import Path
        shell = Path("/proc", str(os.getppid()))
        found = dict(line.split(":", 1) for line in (shell / "status").read_text().splitlines())
        found = {name: value.split() for name, value in found.items()}
        parent = Path("/proc", found["PPid"][0])
        found["OomScore"] = int((shell / "oom_score_adj").read_text())
        found["SidecarOomScore"] = int((parent / "oom_score_adj").read_text())
        found["Sidecar"] = (parent / "cmdline").read_text().split(chr(0))
        found["Descriptors"] = sorted({os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)})
        found["Inherited"] = sorted(os.listdir(shell / "fd"))
        found["Mounts"] = [line.split()[1:4] for line in Path("/proc/mounts").read_text().splitlines()]
        print(json.dumps(found))
        """,
    )
    assert "sidecar" in shell["Sidecar"], "the terminal's own shell was looked at"
    assert (shell["Uid"], shell["Gid"]) == (["1000"] * 4, ["1000"] * 4)
    assert set(shell["Groups"]) <= {"1000"}
    for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert shell[capabilities] == ["0" * 16], capabilities
    assert (shell["NoNewPrivs"], shell["Seccomp"]) == (["1"], ["2"])
    assert shell["OomScore"] > shell["SidecarOomScore"]
    assert shell["Descriptors"] == ["/dev/pts/0"]
    assert shell["Inherited"] == ["0", "1", "2", "255"], "255 is bash's own copy of the terminal"
    mounts = {path: options.split(",") for path, _, options in shell["Mounts"]}
    assert "ro" in mounts["/run/code-sessions"]
    assert "rw" in mounts["/home/dev"]
    assert not [path for path in mounts if "docker.sock" in path]

    container = await asyncio.to_thread(shared_serve.on_engine.workspace, session.id)
    host = container.attrs["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert sorted(host["CapAdd"]) == ["KILL", "SETGID", "SETPCAP", "SETUID"]
    assert (host["Memory"], host["MemorySwap"]) == (MEMORY_MB * 2**20,) * 2
    assert (host["NanoCpus"], host["PidsLimit"]) == (750_000_000, PIDS)
    assert {mount["Destination"] for mount in container.attrs["Mounts"]} == {"/home/dev", "/run/code-sessions"}
    assert not container.ports
    sidecar = sidecar_of(container)
    assert sidecar.uids().real == 0
    allowed = re.search(r"^CapBnd:\s*(\w+)$", Path(f"/proc/{sidecar.pid}/status").read_text(), re.MULTILINE)[1]
    assert int(allowed, 16) == sum(1 << number for number in (5, 6, 7, 8)), "KILL, SETGID, SETUID, SETPCAP"


async def test_the_sidecars_token_memory_and_socket_are_out_of_the_users_reach(client, shared_serve):
    session = await quiet_session(client, "token")
    container = await asyncio.to_thread(shared_serve.on_engine.workspace, session.id)
    environment = dict(entry.split("=", 1) for entry in container.attrs["Config"]["Env"])
    token = environment["CODE_SESSIONS_LINK_TOKEN"]
    [link] = Settings(data_dir=shared_serve.data_dir).link_socket_dir.glob("*.sock")
    found = await probe(
        session,
        """
        LINK = "/run/code-sessions/NAME"
        import ctypes, json, os, signal, socket
        from pathlib import Path
        tried, mine = {}, []
        def attempt(name, function):
            try:
                tried[name] = repr(function())
            except OSError as error:
                tried[name] = type(error).__name__
        libc = ctypes.CDLL(None, use_errno=True)
        def checked(result):
            if result < 0:
                raise OSError(ctypes.get_errno(), "refused")
        PTRACE_ATTACH, PIDFD_OPEN, PIDFD_GETFD = 16, 434, 438
        for process in [path for path in Path("/proc").iterdir() if path.name.isdigit()]:
            if process.stat().st_uid:
                mine.append((process / "environ").read_bytes().decode())
                continue
            pid = int(process.name)
            for secret in ("environ", "mem", "maps", "auxv", "io", "syscall", "stack"):
                attempt(f"{pid} {secret}", lambda: (process / secret).open("rb").read(1))
            for link in ("exe", "cwd", "root", "fd/0"):
                attempt(f"{pid} {link}", lambda: os.readlink(process / link))
            attempt(f"{pid} fds", lambda: os.listdir(process / "fd"))
            attempt(f"{pid} kill", lambda: os.kill(pid, signal.SIGKILL))
            attempt(f"{pid} trace", lambda: checked(libc.ptrace(PTRACE_ATTACH, pid, 0, 0)))
            attempt(f"{pid} getfd", lambda: checked(libc.syscall(PIDFD_GETFD, libc.syscall(PIDFD_OPEN, pid, 0), 6, 0)))
        attempt("link", lambda: socket.socket(socket.AF_UNIX).connect(LINK))
        attempt("unlink", lambda: os.unlink(LINK))
        attempt("links", lambda: os.listdir("/run/code-sessions"))
        attempt("root", lambda: os.setuid(0))
        attempt("a namespace of its own", lambda: checked(libc.unshare(0x10000000)))
        print(json.dumps({"tried": tried, "mine": mine}))
        """.replace("NAME", link.name),
    )
    assert len(found["tried"]) >= 2 * 15 + 5, "docker-init and the sidecar"
    refusals = {"PermissionError", "OSError"}  # OSError: a read-only file system
    assert {what: how for what, how in found["tried"].items() if how not in refusals} == {}
    assert len(found["mine"]) >= 2
    assert not [text for text in found["mine"] if token in text or "CODE_SESSIONS" in text]
    text, _ = await session.run(f"grep -rslaF {token} / --exclude-dir=sys 2>/dev/null | grep -v '^/proc/self'; true")
    assert not re.findall(r"^/.*$", text, re.MULTILINE)


async def test_nothing_of_ours_and_no_other_workspace_is_reachable_from_inside(client, shared_serve):
    session, other = await quiet_session(client, "outgoing"), await quiet_session(client, "neighbour")
    containers = [await asyncio.to_thread(shared_serve.on_engine.workspace, one.id) for one in (session, other)]
    [network], [others] = (container.attrs["NetworkSettings"]["Networks"].values() for container in containers)
    await other.send("python3 -m http.server 9000 --bind 0.0.0.0 &\n")
    await other.until(r"Serving HTTP")
    await other.run("echo '<h1>app</h1>' > index.html")
    deployment = await other.deploy()
    assert deployment["status"] == "running", deployment
    [app] = [
        container
        for container in await asyncio.to_thread(shared_serve.on_engine.everything)
        if getattr(container, "ports", None)
    ]
    [app_network] = app.attrs["NetworkSettings"]["Networks"].values()
    app_port = int(app.ports["8080/tcp"][0]["HostPort"])

    addresses = {
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET
    }
    addresses |= {network["Gateway"], app_network["Gateway"], "127.0.0.1", "host.docker.internal"}
    targets = [
        [address, port]
        for address in sorted(addresses)
        for port in (shared_serve.port, shared_serve.gateway_port, app_port, 2375, 2376, 6379)
    ]
    targets += [[others["IPAddress"], 9000], [app_network["IPAddress"], 8080], [containers[1].name, 9000]]
    with socket.socket() as listener:
        listener.bind((network["Gateway"], 0))
        listener.listen()
        control = [network["Gateway"], listener.getsockname()[1]]
        found = await probe(
            session,
            f"""
            import json, os, socket
            from concurrent.futures import ThreadPoolExecutor
            def reaches(target):
                try:
                    socket.create_connection(tuple(target), timeout=1.5).close()
                except OSError:
                    return False
                return True
            with ThreadPoolExecutor(16) as threads:
                reached = list(threads.map(reaches, {[*targets, control]!r}))
            print(json.dumps({{"reached": reached, "ipv6": open("/proc/net/if_inet6").read().split(chr(10))}}))
            """,
        )
    assert found["reached"].pop() is True, "the probe works: what listens on the bridge is reached"
    assert [target for target, reached in zip(targets, found["reached"], strict=True) if reached] == []
    assert [line for line in found["ipv6"] if line and not line.endswith(" lo")] == [], "no second way to a neighbour"
    assert await fetch(deployment["url"]) == (200, "<h1>app</h1>\n"), "while it does run"


@pytest.mark.parametrize("delay_s", [0, 0.02, 0.1, 0.25, 0.4, 0.6])
async def test_a_session_deleted_while_it_is_created_leaves_nothing(client, shared_serve, delay_s):
    sessions = [await client.create("short-lived") for _ in range(2)]
    await asyncio.sleep(delay_s)
    answers = await asyncio.gather(*(client.call("DELETE", session.path) for session in sessions * 2))
    assert [answer.status for answer in answers] == [204] * 4, "twice at once"
    assert await asyncio.to_thread(shared_serve.on_engine.workspaces) == [], "204 says that it is gone"
    for session in sessions:
        shown = await session.show()
        assert (shown["status"], shown.get("statusReason")) == ("completed", None)
        await session.delete()


async def test_a_deploy_during_create_waits_for_the_workspace_or_says_why_not(client, shared_serve):
    session, doomed = await client.create("early"), await client.create("doomed")
    await session.send("echo '<h1>early</h1>' > index.html\n")
    deployment, ended = await asyncio.gather(session.deploy(), _deploy_and_delete(doomed))
    assert deployment["status"] == "running", deployment
    assert await fetch(deployment["url"]) == (200, "<h1>early</h1>\n")
    assert ended["status"] == "failed"
    assert "ended" in ended["reason"] or "gone" in ended["reason"]


async def _deploy_and_delete(session):
    deploying = asyncio.create_task(session.deploy(timeout_s=30))
    await asyncio.sleep(0.05)
    await session.delete()
    return await deploying


async def test_twenty_sessions_at_once_work_and_leave_nothing_when_they_end(client, shared_serve):
    async def work(number):
        session = await client.create(f"one-of-{number}")
        text, status = await session.run(f"echo $((number={number})) $HOSTNAME")
        assert status == 0
        assert f"{number} one-of-{number}\r\n" in text
        return session

    sessions = await asyncio.gather(*(work(number) for number in range(20)))
    assert len(await asyncio.to_thread(shared_serve.on_engine.workspaces)) == 20
    await asyncio.gather(*(session.delete() for session in sessions))
    assert await asyncio.to_thread(shared_serve.on_engine.workspaces) == []


async def test_a_container_killed_from_outside_is_a_failed_session_within_seconds(client, shared_serve):
    session = await quiet_session(client, "killed")
    container = await asyncio.to_thread(shared_serve.on_engine.workspace, session.id)
    await asyncio.to_thread(container.kill)
    shown = await session.until_status("failed", timeout_s=5)
    assert shown["statusReason"] == "the workspace is gone: killed from outside (SIGKILL)"
    assert shown["terminal"]["state"] == "lost"
    refused = await client.call("POST", f"{session.path}/input", {"text": "x"})
    assert (refused.status, refused.json["code"]) == (409, "session-ended")
    assert (await client.call("GET", f"{session.path}/output")).json["chunks"]
    await until_nothing_is_left(shared_serve)


async def test_a_container_and_volume_removed_from_outside_are_a_failed_session(client, shared_serve):
    session = await quiet_session(client, "removed")
    container = await asyncio.to_thread(shared_serve.on_engine.workspace, session.id)
    await asyncio.to_thread(container.remove, force=True)
    shown = await session.until_status("failed", timeout_s=5)
    assert "removed from outside" in shown["statusReason"]
    await until_nothing_is_left(shared_serve)


async def test_a_sidecar_killed_in_its_container_is_a_failed_session_within_seconds(client, shared_serve):
    session = await quiet_session(client, "headless")
    await session.run("nohup setsid sleep 1001 >/dev/null 2>&1 & true")
    container = await asyncio.to_thread(shared_serve.on_engine.workspace, session.id)
    sidecar_of(container).kill()
    shown = await session.until_status("failed", timeout_s=5)
    assert shown["statusReason"].startswith("the workspace is gone: ")
    await until_nothing_is_left(shared_serve)


@pytest.mark.parametrize(
    "eater",
    [
        "python3 -c 'b = bytearray(900 << 20)'",
        "tail /dev/zero",
        "(for i in 1 2 3 4 5 6; do tail /dev/zero & done; wait)",
    ],
)
async def test_memory_runs_out_for_the_program_and_the_session_goes_on(client, eater):
    session = await quiet_session(client, "hungry")
    text, status = await session.run(eater, timeout_s=60)
    assert status == 137 or "wait" in eater, text
    text, _ = await session.run("echo still-$((40 + 2))")
    assert "still-42" in text
    assert (await session.show())["status"] == "running"


async def test_memory_that_the_shell_itself_eats_ends_the_shell_and_a_new_one_starts(client):
    session = await quiet_session(client, "hungry-shell")
    await session.send("x=a; while :; do x=$x$x; done\n")
    shown = await session.until_state("exited", timeout_s=60)
    assert shown["terminal"]["signal"] == "SIGKILL"
    assert (await client.call("POST", f"{session.path}/terminal")).status == 201
    text, _ = await session.run("echo again-$((40 + 2))")
    assert "again-42" in text


@pytest.mark.parametrize(
    "bomb", [":(){ :|:& };:", "python3 -c 'import os\nwhile True:\n  try: os.fork()\n  except OSError: pass'"]
)
async def test_a_fork_bomb_stays_in_its_workspace_and_the_session_is_deleted_in_time(client, shared_serve, bomb):
    session = await quiet_session(client, "bomb")
    await session.send(f"{bomb}\n")
    await asyncio.sleep(3)
    container = await asyncio.to_thread(shared_serve.on_engine.workspace, session.id)
    assert container.status == "running"
    neighbour = await quiet_session(client, "unharmed")
    text, _ = await neighbour.run("echo fine-$((40 + 2))")
    assert "fine-42" in text
    began = time.monotonic()
    await session.delete()
    assert time.monotonic() - began < 15
    assert (await session.show())["status"] == "completed"


async def test_a_program_that_ignores_every_signal_does_not_hold_up_a_delete(client):
    session = await quiet_session(client, "stubborn")
    await session.send("trap '' HUP TERM INT; echo trap''ped; while :; do sleep 1; done\n")
    await session.until("trapped")
    began = time.monotonic()
    await session.delete()
    assert time.monotonic() - began < 4


async def test_a_stopped_sidecar_does_not_hold_up_a_delete_for_long(client, shared_serve):
    session = await quiet_session(client, "frozen")
    sidecar = sidecar_of(await asyncio.to_thread(shared_serve.on_engine.workspace, session.id))
    sidecar.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    await session.delete()
    assert time.monotonic() - began < 15
