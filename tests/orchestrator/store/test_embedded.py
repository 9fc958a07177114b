import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.settings import SettingsError, load_settings
from orchestrator.store.connection import connect
from orchestrator.store.embedded import EmbeddedStoreError, EmbeddedValkey
from orchestrator.store.folders import FolderInUse, FolderLock, private_folder
from orchestrator.store.opening import open_store

_SERVE = """
import asyncio, sys
from pathlib import Path
from orchestrator.store.embedded import EmbeddedValkey

async def main():
    store = EmbeddedValkey(Path(sys.argv[1]), Path(sys.argv[2]))
    await store.start()
    print(store.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def store(tmp_path: Path) -> EmbeddedValkey:
    return _store(tmp_path)


def _store(tmp_path: Path, role: str = "serve") -> EmbeddedValkey:
    return EmbeddedValkey(tmp_path / "a folder", tmp_path / "run", role=role)


def _serve(tmp_path: Path, run_dir: Path | None = None) -> tuple[subprocess.Popen[str], int]:
    """A process of its own that runs the store, and its server's pid."""
    store = _store(tmp_path)
    command = [sys.executable, "-c", _SERVE, str(store.data_dir), str(run_dir or store.run_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


async def _gone(pid: int, *, within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        await asyncio.sleep(0.02)
    return False


async def test_what_was_written_is_there_after_a_stop_and_a_start(store):
    async with store, connect(store.socket_path) as client:
        await client.set("kept", "yes")
    async with store, connect(store.socket_path) as client:
        assert await client.get("kept") == b"yes"


async def test_it_answers_within_half_a_second_and_leaves_nothing_running(store):
    began_s = time.monotonic()
    await store.start()
    took_s = time.monotonic() - began_s
    pid = store.pid
    await store.stop()
    assert took_s < 0.5
    assert not psutil.pid_exists(pid)


async def test_only_its_user_can_reach_the_socket(store):
    async with store:
        assert store.run_dir.stat().st_mode & 0o777 == 0o700
        assert store.socket_path.stat().st_mode & 0o777 == 0o600
        assert store.data_dir.stat().st_mode & 0o777 == 0o700


async def test_the_server_is_configured_to_keep_everything(store):
    async with store, connect(store.socket_path) as client:
        config = await client.config_get("*")
    assert config["appendonly"] == "yes"
    assert config["appendfsync"] == "everysec"
    assert config["aof-use-rdb-preamble"] == "yes"
    assert config["maxmemory-policy"] == "noeviction"
    assert config["port"] == "0"


async def test_the_server_does_not_see_our_environment(store, monkeypatch):
    monkeypatch.setenv("CODE_SESSIONS_ADMIN_KEY", "a" * 40)
    async with store:
        assert "CODE_SESSIONS_ADMIN_KEY" not in psutil.Process(store.pid).environ()


async def test_a_server_that_is_killed_is_started_again_with_all_acknowledged_writes(store):
    async with store, connect(store.socket_path) as client:
        await client.set("kept", "yes")
        killed = store.pid
        os.kill(killed, signal.SIGKILL)
        assert await client.get("kept") == b"yes"
        assert store.pid != killed


async def test_half_a_command_at_the_end_of_the_append_only_file_is_dropped(store):
    async with store, connect(store.socket_path) as client:
        await client.set("kept", "yes")
    [tail] = (store.store_dir / "appendonlydir").glob("*.incr.aof")
    with tail.open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$4\r\nlost\r\n$100\r\nhalf")
    async with store, connect(store.socket_path) as client:
        assert await client.get("kept") == b"yes"
        assert await client.get("lost") is None


async def test_a_file_damaged_in_the_middle_is_refused_with_the_servers_words_and_leaves_no_lock(store):
    async with store, connect(store.socket_path) as client:
        await client.set("kept", "yes")
    [tail] = (store.store_dir / "appendonlydir").glob("*.incr.aof")
    sound = tail.read_bytes()
    tail.write_bytes(b"garbage\r\n" + sound)
    with pytest.raises(EmbeddedStoreError, match="Bad file format"):
        await store.start()
    tail.write_bytes(sound)
    async with store, connect(store.socket_path) as client:
        assert await client.get("kept") == b"yes"


async def test_a_second_serve_on_the_same_folder_is_refused_and_told_the_first_ones_pid(tmp_path, store):
    async with store:
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} "):
            await _store(tmp_path).start()
        async with connect(store.socket_path) as client:
            assert await client.ping()


async def test_a_serve_waits_for_a_keys_command_that_has_the_folder(tmp_path):
    command = _store(tmp_path, role="keys")
    await command.start()
    serve = _store(tmp_path)
    starting = asyncio.create_task(serve.start())
    await asyncio.sleep(0.3)
    assert not starting.done()
    await command.stop()
    await starting
    await serve.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
async def test_the_server_ends_when_serve_is_killed(tmp_path):
    serve, server_pid = _serve(tmp_path)
    serve.kill()
    serve.wait()
    assert await _gone(server_pid, within_s=5)


async def test_a_killed_serve_is_followed_at_once_by_the_next_one_with_all_data(tmp_path, store):
    serve, server_pid = _serve(tmp_path)
    async with connect(store.socket_path) as client:
        await client.set("kept", "yes")
    serve.kill()
    async with store, connect(store.socket_path) as client:
        assert not psutil.pid_exists(server_pid) or psutil.Process(server_pid).status() == psutil.STATUS_ZOMBIE
        assert await client.get("kept") == b"yes"
    serve.wait()


async def test_a_left_over_server_is_asked_to_end_before_another_one_starts(tmp_path, store, monkeypatch):
    monkeypatch.setattr("orchestrator.store.embedded._end_with_parent", lambda: None)  # as where prctl(2) is missing
    left_over = _store(tmp_path)
    await left_over.start()
    left_over._supervisor.cancel()
    server_pid = left_over.pid
    async with connect(left_over.socket_path) as client:
        await client.set("kept", "yes")
    left_over._release()  # what the kernel does when `serve` is killed
    async with store, connect(store.socket_path) as client:
        assert store.pid != server_pid
        assert left_over.pid is None
        assert await client.get("kept") == b"yes"


async def test_a_lock_belongs_to_the_open_file_and_says_who_has_it(tmp_path):
    first, second = FolderLock(tmp_path / "lock"), FolderLock(tmp_path / "lock")
    assert first.try_acquire(role="serve")
    assert not await second.acquire(wait_s=0.1)
    assert second.note() == {"pid": os.getpid(), "role": "serve"}
    first.release()
    assert second.try_acquire()


def test_a_note_that_cannot_be_read_is_empty(tmp_path):
    lock = FolderLock(tmp_path / "lock")
    assert lock.note() == {}
    for text in ("", "{", json.dumps([1])):
        lock.path.write_text(text)
        assert lock.note() == {}


def test_a_link_is_not_accepted_as_a_private_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(SettingsError, match="not a folder of this user"):
        private_folder(tmp_path / "link")


def test_a_folder_that_others_could_enter_is_closed(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    assert private_folder(tmp_path / "open").stat().st_mode & 0o777 == 0o700


async def test_a_command_uses_the_running_serves_store(tmp_path):
    settings = load_settings(data_dir=tmp_path)
    serve = EmbeddedValkey(settings.data_dir, settings.run_dir)
    async with serve, connect(serve.socket_path) as client, open_store(settings, role="keys") as other:
        await other.set("from", "command")
        assert await client.get("from") == b"command"
        pid = serve.pid
    assert not psutil.pid_exists(pid)


async def test_a_command_that_meets_a_serve_that_was_just_killed_starts_the_store_itself(tmp_path):
    settings = load_settings(data_dir=tmp_path / "a folder")
    process, _ = _serve(tmp_path, settings.run_dir)
    process.kill()
    async with open_store(settings, role="keys") as client:
        assert await client.ping()
    process.wait()


async def test_a_command_starts_the_store_for_the_moment_when_nothing_runs(tmp_path):
    settings = load_settings(data_dir=tmp_path)
    async with open_store(settings, role="keys") as client:
        await client.set("kept", "yes")
    assert not (settings.run_dir / "store.sock").exists()
    async with open_store(settings, role="keys") as client:
        assert await client.get("kept") == b"yes"
