"""Invariant 6, read from the engine and tried from inside as the user: workspaces are hostile."""

import asyncio
import json
import socket
import textwrap
from contextlib import contextmanager

import pytest

from orchestrator.runtimes.docker_container import container_name
from orchestrator.settings import Settings

pytestmark = pytest.mark.docker
TOKEN = "a-secret-of-one-session"


def run_as_user(container, program: str):
    """What a Python program prints as JSON, run as the workspace's user, without the sidecar's environment."""
    command = ["env", "-i", "HOME=/home/dev", "PATH=/usr/bin:/bin", "/usr/bin/python3", "-c", textwrap.dedent(program)]
    result = container.exec_run(command, user="dev")
    assert result.exit_code == 0, result.output.decode()
    return json.loads(result.output)


def reaches(container, host: str, port: int) -> bool:
    return run_as_user(
        container,
        f"""
        import json, socket
        try:
            socket.create_connection(({host!r}, {port}), timeout=1.5).close()
            print(json.dumps(True))
        except OSError:
            print(json.dumps(False))
        """,
    )


def address_of(container) -> str:
    container.reload()
    return next(iter(container.attrs["NetworkSettings"]["Networks"].values()))["IPAddress"]


@contextmanager
def listener(host: str):
    with socket.socket() as server:
        server.bind((host, 0))
        server.listen(20)
        yield server.getsockname()[1]


@pytest.fixture
async def container(docker_runtime, spec, engine):
    await docker_runtime.start(spec)
    container = engine.containers.get(container_name(spec.workspace_id))
    async with asyncio.timeout(10):
        while not any("bash" in process[-1] for process in container.top()["Processes"]):  # the sidecar's shell
            await asyncio.sleep(0.05)
    container.reload()
    return container


def test_the_engine_confirms_capabilities_seccomp_and_limits(container):
    host = container.attrs["HostConfig"]

    assert host["CapDrop"] == ["ALL"]
    assert sorted(host["CapAdd"]) == ["KILL", "SETGID", "SETPCAP", "SETUID"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"], "naming no seccomp profile keeps the default one"
    assert host["Privileged"] is False
    assert (host["Memory"], host["MemorySwap"]) == (256 * 1024 * 1024,) * 2
    assert (host["NanoCpus"], host["PidsLimit"]) == (500_000_000, 64)
    assert (host["IpcMode"], host["PidMode"], host["UTSMode"], host["CgroupnsMode"]) == ("private", "", "", "private")
    assert host["Init"] is True
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "1"}}
    assert not host["Binds"]
    assert not host["Devices"]
    assert not host["PortBindings"]
    assert host["MaskedPaths"]
    assert host["ReadonlyPaths"]


def test_its_mounts_are_its_own_home_and_the_link_read_only_and_no_engine_socket(container, link_dir, spec):
    mounts = {mount["Destination"]: mount for mount in container.attrs["Mounts"]}

    assert set(mounts) == {"/home/dev", "/run/code-sessions"}
    assert mounts["/home/dev"]["Name"] == f"cs-{spec.workspace_id}"
    assert (mounts["/run/code-sessions"]["Source"], mounts["/run/code-sessions"]["RW"]) == (str(link_dir), False)
    assert run_as_user(container, "import json, os; print(json.dumps(os.path.exists('/var/run/docker.sock')))") is False


def test_the_kernel_confirms_that_the_shell_has_no_capability_and_cannot_gain_one(container):
    found = run_as_user(
        container,
        """
        import json, os
        from pathlib import Path
        shells = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and (process / "comm").read_text() == "bash\\n":
                lines = (process / "status").read_text().splitlines()
                status = dict(line.split(":", 1) for line in lines)
                status["oom_score_adj"] = (process / "oom_score_adj").read_text()
                status["parent_oom_score_adj"] = Path("/proc", status["PPid"].strip(), "oom_score_adj").read_text()
                shells.append({name: value.split() for name, value in status.items()})
        print(json.dumps(shells))
        """,
    )
    assert len(found) == 1
    shell = found[0]
    assert (shell["Uid"], shell["Gid"]) == (["1000"] * 4, ["1000"] * 4)
    assert set(shell["Groups"]) <= {"1000"}
    for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert shell[capabilities] == ["0" * 16], capabilities
    assert (shell["NoNewPrivs"], shell["Seccomp"]) == (["1"], ["2"])  # 2: a filter
    assert int(shell["oom_score_adj"][0]) > int(shell["parent_oom_score_adj"][0]), "the user's processes go first"


def test_no_file_of_the_image_gives_privileges_or_lets_the_user_change_the_sidecar(container):
    found = run_as_user(
        container,
        """
        import json, os, stat
        privileged, writable = [], []
        for folder, folders, files in os.walk("/"):
            if folder == "/":
                folders[:] = set(folders) - {"proc", "sys", "dev", "home", "tmp"}
            for name in (*files, *folders):
                path = os.path.join(folder, name)
                mode = os.lstat(path)
                if stat.S_ISREG(mode.st_mode) and mode.st_mode & (stat.S_ISUID | stat.S_ISGID):
                    privileged.append(path)
                if path.startswith("/opt/") and os.access(path, os.W_OK):
                    writable.append(path)
        print(json.dumps([privileged, writable]))
        """,
    )
    assert found == [[], []]


def test_the_token_is_out_of_the_users_reach(container, link_dir):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(link_dir / "link-test.sock"))
        server.listen()
        (link_dir / "link-test.sock").chmod(0o600)
        found = run_as_user(
            container,
            """
            import ctypes, json, os, signal, socket
            from pathlib import Path
            refused = {}
            def attempt(name, function):
                try:
                    refused[name] = repr(function())
                except OSError as error:
                    refused[name] = type(error).__name__
            for pid in [p.name for p in Path("/proc").iterdir() if p.name.isdigit() and p.stat().st_uid == 0]:
                for secret in ("environ", "mem", "maps", "auxv", "io"):
                    attempt(f"{pid} {secret}", lambda: open(f"/proc/{pid}/{secret}", "rb").read(1))
                for link in ("exe", "cwd", "root", "fd/0"):
                    attempt(f"{pid} {link}", lambda: os.readlink(f"/proc/{pid}/{link}"))
                attempt(f"{pid} kill", lambda: os.kill(int(pid), signal.SIGSTOP))
                libc = ctypes.CDLL(None, use_errno=True)
                PTRACE_ATTACH = 16
                def trace():
                    if libc.ptrace(PTRACE_ATTACH, int(pid), 0, 0) < 0:
                        raise OSError(ctypes.get_errno(), "ptrace")
                attempt(f"{pid} trace", trace)
            attempt("link", lambda: socket.socket(socket.AF_UNIX).connect("/run/code-sessions/link-test.sock"))
            attempt("new link", lambda: open("/run/code-sessions/x.sock", "w"))
            attempt("root", lambda: os.setuid(0))
            print(json.dumps(refused))
            """,
        )
    assert len(found) >= 2 * 11 + 3, "docker-init and the sidecar"
    new_link = found.pop("new link")
    assert new_link in {"PermissionError", "OSError"}  # OSError: the file system is read-only
    assert set(found.values()) == {"PermissionError"}, found


def test_the_token_is_in_no_process_of_the_user(container):
    environments = run_as_user(
        container,
        """
        import json
        from pathlib import Path
        mine = [p for p in Path("/proc").iterdir() if p.name.isdigit() and p.stat().st_uid == 1000]
        print(json.dumps([(p / "environ").read_bytes().decode() for p in mine]))
        """,
    )
    assert len(environments) >= 2
    assert not [text for text in environments if TOKEN in text or "LINK" in text]


def test_it_reaches_neither_loopback_services_of_the_host_nor_the_engine(container):
    gateway = next(iter(container.attrs["NetworkSettings"]["Networks"].values()))["Gateway"]
    with listener("127.0.0.1") as api, listener(gateway) as exposed:
        assert reaches(container, gateway, exposed), "the probe works: what listens on the bridge is reached"
        assert not reaches(container, gateway, api), "the API as it is bound by default"
        assert not reaches(container, "127.0.0.1", api)
    for engine_port in (2375, 2376):
        assert not reaches(container, gateway, engine_port)


async def test_it_does_not_reach_another_workspace(container, docker_runtime, new_spec, engine):
    other = new_spec()
    await docker_runtime.start(other)
    neighbour = engine.containers.get(container_name(other.workspace_id))
    neighbour.exec_run(["python3", "-m", "http.server", "9000"], user="dev", detach=True)
    address = address_of(neighbour)
    async with asyncio.timeout(10):
        while not reaches(neighbour, address, 9000):
            await asyncio.sleep(0.1)

    assert not reaches(container, address, 9000)


async def test_it_does_not_reach_a_container_of_another_network(container, engine):
    """Redis, the API and the gateway of compose.yaml are such containers."""
    network = engine.networks.create(f"test-{container.name}")
    service = engine.containers.run(
        Settings().workspace_image,
        ["-m", "http.server", "6379"],
        entrypoint="python3",
        detach=True,
        network=network.name,
    )
    try:
        address = address_of(service)
        async with asyncio.timeout(10):
            while not reaches(service, address, 6379):
                await asyncio.sleep(0.1)
        assert not reaches(container, address, 6379)
        assert not reaches(container, service.name, 6379)
    finally:
        service.remove(force=True)
        network.remove()


def test_a_fork_bomb_ends_at_the_limit_and_leaves_the_sidecar_running(container):
    bomb = """
        import json, os, time
        children = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(3)
                    os._exit(0)
                children += 1
        except BlockingIOError:
            print(json.dumps(children))
    """
    assert 40 <= run_as_user(container, bomb) < 64
    container.reload()
    assert container.status == "running"


def test_memory_runs_out_for_the_users_process_and_not_for_the_workspace(container):
    result = container.exec_run(["python3", "-c", "b = bytearray(400 << 20)"], user="dev")

    assert result.exit_code == 137
    container.reload()
    assert container.status == "running"


def test_what_the_user_installs_with_pip_goes_home_and_a_login_shell_finds_it(container):
    wheel = """
        import json, zipfile
        info = "hello-1.dist-info/"
        with zipfile.ZipFile("/tmp/hello-1-py3-none-any.whl", "w") as archive:
            archive.writestr("hello.py", "def main(): print('hello')")
            archive.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: hello\\nVersion: 1\\n")
            archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
            archive.writestr(info + "entry_points.txt", "[console_scripts]\\nhello = hello:main\\n")
            archive.writestr(info + "RECORD", "")
        print(json.dumps("made"))
    """
    run_as_user(container, wheel)
    install = "pip install -q --no-index /tmp/hello-1-py3-none-any.whl && command -v hello && hello"
    result = container.exec_run(["env", "-i", "HOME=/home/dev", "bash", "-lc", install], user="dev")

    assert result.output.decode().split() == ["/home/dev/.local/bin/hello", "hello"]
