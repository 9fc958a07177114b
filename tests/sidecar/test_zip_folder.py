"""The workspace's archive: the same files give the same bytes, and nothing from outside gets in."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import zipfile
from io import BytesIO

import pytest


def archive(root):
    done = subprocess.run(
        [sys.executable, "-I", "-m", "sidecar.zip_folder", str(root)], capture_output=True, check=False
    )
    return done.returncode, done.stdout, json.loads(done.stderr)


def names(data):
    with zipfile.ZipFile(BytesIO(data)) as opened:
        assert opened.testzip() is None
        return opened.namelist()


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


FILES = {"b.txt": "b", "a/z.txt": "z", "a/b/c.txt": "c", "é.txt": "é"}


def test_the_same_files_give_the_same_bytes_whenever_and_wherever_they_were_written(tmp_path):
    write(tmp_path / "one", FILES)
    write(tmp_path / "two", dict(reversed(FILES.items())))
    for path in (tmp_path / "two").rglob("*"):
        os.utime(path, (1, 1))
    code, first, facts = archive(tmp_path / "one")
    assert code == 0
    assert hashlib.sha256(first).hexdigest() == hashlib.sha256(archive(tmp_path / "two")[1]).hexdigest()
    assert facts["files"] == 4
    assert names(first) == ["a/b/c.txt", "a/z.txt", "b.txt", "é.txt"]


def test_a_changed_byte_or_executable_bit_gives_another_archive(tmp_path):
    write(tmp_path, FILES)
    before = archive(tmp_path)[1]
    (tmp_path / "b.txt").chmod(0o755)
    executable = archive(tmp_path)[1]
    (tmp_path / "b.txt").write_text("B")
    assert len({before, executable, archive(tmp_path)[1]}) == 3


def test_links_are_never_followed_and_those_that_lead_out_are_left_out(tmp_path):
    outside = tmp_path / "outside"
    write(outside, {"secret.txt": "secret"})
    root = tmp_path / "root"
    write(root, {"in/real.txt": "real"})
    (root / "file-out").symlink_to(outside / "secret.txt")
    (root / "folder-out").symlink_to(outside)
    (root / "up").symlink_to("../outside/secret.txt")
    (root / "in" / "sideways").symlink_to("../../outside")
    (root / "in" / "link").symlink_to("real.txt")
    (root / "to-in").symlink_to("in/real.txt")
    code, data, facts = archive(root)
    assert code == 0
    assert names(data) == ["in/link", "in/real.txt", "to-in"]
    assert b"secret" not in data
    assert facts["leftOut"] == 4
    with zipfile.ZipFile(BytesIO(data)) as opened:
        assert stat.S_ISLNK(opened.getinfo("in/link").external_attr >> 16)
        assert opened.read("in/link") == b"real.txt"


def test_history_secrets_and_caches_stay_at_home(tmp_path):
    left_out = [".git/config", ".env", ".env.production", "node_modules/x/i.js", ".venv/bin/python", "id_rsa", "k.pem"]
    left_out += ["__pycache__/a.pyc", "sub/.env", "sub/node_modules/y.js", ".ssh/config"]
    write(tmp_path, dict.fromkeys([*left_out, "app.py", ".env.example", "sub/app.py"], "x"))
    assert names(archive(tmp_path)[1]) == [".env.example", "app.py", "sub/app.py"]


@pytest.mark.parametrize("ignore", [".deployignore", ".dockerignore", ".gitignore"])
def test_an_ignore_file_is_obeyed(tmp_path, ignore):
    write(
        tmp_path, {ignore: "*.log\n/build/\n!keep.log\n", "a.log": "", "keep.log": "", "build/x": "", "sub/build/y": ""}
    )
    assert names(archive(tmp_path)[1]) == [ignore, "keep.log", "sub/build/y"]


def test_the_first_ignore_file_counts_alone(tmp_path):
    write(tmp_path, {".deployignore": "*.log\n", ".gitignore": "dist/\n", "a.log": "", "dist/built.js": ""})
    assert names(archive(tmp_path)[1]) == [".deployignore", ".gitignore", "dist/built.js"]


def test_pipes_sockets_and_unreadable_names_are_left_out(tmp_path):
    write(tmp_path, {"a": "a"})
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / os.fsdecode(b"bad-\xff-name")).write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    code, data, facts = archive(tmp_path)
    assert code == 0
    assert "a" in names(data)
    assert not [name for name in names(data) if "pipe" in name or "bad" in name]
    assert facts["leftOut"] == 2


def test_too_many_files_are_refused_with_the_limit(tmp_path):
    for number in range(50_001):
        (tmp_path / f"{number}").touch()
    code, _, facts = archive(tmp_path)
    assert code == 1
    assert "50000" in facts["error"]


def test_a_folder_that_is_gone_says_so(tmp_path):
    code, _, facts = archive(tmp_path / "nothing")
    assert code == 1
    assert "nothing" in facts["error"]
