import sys

import pytest

from orchestrator.cli import main, serve


@pytest.mark.parametrize(("name", "entry"), [("serve", "run"), ("worker", "run_worker"), ("gateway", "run_gateway")])
def test_each_server_command_runs_its_server_with_the_settings(name, entry, monkeypatch):
    ran = []
    monkeypatch.setattr(serve, entry, lambda settings: ran.append(settings.port))
    monkeypatch.setenv("CODE_SESSIONS_PORT", "8123")
    monkeypatch.setattr(sys, "argv", ["code-sessions", name])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert (ended.value.code, ran) == (0, [8123])
