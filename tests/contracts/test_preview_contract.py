"""A preview and a deployment never disagree: one workspace, both ways through the helper, the one detection."""

import json
import subprocess
import sys

import pytest

from deploy_pipeline.archive import extract
from deploy_pipeline.detect import detect
from deploy_pipeline.errors import ArchiveRefused, NotDeployable
from deploy_pipeline.preview import READ, preview

FLASK = "from flask import Flask\napp = Flask(__name__)\n"
LARGE = "x = 1\n" * 300_000  # an entry file past what detection reads
PROJECTS = {
    "empty": {},
    "nothing": {"notes.txt": "x", "sub/more.txt": "y"},
    "static": {"index.html": "<h1>x</h1>", "style.css": "a{}"},
    "static below": {"public/index.html": "x", "src/x.css": "y"},
    "flask": {"app.py": FLASK, "requirements.txt": "flask\n", "index.html": "x"},
    "factory below": {"web/app.py": "from flask import Flask\ndef create_app():\n    return Flask('x')\n"},
    "too deep": {"a/b/app.py": FLASK},
    "large entry": {"main.py": LARGE},
    "object at the end of a large entry": {"main.py": LARGE + FLASK},
    "pyproject": {"main.py": FLASK, "pyproject.toml": '[project]\nname="x"\ndependencies=["flask>3"]\n'},
    "broken pyproject": {"main.py": FLASK, "pyproject.toml": "["},
    "node": {"package.json": '{"scripts": {"start": "node ."}}', "package-lock.json": "{}"},
    "node main below": {"package.json": '{"main": "lib/deep/run.js"}', "lib/deep/run.js": "1"},
    "broken node": {"package.json": "{"},
    "procfile": {"Procfile": "web: ./run\n", "run": "x"},
    "procfile without web": {"Procfile": "worker: ./run\n"},
    "dockerfile": {"Dockerfile": "FROM x\n", "app.py": FLASK},
    "settings": {"deploy.toml": 'start = "./run"\nport = 81\nhealth_path = "/up"\nenv = {A = "1"}\n'},
    "wrong settings": {"deploy.toml": "port = 0\n"},
    "app.json": {"app.json": '{"kind": "static", "root": "site"}', "site/index.html": "x"},
    "ignored": {".gitignore": "dist/\n", "dist/index.html": "x"},
    "ignored entry": {".dockerignore": "app.py\n", "app.py": FLASK, "index.html": "x"},
}


def run_helper(root, *options):
    done = subprocess.run(
        [sys.executable, "-I", "-m", "sidecar.zip_folder", str(root), *options], capture_output=True, check=True
    )
    return done.stdout, json.loads(done.stderr)


def write(root, files):
    root.mkdir()
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def previewed(tmp_path, runtime="docker"):
    data, facts = run_helper(tmp_path / "project", "--preview", json.dumps(READ))
    (tmp_path / "preview.zip").write_bytes(data)
    found = preview(tmp_path / "preview.zip", facts, runtime, tmp_path)
    assert [path.name for path in tmp_path.glob(".preview-*")] == []
    return found


@pytest.mark.parametrize("files", PROJECTS.values(), ids=PROJECTS.keys())
def test_a_preview_says_what_the_worker_finds(tmp_path, files):
    write(tmp_path / "project", files)
    data, facts = run_helper(tmp_path / "project")
    (tmp_path / "full.zip").write_bytes(data)
    extract(tmp_path / "full.zip", tmp_path / "src")
    try:
        plan, problem = detect(tmp_path / "src"), ""
    except NotDeployable as error:
        plan, problem = None, str(error)
    found = previewed(tmp_path)
    assert (found.plan, found.problem) == (plan, problem)
    assert (found.facts.files, found.facts.bytes) == (facts["files"], facts["bytes"])
    assert dict(found.facts.listed) == {
        str(path.relative_to(tmp_path / "src")): path.stat().st_size
        for path in (tmp_path / "src").rglob("*")
        if path.is_file()
    }


def test_a_preview_has_no_content_that_detection_does_not_read(tmp_path):
    files = {"app.py": FLASK, "secret.txt": "hunter2", "a/b/c/main.py": "hunter2 = 1", "data.json": '"hunter2"'}
    write(tmp_path / "project", files)
    (tmp_path / "out").mkdir()
    data, facts = run_helper(tmp_path / "project", "--preview", json.dumps(READ))
    (tmp_path / "a.zip").write_bytes(data)
    extract(tmp_path / "a.zip", tmp_path / "src")
    assert (tmp_path / "src/app.py").read_text() == FLASK
    assert {path: (tmp_path / "src" / path).stat().st_size for path in files if path != "app.py"} == {
        "secret.txt": 0, "a/b/c/main.py": 0, "data.json": 0,
    }  # fmt: skip
    assert ["secret.txt", 7] in facts["list"]


def test_a_built_folder_that_an_ignore_file_names_is_warned_about(tmp_path):
    write(tmp_path / "project", PROJECTS["ignored"])
    [warning] = previewed(tmp_path).warnings
    assert "dist/ is left out (.gitignore:1: dist/)" in warning


def test_locks_that_are_not_read_are_warned_about(tmp_path):
    write(tmp_path / "project", {"package.json": '{"scripts": {"start": "x"}}', "yarn.lock": ""})
    assert "yarn.lock is not read" in previewed(tmp_path).warnings[0]


def test_a_dockerfile_is_refused_in_the_local_runtimes_preview(tmp_path):
    write(tmp_path / "project", PROJECTS["dockerfile"])
    found = previewed(tmp_path, "local")
    assert found.plan is None
    assert "needs the docker runtime" in found.problem


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"files": -1, "bytes": 0},
        {"files": "1", "bytes": 0},
        {"files": 1, "bytes": 0, "list": [["a"]]},
        {"files": 1, "bytes": 0, "list": 3},
        {"files": 1, "bytes": 0, "list": [["a", 1]] * 1001},
        {"files": 1, "bytes": 0, "leftOutReasons": {"x": "y"}},
    ],
)
def test_facts_that_our_helper_would_not_give_are_refused(tmp_path, facts):
    with pytest.raises(ArchiveRefused, match="sound account"):
        preview(tmp_path / "none.zip", facts, "docker", tmp_path)
