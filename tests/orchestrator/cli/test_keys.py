import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.access.keys import KeyStore
from orchestrator.cli.main import main
from orchestrator.settings import load_settings
from orchestrator.store.connection import connect
from orchestrator.store.embedded import EmbeddedValkey


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def _run(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CODE_SESSIONS_")}
    given = {f"CODE_SESSIONS_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "orchestrator.cli.main", *arguments]
    return subprocess.run(command, env=clean | given, capture_output=True, text=True, timeout=30, check=False)


def test_a_key_is_created_listed_and_revoked_without_a_running_serve(data_dir):
    made = _run("keys", "create", "--name", "ci", "--scope", "code-sessions:read", data_dir=data_dir)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("csk_")
    assert len(made.stdout.splitlines()) == 1
    [listed] = json.loads(_run("keys", "list", "--json", data_dir=data_dir).stdout)
    assert (listed["name"], listed["scopes"], listed["revokedAt"]) == ("ci", ["code-sessions:read"], None)
    assert _run("keys", "revoke", listed["id"], data_dir=data_dir).returncode == 0
    table = _run("keys", "list", data_dir=data_dir).stdout
    assert "revoked" in table
    assert made.stdout.strip() not in table


async def test_a_key_made_beside_a_running_serve_works_there(data_dir):
    settings = load_settings(data_dir=data_dir)
    store = EmbeddedValkey(settings.data_dir, settings.run_dir)
    arguments = ["keys", "create", "--name", "ci", "--scope", "code-sessions:read", "--scope", "api-keys:admin",
                 "--user", "user_a", "--organization", "org_a", "--expires-in-days", "7",
                 "--rate-limit-per-minute", "9", "--json"]  # fmt: skip
    async with store, connect(store.socket_path) as client:
        made = await asyncio.to_thread(_run, *arguments, data_dir=data_dir)
        assert made.returncode == 0, made.stderr
        document = json.loads(made.stdout)
        key = await KeyStore(client).authenticate(document["secret"])
    assert (key.id, key.user_id, key.organization_id) == (document["id"], "user_a", "org_a")
    assert key.rate_limit_per_minute == 9
    assert len(key.scopes) == 2
    assert key.expires_at_ms - key.created_at_ms == pytest.approx(7 * 86_400_000, abs=5_000)


def test_a_key_is_made_in_the_redis_that_the_url_names(valkey, redis, data_dir):
    made = _run("keys", "create", "--name", "a", "--scope", "code-sessions:read", redis_url=f"unix://{valkey}")
    assert made.returncode == 0, made.stderr
    listed = _run("keys", "list", "--json", redis_url=f"unix://{valkey}", data_dir=data_dir)
    assert [key["name"] for key in json.loads(listed.stdout)] == ["a"]
    assert not data_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["keys", "create", "--name", "a"], 2, "--scope"),
        (["keys", "create", "--name", "a", "--scope", "everything"], 2, "everything"),
        (["keys", "create", "--scope", "code-sessions:read"], 2, "--name"),
        (["keys", "create", "--name", "", "--scope", "code-sessions:read"], 2, "name"),
        (["keys", "create", "--name", "a", "--scope", "code-sessions:read", "--user", "bob"], 2, "userId"),
        (["keys", "revoke", "key_nosuch"], 1, "key_nosuch"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_what_cannot_be_done_is_said_on_stderr_with_an_exit_code(
    data_dir, arguments, exit_code, said, monkeypatch, capsys
):
    monkeypatch.setenv("CODE_SESSIONS_DATA_DIR", str(data_dir))
    monkeypatch.setattr(sys, "argv", ["code-sessions", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == exit_code
    assert said in printed.err
    assert printed.out == ""


def test_a_store_that_does_not_answer_is_said_without_a_traceback():
    done = _run("keys", "list", redis_url="unix:///nonexistent.sock")
    assert (done.returncode, "store" in done.stderr, "Traceback" in done.stderr) == (1, True, False)


def test_wrong_settings_are_said_by_name():
    done = _run("keys", "list", runtime="cloud")
    assert (done.returncode, "CODE_SESSIONS_RUNTIME" in done.stderr) == (2, True)


@pytest.mark.parametrize("arguments", [[], ["keys"]])
def test_help_lists_the_commands(arguments):
    done = _run(*arguments, "--help")
    assert done.returncode == 0
    for command in ("create", "list", "revoke") if arguments else ("serve", "worker", "gateway", "keys"):
        assert command in done.stdout


def test_help_loads_neither_servers_nor_clients():
    heavy = ("aiohttp", "docker", "redis", "pydantic", "asyncio")
    code = (
        "import sys; from orchestrator.cli import main\n"
        "try: main.app(['--help'])\n"
        f"except SystemExit: print('loaded:', [name for name in {heavy} if name in sys.modules])"
    )
    began_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip().endswith("loaded: []")
    assert time.monotonic() - began_s < 2
