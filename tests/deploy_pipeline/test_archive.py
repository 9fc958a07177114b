import hashlib
import io
import os
import stat
import struct
import zipfile

import pytest

from deploy_pipeline.archive import ArchiveStore, Limits, extract
from deploy_pipeline.errors import ArchiveRefused

LINK, FIFO, DEVICE = stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o644, stat.S_IFCHR | 0o644


def zip_of(*entries):
    """Entries are (name, content) or (name, content, mode)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, *mode in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (mode[0] if mode else stat.S_IFREG | 0o644) << 16
            archive.writestr(info, content)
    return buffer.getvalue()


@pytest.fixture
def unpack(tmp_path):
    def run(data, limits=None):
        (tmp_path / "a.zip").write_bytes(data)
        extract(tmp_path / "a.zip", tmp_path / "out", limits)
        return tmp_path / "out"

    return run


@pytest.fixture
def refused(tmp_path, unpack):
    def run(data, match, limits=None):
        with pytest.raises(ArchiveRefused, match=match):
            unpack(data, limits)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip"], "something was left behind"

    return run


async def test_an_archive_is_kept_once_under_its_hash(tmp_path):
    store = ArchiveStore(tmp_path / "archives")
    for _ in range(2):
        writer = store.writer()
        writer.write(b"one ")
        writer.write(b"two")
        assert await writer.commit() == (hashlib.sha256(b"one two").hexdigest(), 7)
        writer.abort()
    assert len(list((tmp_path / "archives").iterdir())) == 1
    assert store.path(hashlib.sha256(b"one two").hexdigest()).read_bytes() == b"one two"


async def test_an_aborted_archive_leaves_nothing(tmp_path):
    store = ArchiveStore(tmp_path)
    writer = store.writer()
    writer.write(b"x")
    writer.abort()
    assert list(tmp_path.iterdir()) == []


async def test_an_archive_past_the_limit_is_refused_while_it_arrives(tmp_path):
    writer = ArchiveStore(tmp_path, Limits(packed_bytes=10)).writer()
    writer.write(b"x" * 10)
    with pytest.raises(ArchiveRefused):
        writer.write(b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "0" * 64, "a" * 64 + "\n"])
def test_an_unknown_archive_is_refused(tmp_path, sha256):
    with pytest.raises(ArchiveRefused):
        ArchiveStore(tmp_path).path(sha256)


def test_files_modes_folders_and_links_inside_the_tree_are_unpacked(unpack):
    out = unpack(
        zip_of(
            ("a/b/run.sh", b"#!/bin/sh\n", stat.S_IFREG | 0o4777),
            ("a/plain", b"x" * 100_000),
            ("empty/", b"", stat.S_IFDIR | 0o700),
            ("a/link", b"b/run.sh", LINK),
            ("a/b/up", b"../plain", LINK),
            ("a-dir", b"a", LINK),
            ("here", b".", LINK),
            ("dangling", b"nowhere", LINK),
            ("ünïcode 😀", b"y"),
        )
    )
    assert stat.S_IMODE((out / "a/b/run.sh").stat().st_mode) == 0o755, "set-uid bits are dropped"
    assert stat.S_IMODE((out / "a/plain").stat().st_mode) == 0o644
    assert (out / "a/link").read_bytes() == b"#!/bin/sh\n"
    assert (out / "a/b/up").stat().st_size == (out / "a-dir/plain").stat().st_size == 100_000
    assert (out / "empty").is_dir()
    assert (out / "ünïcode 😀").read_bytes() == b"y"


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/x", "a//b", "./x", "a/./b", "..", "a\\..\\..\\x", "C:\\x", "/", "a/.."]
)
def test_a_zip_with_a_path_outside_the_tree_is_refused(refused, name):
    refused(zip_of(("ok", b"x"), (name, b"x")), "not a path|neither")


def test_a_name_with_a_nul_is_refused(refused):
    refused(zip_of(("a.txt_x", b"x")).replace(b"a.txt_x", b"a.txt\0x"), "not a path")


@pytest.mark.parametrize("target", ["/etc/passwd", "..", "../x", "a/../../x", "../../../etc", "", "x\0y"])
def test_a_link_out_of_the_tree_is_refused(refused, target):
    refused(zip_of(("link", target.encode(), LINK)), "leads out")


def test_a_link_that_leads_out_only_through_another_link_is_refused(refused):
    refused(zip_of(("d/e/f", b"x"), ("d/e/up", b"../..", LINK), ("out", b"d/e/up/..", LINK)), "leads out")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_nothing_is_written_through_a_link(refused):
    refused(zip_of(("link", b"target", LINK), ("link/x", b"x"), ("target/y", b"y")), "file and a folder")
    refused(zip_of(("target/y", b"y"), ("link", b"target", LINK), ("link", b"x")), "twice")


@pytest.mark.parametrize("mode", [FIFO, DEVICE, stat.S_IFBLK | 0o644, stat.S_IFSOCK | 0o644])
def test_devices_pipes_and_sockets_are_refused(refused, mode):
    refused(zip_of(("thing", b"", mode)), "neither a file")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("one", "two", "match"),
    [
        ("a", "a", "twice"),
        ("README", "readme", "case"),
        ("Dir/x", "dir/y", "case"),
        ("straße", "STRASSE", "case"),
        ("é", "e\u0301", "case"),
        ("a", "a/b", "file and a folder"),
        ("a/b", "a", "twice"),
    ],
)
def test_duplicate_and_colliding_names_are_refused(refused, one, two, match):
    refused(zip_of((one, b"1"), (two, b"2")), match)


def test_a_bomb_is_refused_by_its_own_account(refused):
    refused(zip_of(("zeros", b"\0" * 2_000_000)), "larger than 1 MiB", Limits(unpacked_bytes=1024 * 1024))


def test_a_bomb_that_lies_about_its_size_is_refused_while_it_unpacks(refused):
    data = bytearray(zip_of(("zeros", b"\0" * 2_000_000)))
    honest = struct.pack("<L", 2_000_000)
    assert data.count(honest) == 2
    refused(bytes(data.replace(honest, struct.pack("<L", 100))), "damaged|larger", Limits(unpacked_bytes=1024 * 1024))


def test_too_many_files_are_refused(refused):
    refused(zip_of(*((f"f{n}", b"") for n in range(11))), "more than 10 files", Limits(files=10))


def test_a_directory_that_hides_its_count_is_refused_before_it_is_read(refused):
    data = bytearray(zip_of(*((f"f{n}", b"") for n in range(600))))
    struct.pack_into("<HH", data, len(data) - 14, 1, 1)
    refused(bytes(data), "more than 10 files", Limits(files=10))


def test_a_path_that_is_too_long_is_refused(refused):
    refused(zip_of(("/".join(["abcdefgh"] * 200), b"")), "too long")
    refused(zip_of(("x" * 256, b"")), "too long")


@pytest.mark.parametrize("data", [b"", b"PK", os.urandom(1000), zip_of(("a", b"x" * 1000))[:-30]])
def test_what_is_no_zip_is_refused(refused, data):
    refused(data, "damaged")


def test_a_damaged_file_is_refused(refused):
    data = bytearray(zip_of(("a", os.urandom(1000))))
    data[200] ^= 0xFF
    refused(bytes(data), "damaged")


def test_an_encrypted_entry_is_refused(refused):
    data = bytearray(zip_of(("a", b"x")))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    refused(bytes(data), "encrypted")
