"""What stays out of an archive: git itself is asked what its rules mean, Docker's documentation what its own mean."""

import io
import os
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.zip_folder import Archive


def archive(root):
    """The archive's names, and what was left out: path -> (reason, rule)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as sink:
        made = Archive(root, sink)
        made.write()
        names = sink.namelist()
    left_out = {item["path"]: (item["reason"], item.get("rule", "")) for item in made.facts()["leftOutList"]}
    return names, left_out


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def what_git_takes(root):
    environment = {"PATH": os.environ["PATH"], "HOME": str(root), "GIT_CONFIG_NOSYSTEM": "1"}
    git = ["git", "-c", "core.excludesFile=/dev/null", "-C", str(root)]
    subprocess.run([*git, "init", "-q", "--template="], check=True, env=environment)
    listed = subprocess.run(
        [*git, "ls-files", "-z", "--others", "--exclude-standard"], check=True, env=environment, capture_output=True
    )
    return sorted(name for name in listed.stdout.decode().split("\0") if name)


NAME = st.sampled_from(["a", "b", "ab", "x.log", "keep.log", "[b]", "#b", "é", "a b"])
PATH = st.lists(NAME, min_size=1, max_size=4).map("/".join)
SEGMENT = st.one_of(NAME, st.sampled_from(["*", "**", "*.log", "?", "[ab]", "[!a]", "a*", r"\#b", "*b"]))
PATTERN = st.builds(
    lambda negated, anchored, segments, folder: f"{'!' * negated}{'/' * anchored}{'/'.join(segments)}{'/' * folder}",
    st.booleans(),
    st.booleans(),
    st.lists(SEGMENT, min_size=1, max_size=3),
    st.booleans(),
)
LINES = st.lists(st.one_of(PATTERN, st.sampled_from(["", "# no", "   ", "a  ", "b\r"])), max_size=6).map("\n".join)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    paths=st.sets(PATH, min_size=1, max_size=12),
    ignore=LINES,
    below=st.dictionaries(st.sampled_from(["a", "b", "a/b", "ab"]), LINES, max_size=2),
)
def test_git_and_the_archive_take_the_same_files(paths, ignore, below):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = dict.fromkeys(sorted(paths), "") | {f"{place}/.gitignore": lines for place, lines in below.items()}
        for name, text in {".gitignore": ignore, **files}.items():
            path = root / name
            if any(parent.is_file() for parent in path.parents) or path.is_dir():
                continue  # this name is a folder or a file already
            write(root, {name: text})
        assert sorted(archive(root)[0]) == what_git_takes(root)


@pytest.mark.parametrize("ignore", [".deployignore", ".gitignore"])
def test_ignore_files_in_folders_below_count_there_and_have_the_last_word(tmp_path, ignore):
    files = {ignore: "*.log\n", f"sub/{ignore}": "!*.log\n*.tmp\n"}
    files |= dict.fromkeys(["a.log", "a.tmp", "sub/a.log", "sub/a.tmp"], "")
    names, left_out = archive(write(tmp_path, files))
    assert names == [ignore, "a.tmp", f"sub/{ignore}", "sub/a.log"]
    assert left_out == {
        "a.log": ("ignored", f"{ignore}:1: *.log"),
        "sub/a.tmp": ("ignored", f"sub/{ignore}:2: *.tmp"),
    }


def test_a_file_in_an_ignored_folder_cannot_be_taken_back_as_in_git(tmp_path):
    root = write(tmp_path, {".gitignore": "docs/\n!docs/a.md\n", "docs/a.md": ""})
    assert archive(root) == ([".gitignore"], {"docs/": ("ignored", ".gitignore:1: docs/")})


def test_a_dockerignore_means_what_it_means_to_docker(tmp_path):
    """https://docs.docker.com/build/concepts/context/#syntax"""
    ignore = "# comment\n*.md\n!README.md\n/docs/../docs\n!docs/keep.txt\n**/*.tmp\nDockerfile\n.dockerignore\n"
    files = ["a.md", "README.md", "sub/b.md", "docs/gone.txt", "docs/keep.txt", "x.tmp", "sub/y/z.tmp", "Dockerfile"]
    names, left_out = archive(write(tmp_path, dict.fromkeys(files, "") | {".dockerignore": ignore}))
    assert sorted(names) == [".dockerignore", "Dockerfile", "README.md", "docs/keep.txt", "sub/b.md"]
    assert left_out["docs/gone.txt"] == ("ignored", ".dockerignore:4: /docs/../docs")


def test_only_what_a_dockerignore_takes_back_is_taken(tmp_path):
    root = write(tmp_path, {".dockerignore": "*\n!src\n", "a": "", "src/b": "", "src/c/d": "", "other/e": ""})
    assert archive(root)[0] == [".dockerignore", "src/b", "src/c/d"]


def test_what_is_left_out_by_default_is_listed_with_its_reason(tmp_path):
    reasons = {
        ".git/config": (".git/", "history"),
        ".env": (".env", "secret"),
        "sub/.env.production": ("sub/.env.production", "secret"),
        "id_ed25519": ("id_ed25519", "secret"),
        "tls.key": ("tls.key", "secret"),
        ".npmrc": (".npmrc", "secret"),
        "node_modules/x/i.js": ("node_modules/", "dependencies"),
        ".venv/bin/python": (".venv/", "dependencies"),
        "a/__pycache__/b.pyc": ("a/__pycache__/", "cache"),
    }
    names, left_out = archive(write(tmp_path, dict.fromkeys([*reasons, "app.py", "id_rsa.pub"], "")))
    assert names == ["app.py", "id_rsa.pub"]
    assert left_out == {path: (reason, "") for path, reason in reasons.values()}


def test_built_folders_are_deployed_unless_an_ignore_file_names_them(tmp_path):
    files = ["dist/index.html", "build/app.js", "out/x", "target/y", "public/z"]
    assert archive(write(tmp_path, dict.fromkeys(files, "")))[0] == sorted(files)
    assert archive(write(tmp_path, {".gitignore": "dist\n"}))[1] == {"dist/": ("ignored", ".gitignore:1: dist")}


def test_only_a_deployignore_that_says_so_by_name_takes_back_what_is_left_out_by_default(tmp_path):
    files = [".env.production", ".env", "certs/public.pem", ".git/config", "node_modules/x.js", "a.py"]
    root = write(tmp_path, dict.fromkeys(files, ""))
    write(root, {".gitignore": "!.env\n!*\n!node_modules/\n"})
    assert archive(root)[0] == [".gitignore", "a.py"]
    write(root, {".deployignore": "!*\n!*/\n!*.pem\n!.env.production\n!certs/public.pem\n!node_modules/\n"})
    assert archive(root)[0] == [
        ".deployignore", ".env.production", ".gitignore", "a.py", "certs/public.pem", "node_modules/x.js",
    ]  # fmt: skip


def test_the_list_of_what_is_left_out_is_bounded_and_the_count_is_not(tmp_path):
    write(tmp_path, {f"{number}.pyc": "" for number in range(700)})
    with zipfile.ZipFile(io.BytesIO(), "w") as sink:
        made = Archive(tmp_path, sink)
        made.write()
    facts = made.facts()
    assert (facts["leftOut"], facts["leftOutReasons"], len(facts["leftOutList"])) == (700, {"cache": 700}, 500)
