"""Ending a release's processes ends no others."""

import psutil
import pytest

from deploy_pipeline.builders.processes import kill_release


def test_a_kill_that_names_no_deployment_is_refused_because_every_process_without_a_mark_would_be_meant(monkeypatch):
    monkeypatch.setattr(psutil, "process_iter", list)  # a failure of this test must not end the machine
    with pytest.raises(ValueError, match="no deployment"):
        kill_release("", grace_s=0)
