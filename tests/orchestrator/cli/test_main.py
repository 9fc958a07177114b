import inspect
import sys

import pytest

from orchestrator.cli import main, serve


@pytest.mark.parametrize("name", ["serve", "worker", "gateway"])
def test_each_server_command_runs_its_coroutine_with_the_settings(name, monkeypatch):
    ran = []

    def run(work, settings):
        ran.append((work.cr_code.co_name, settings.port))
        work.close()

    assert inspect.iscoroutinefunction(getattr(serve, name))
    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setenv("CODE_SESSIONS_PORT", "8123")
    monkeypatch.setattr(sys, "argv", ["code-sessions", name])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert (ended.value.code, ran) == (0, [(name, 8123)])
