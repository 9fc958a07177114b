import hashlib
import io
import os
import stat
import struct
import zipfile
import zlib

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


DIRECTORY_ENTRY = b"PK\x01\x02"


def patched(data, *, at, fmt, values):
    """With these fields of the first directory entry overwritten (APPNOTE 4.3.12)."""
    changed = bytearray(data)
    struct.pack_into(fmt, changed, data.index(DIRECTORY_ENTRY) + at, *values)
    return bytes(changed)


def overlapping():
    """Two entries of which the second has the first one's content."""
    data = zip_of(("a", b"x" * 1000), ("b", b"y" * 1000))
    first = data.index(DIRECTORY_ENTRY)
    second = data.index(DIRECTORY_ENTRY, first + 4)
    return data[:second] + data[second : second + 42] + struct.pack("<L", 0) + data[second + 46 :]


def quoted(kernel_bytes=100_000, copies=50):
    """https://www.bamsoftware.com/hacks/zipbomb/: local headers are content of the entries before them."""
    body, directory = bytearray(), b""
    deflated = zlib.compress(b"\0" * kernel_bytes, 9)[2:-4]
    for number in range(copies):
        name = b"%03d" % number
        header = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 33, 0, len(deflated), kernel_bytes, 3, 0) + name
        directory += struct.pack(
            "<4s6H3L5H2L", DIRECTORY_ENTRY, 20, 20, 0, 8, 0, 33, 0, 33 * (copies - number) + len(deflated),
            kernel_bytes, 3, 0, 0, 0, 0, 0, len(body),
        ) + name  # fmt: skip
        body += header
    body += deflated
    return (
        bytes(body) + directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, copies, copies, len(directory), len(body), 0)
    )


def with_zip64_size(size):
    """The entry's size stands in its zip64 field (APPNOTE 4.5.3), and is no size at all."""
    data = patched(SMALL, at=24, fmt="<LHH", values=[2**32 - 1, 1, 12])
    end = bytearray(data[-22:])
    struct.pack_into("<L", end, 12, struct.unpack_from("<L", end, 12)[0] + 12)
    return data[:-22] + struct.pack("<HHQ", 1, 8, size) + bytes(end)


SMALL = zip_of(("a", b"x" * 1000))
HOSTILE = {
    "a wrong CRC": (patched(SMALL, at=16, fmt="<L", values=[1]), "damaged"),
    "overlapping entries": (overlapping(), "damaged"),
    "quoted entries, a bomb": (quoted(), "shares bytes"),
    "an entry that reaches into the directory": (patched(SMALL, at=20, fmt="<L", values=[500]), "reaches into"),
    "an entry behind the end": (patched(SMALL, at=42, fmt="<L", values=[2**31]), "reaches into|damaged"),
    "a size that only zip64 would give": (patched(SMALL, at=24, fmt="<L", values=[2**32 - 1]), "larger|damaged"),
    "zip64 with a size of 2**63": (with_zip64_size(2**63), "larger"),
    "a zip64 end record": (SMALL[:-22] + b"PK\x06\x06" + bytes(52) + b"PK\x06\x07" + bytes(16) + SMALL[-22:], "files"),
    "another name in the local header": (SMALL[:30] + b"b" + SMALL[31:], "damaged"),
    "a comment behind the end": (SMALL[:-2] + struct.pack("<H", 3) + b"PK\5", "damaged"),
    "something unpacked as LZMA": (patched(SMALL, at=10, fmt="<H", values=[14]), "not supported|damaged"),
    "content cut short": (patched(SMALL, at=20, fmt="<L", values=[3]), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "match"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_zip_that_lies_is_refused(refused, data, match):
    refused(data, match)


def test_nothing_outside_of_the_folder_is_touched_whatever_the_archive_is(tmp_path):
    """All of the above and the classics once more, beside files that have to stay as they are."""
    bystander = tmp_path / "bystander"
    bystander.write_text("mine")
    hostile = [data for data, _ in HOSTILE.values()]
    hostile += [zip_of((name, b"taken")) for name in ("../bystander", str(bystander), "a/../../bystander")]
    hostile += [zip_of(("l", target, LINK), ("l/bystander", b"taken")) for target in (b"..", str(tmp_path).encode())]
    before = sorted(path.name for path in tmp_path.iterdir())
    for number, data in enumerate(hostile):
        archive = tmp_path / "hostile.zip"
        archive.write_bytes(data)
        with pytest.raises(ArchiveRefused):
            extract(archive, tmp_path / f"out{number}")
        archive.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert bystander.read_text() == "mine"
