"""README.md holds: its tour runs as it is written, its tables say what the code does, its links lead somewhere."""

import inspect
import os
import re
import subprocess
import time
from contextlib import asynccontextmanager

import pytest
from platformdirs import user_data_dir

import orchestrator.app
from deploy_pipeline import jobs
from orchestrator import models
from orchestrator.access.scopes import Scope
from orchestrator.api import problems
from orchestrator.errors import OrchestratorError
from orchestrator.settings import Settings
from sidecar import protocol
from tests.end_to_end.harness import ADMIN_KEY, Client, Serve
from tests.end_to_end.tour import ROOT, assert_the_tour_went_through, paste, readme_tour, section

DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _rows(text):
    """The cells of every table row whose first cell is code or a number."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()]
    return [row for row in rows if len(row) > 1 and re.match(r"`|\d", row[0])]


def test_the_tour_runs_as_it_is_written(shared_serve, tmp_path):
    assert_the_tour_went_through(paste(readme_tour(f"{shared_serve.origin}/api/v1", ADMIN_KEY), tmp_path))


def test_every_setting_stands_in_the_table_with_its_default(monkeypatch):
    for name in [name for name in os.environ if name.startswith("CODE_SESSIONS_")]:
        monkeypatch.delenv(name)
    defaults = {f"CODE_SESSIONS_{name.upper()}": _written(value) for name, value in Settings()}
    documented = {row[0].strip("`"): row[1] for row in _rows(section("Settings"))}
    assert documented.pop("CODE_SESSIONS_DATA_DIR") == "the platform's user data folder"
    assert defaults.pop("CODE_SESSIONS_DATA_DIR") == f"`{user_data_dir('code-sessions')}`"
    assert documented == defaults


def _written(value):
    if value is None or value == "":
        return "unset"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


async def test_every_route_stands_in_the_table_with_its_scope(redis, tmp_path, monkeypatch):
    found = []

    @asynccontextmanager
    async def no_listener(_listener, app):
        found.append(app)
        yield

    monkeypatch.setattr(orchestrator.app, "_api_listener", no_listener)
    settings = Settings(data_dir=tmp_path / "data")
    async with orchestrator.app.control_plane(settings, redis, None):
        routes = {
            f"`{route.method} {route.resource.canonical}`": _scope_of(route.handler)
            for route in found[0].router.routes()
            if route.method != "HEAD"
        }
    assert len(found) == 1
    assert {row[0]: row[1].strip("`") for row in _rows(section("The API")) if row[0][1].isupper()} == routes


def _scope_of(handler):
    named = re.search(r"require_scope\(request, Scope\.(\w+)\)", inspect.getsource(handler))
    return Scope[named[1]].value if named else "none"


def test_every_error_code_is_documented_with_its_status():
    classes, known = [OrchestratorError], {(417, "expectation-failed"), (400, "malformed-request")}
    while classes:
        below = classes.pop().__subclasses__()
        classes += below
        known |= {(error.status, error.code) for error in below if error.__module__.startswith("orchestrator.")}
    known |= {(status, problems._code_and_title(status)[0]) for status in problems._STABLE}
    documented = [(int(row[0]), row[1].strip("`")) for row in _rows(section("Errors")) if row[0].isdigit()]
    assert sorted(documented) == sorted(known)
    for code in {code for source in (ROOT / "orchestrator/api").glob("*.py") for code in _literal_codes(source)}:
        assert code in dict(map(reversed, documented)), code


def _literal_codes(source):
    return re.findall(r'\bcode="([a-z-]+)"', source.read_text())


def test_the_architecture_page_has_the_lifecycles_and_the_links_messages_as_they_are():
    page = (ROOT / "docs/architecture.md").read_text()
    for heading, table in (("session is", models.ALLOWED), ("deployment is", jobs.ALLOWED)):
        rows = _rows(re.search(rf"^\| {heading}.*?\n\n", page, re.MULTILINE | re.DOTALL)[0])
        assert {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in rows} == {
            str(state): {str(to) for to in allowed} for state, allowed in table.items()
        }
    named = re.findall(r"^  (\w+) +(?:\{|id,|one or more|bytes)", protocol.__doc__, re.MULTILINE)
    assert {"hello", "RECORDS", "welcome", "INPUT", "cancel"} <= set(named)
    assert set(named) == set(re.findall(r"^\| (?:sidecar|control plane) \| `?(\w+)", page, re.MULTILINE))


def test_the_architecture_page_names_every_key_of_the_store():
    page = (ROOT / "docs/architecture.md").read_text()
    for source in [*(ROOT / "orchestrator").rglob("*.py"), *(ROOT / "deploy_pipeline").rglob("*.py")]:
        for key in re.findall(r'"((?:cs|deploy):[a-z:{-]+)', source.read_text()):
            fixed = re.sub(r"\{[a-z]+$", "", key).replace("{{", "{")  # up to what is put in
            assert f"`{fixed}" in page, f"{key} of {source}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target.partition("#")[0]).exists(), target


@pytest.mark.timeout(300)
async def test_script_server_of_a_clean_clone_shows_a_key_once_and_a_tour_that_works_and_starts_again_at_once(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    serve = FromClone(clone, tmp_path / "data")
    try:
        welcome = serve.start(150).new_log()
        key = re.search(r"shown only this once.*\n\n  (\S+)\n", welcome)[1]
        assert f"listens on {serve.origin} " in welcome

        printed = paste(_printed_tour(welcome), tmp_path)
        assert "Hello from" in re.sub(r"echo Hello from", "", printed), printed

        async with Client(serve.origin, key) as client:
            session = await client.create("kept")
            await session.run("X=still-here")
            serve.stop()
            began = time.monotonic()
            welcome = serve.start().new_log()
            assert time.monotonic() - began < 3
            assert "csk_" not in welcome
            sessions = (await client.call("GET", "code-sessions")).json["sessions"]
            assert [(found["projectName"], found["status"]) for found in sessions] == [
                ("kept", "running"),
                ("hello", "completed"),
            ]
            text, _ = await session.run("echo $X")
            assert "still-here" in text
            await session.delete()
    finally:
        serve.stop()
        for process in serve.processes():
            process.kill()


def _printed_tour(welcome):
    tour = welcome.partition("A short tour to paste into a shell:\n")[2].partition("\nREADME.md")[0]
    assert tour.count("\n") > 5
    return tour


class FromClone(Serve):
    """`script/server` of a clone, with an environment of its own and no key in its settings."""

    def __init__(self, clone, data_dir):
        super().__init__(data_dir)
        self.command = [str(clone / "script/server")]
        del self.settings["CODE_SESSIONS_ADMIN_KEY"]
