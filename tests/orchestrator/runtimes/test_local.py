import os
import tempfile
from pathlib import Path

import pytest

from orchestrator.runtimes.base import RuntimeUnavailable
from orchestrator.runtimes.local import LocalRuntime

NOBODY = 65534


def _as_somebody_without_privileges(work):
    """Run `work` in a child that is not root, for whom permissions count; whether it went well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if os.getuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_workspace_with_closed_and_read_only_folders_is_removed():
    """As a package cache leaves them: Go's modules are read-only folders."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o777)
        runtime = LocalRuntime(root / "workspaces", root / "link")

        def make():
            below = root / "workspaces" / "ws_aaaa" / "home" / "cache" / "module" / "v1"
            below.mkdir(parents=True)
            (below / "file").write_text("x")
            closed = below.parent / "closed" / "below"
            closed.mkdir(parents=True)
            for path in (closed, closed.parent):
                path.chmod(0)
            for path in (below / "file", below, below.parent, below.parent.parent):
                path.chmod(0o555)

        assert _as_somebody_without_privileges(make)
        assert _as_somebody_without_privileges(lambda: runtime._stop("ws_aaaa", 0))
        assert not (root / "workspaces" / "ws_aaaa").exists()


def test_a_folder_that_cannot_be_removed_is_not_said_to_be_gone(tmp_path, monkeypatch):
    runtime = LocalRuntime(tmp_path / "workspaces", tmp_path / "link")
    (tmp_path / "workspaces" / "ws_aaaa").mkdir(parents=True)
    monkeypatch.setattr("orchestrator.runtimes.local._KILL_S", 0.05)
    monkeypatch.setattr("shutil.rmtree", lambda *_args, **_kwargs: None)
    with pytest.raises(RuntimeUnavailable):
        runtime._stop("ws_aaaa", 0)
