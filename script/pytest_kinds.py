"""Pytest plugin of script/test: says how many tests of each kind ran, and fails when Docker's did not."""  # noqa: INP001

from collections import Counter

import pytest

_KINDS = ("plain", "docker")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kinds")
    group.addoption("--docker-must-run", action="store_true", help="fail when a docker test is skipped")
    group.addoption("--docker-must-exist", action="store_true", help="fail when no docker test is there to run")


class Kinds:
    """Counts outcomes for each kind."""

    def __init__(self) -> None:
        self.outcomes = {kind: Counter[str]() for kind in _KINDS}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test has up to three reports. It is counted once, by the one that tells whether it ran.
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            kind = "docker" if "docker" in report.keywords else "plain"
            self.outcomes[kind][report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for kind, outcomes in self.outcomes.items():
            ran = outcomes["passed"] + outcomes["failed"]
            terminalreporter.write_line(
                f"{kind}: {ran} ran, {outcomes['failed']} failed, {outcomes['skipped']} skipped"
            )

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        docker = self.outcomes["docker"]
        options = session.config.option
        nothing_ran = options.docker_must_exist and not docker["passed"] + docker["failed"]
        if nothing_ran or (options.docker_must_run and docker["skipped"]):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Kinds(), "kinds")
