"""Archives of workspaces: kept by their hash, and unpacked as the hostile input that they are."""

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import struct
import time
import unicodedata
import zipfile
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Final

from deploy_pipeline.errors import ArchiveRefused

_MIB: Final = 1024 * 1024
_ABANDONED_S: Final = 3600
_COPY_BYTES: Final = 256 * 1024
_LINK_TARGET_BYTES: Final = 4096  # PATH_MAX
_NAME_BYTES: Final = 255  # NAME_MAX
_DIRECTORY_BYTES_PER_ENTRY: Final = 46 + 2 * 1024  # APPNOTE 4.3.12: the fixed part, and room for name and extra field
_END: Final = struct.Struct("<4s4H2LH")  # APPNOTE 4.3.16: end of central directory record
_LOCAL_HEADER_BYTES: Final = 30  # APPNOTE 4.3.7, without the name
_ZIP64_LOCATOR_BYTES: Final = 20
_ENCRYPTED: Final = 0x1
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What an archive may hold. `packed_bytes` is counted while it arrives, the others while it is unpacked."""

    packed_bytes: int = 512 * _MIB
    unpacked_bytes: int = 512 * _MIB
    files: int = 50_000
    path_bytes: int = 1024


class ArchiveWriter:
    """One archive on its way in. End it with `commit` or `abort`; `abort` after `commit` does nothing."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder, self._limits = folder, limits
        self._temporary = folder / f".{secrets.token_hex(8)}.part"
        self._file: BinaryIO | None = self._temporary.open("xb")
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes) -> None:
        """Append to the page cache: fast enough for an event loop in pieces up to 1 MiB.

        Raises:
            ArchiveRefused: past `packed_bytes`; nothing is kept.
        """
        if self._file is None:
            raise ValueError("the archive was committed or aborted")
        self._bytes += len(data)
        if self._bytes > self._limits.packed_bytes:
            self.abort()
            raise ArchiveRefused(f"The archive is larger than {self._limits.packed_bytes // _MIB} MiB.")
        self._hash.update(data)
        self._file.write(data)

    async def commit(self) -> tuple[str, int]:
        """Keep the archive, on disk before this returns. SHA-256 in hexadecimal, and size in bytes."""
        return await asyncio.to_thread(self._commit)

    def _commit(self) -> tuple[str, int]:
        if self._file is None:
            raise ValueError("the archive was committed or aborted")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        digest = self.sha256
        self._temporary.replace(self._folder / f"{digest}.zip")  # one that is there already has the same bytes
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return digest, self._bytes

    @property
    def size_bytes(self) -> int:
        """Of what was written."""
        return self._bytes

    @property
    def sha256(self) -> str:
        """Of what was written, in hexadecimal."""
        return self._hash.hexdigest()

    def close_unnamed(self) -> Path:
        """End the writing without keeping it as an archive: the file, which is the caller's to remove."""
        assert self._file is not None
        self._file.close()
        self._file = None
        return self._temporary

    def abort(self) -> None:
        """Forget what was written."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._temporary.unlink(missing_ok=True)


class ArchiveStore:
    """Archives in a folder, each named after its hash, so that the same files are kept once."""

    look_every_s: ClassVar[float] = 0.0  # how long housekeeping waits between two looks at what is stored
    is_shared: ClassVar[bool] = False  # by machines that do not see each other's releases

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self._folder, self.limits = folder, limits or Limits()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_abandoned(folder)

    @property
    def folder(self) -> Path:
        return self._folder

    def writer(self, limits: Limits | None = None) -> ArchiveWriter:
        return ArchiveWriter(self._folder, limits or self.limits)

    def path(self, sha256: str) -> Path:
        """Where the archive is.

        Raises:
            ArchiveRefused: there is none with this hash.
        """
        path = self._folder / f"{sha256}.zip"
        if not is_sha256(sha256) or not path.is_file():
            raise ArchiveRefused("The workspace's archive is no longer stored; deploy again.")
        return path

    @asynccontextmanager
    async def local(self, sha256: str) -> AsyncIterator[Path]:
        """The archive as a file of this machine, meanwhile.

        Raises:
            ArchiveRefused: there is none with this hash, or it is not what it was.
            ArchivesUnavailable: the store cannot be reached.
        """
        yield self.path(sha256)

    async def remove(self, sha256: str) -> None:
        """Forget an archive; already gone is success."""
        if is_sha256(sha256):
            await asyncio.to_thread((self._folder / f"{sha256}.zip").unlink, missing_ok=True)

    async def stored_before(self, age_s: float) -> set[str]:
        """The SHA-256 of every archive that was last stored more than `age_s` ago.

        Raises:
            ArchivesUnavailable: the store cannot be reached.
        """
        return {path.stem for path in await asyncio.to_thread(_older_than, self._folder, "*.zip", age_s)}

    async def remove_half_written(self, age_s: float) -> None:
        """What nobody has written to for `age_s` or longer, and nobody will finish."""
        for path in await asyncio.to_thread(_older_than, self._folder, ".*.part", age_s):
            path.unlink(missing_ok=True)


def is_sha256(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None


def _older_than(folder: Path, pattern: str, age_s: float) -> list[Path]:
    oldest, found = time.time() - age_s, []
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                found.append(path)
    return found


def _remove_abandoned(folder: Path) -> None:
    """What a process that was killed had not finished. An hour old: no archive takes that long."""
    oldest = time.time() - _ABANDONED_S
    for path in (*folder.glob(".*.part"), *folder.glob(".preview-*")):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def extract(archive: Path, destination: Path, limits: Limits | None = None) -> int:
    """Unpack `archive` into `destination`, which must not exist yet; the number of files. Blocking.

    Files are made 0644 or 0755 and folders 0755, whatever the archive says. Symbolic links are made when everything
    else is there, so that nothing is ever written through one.

    Raises:
        ArchiveRefused: damaged, past a limit, or trying something; then nothing is left of `destination`.
    """
    limits = limits or Limits()
    destination.mkdir(parents=True)
    try:
        with archive.open("rb") as file:
            _check_directory_size(file, limits)
            with zipfile.ZipFile(file) as opened:
                return _Extraction(opened, destination, limits).run()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, UnicodeError) as error:
        shutil.rmtree(destination, ignore_errors=True)
        raise ArchiveRefused(f"The archive is damaged: {error}") from error
    except BaseException:
        shutil.rmtree(destination, ignore_errors=True)
        raise


def _check_directory_size(file: BinaryIO, limits: Limits) -> None:
    """Refuse a directory that would eat the memory: zipfile reads all of it before anything can be counted."""
    size = file.seek(0, os.SEEK_END)
    if size < _END.size:
        raise ArchiveRefused("The archive is damaged: it is too short to be a zip.")
    file.seek(-_END.size, os.SEEK_END)
    signature, _, _, _, entries, directory_bytes, _, _ = _END.unpack(file.read(_END.size))
    if signature != b"PK\x05\x06":
        raise ArchiveRefused("The archive is damaged: it does not end as a zip without a comment does.")
    file.seek(max(0, size - _END.size - _ZIP64_LOCATOR_BYTES))
    too_many = entries > limits.files or directory_bytes > limits.files * _DIRECTORY_BYTES_PER_ENTRY
    # So few entries and bytes need no zip64 record, which zipfile would believe instead of the one just checked.
    if too_many or (size >= _END.size + _ZIP64_LOCATOR_BYTES and file.read(4) == b"PK\x06\x07"):
        raise ArchiveRefused(f"The archive has more than {limits.files} files.")


def _check_overlaps(entries: list[zipfile.ZipInfo], directory_start: int) -> None:
    """Refuse entries that share bytes: thousands of them can unpack one small piece, each within every limit.

    Python's zipfile looks for that, too, but only from 3.11.8 on (CVE-2024-0450).
    """
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise ArchiveRefused(f"The archive is damaged: {_shown(entry.filename)} shares bytes with another entry.")
        end = entry.header_offset + _LOCAL_HEADER_BYTES + entry.compress_size
    if end > directory_start:
        raise ArchiveRefused("The archive is damaged: an entry reaches into the directory.")


class _Extraction:
    """One archive being unpacked: what was seen so far, and how much."""

    def __init__(self, archive: zipfile.ZipFile, root: Path, limits: Limits) -> None:
        self._archive, self._root, self._limits = archive, root, limits
        self._bytes = 0
        self._spelling: dict[str, str] = {}  # case-folded path -> the path as it was first seen
        self._is_folder: dict[str, bool] = {}

    def run(self) -> int:
        entries = self._archive.infolist()
        if len(entries) > self._limits.files:
            raise ArchiveRefused(f"The archive has more than {self._limits.files} files.")
        if sum(entry.file_size for entry in entries) > self._limits.unpacked_bytes:
            raise self._too_large()  # by its own account, before anything is written
        _check_overlaps(entries, self._archive.start_dir)
        links: list[tuple[str, str]] = []
        for entry in entries:
            kind = self._kind(entry)
            path = self._checked_path(entry, is_folder=kind == stat.S_IFDIR)
            if kind == stat.S_IFLNK:
                links.append((path, self._link_target(entry, path)))
            elif kind == stat.S_IFREG:
                self._write(entry, path)
            else:
                (self._root / path).mkdir(parents=True, exist_ok=True, mode=0o755)
        self._make_links(links)
        return sum(not is_folder for is_folder in self._is_folder.values())

    def _kind(self, entry: zipfile.ZipInfo) -> int:
        kind = stat.S_IFMT(entry.external_attr >> 16) or (stat.S_IFDIR if entry.is_dir() else stat.S_IFREG)
        if entry.is_dir() != (kind == stat.S_IFDIR) or kind not in {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}:
            raise ArchiveRefused(f"{_shown(entry.filename)} is neither a file nor a folder nor a link.")
        if entry.flag_bits & _ENCRYPTED:
            raise ArchiveRefused(f"{_shown(entry.filename)} is encrypted.")
        if entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise ArchiveRefused(f"{_shown(entry.filename)} is packed in a way that is not supported.")
        return kind

    def _checked_path(self, entry: zipfile.ZipInfo, *, is_folder: bool) -> str:
        name = entry.orig_filename  # zipfile cuts `filename` at a NUL
        path = name.removesuffix("/") if is_folder else name
        parts = path.split("/")
        if "\0" in name or "\\" in name or any(part in {"", ".", ".."} for part in parts):
            raise ArchiveRefused(f"{_shown(name)} is not a path inside the project.")
        encoded = [part.encode() for part in parts]
        if len(path.encode()) > self._limits.path_bytes or any(len(part) > _NAME_BYTES for part in encoded):
            raise ArchiveRefused(f"The path {_shown(name)} is too long.")
        for depth in range(1, len(parts)):
            self._register("/".join(parts[:depth]), is_folder=True, implied=True)
        self._register(path, is_folder=is_folder, implied=False)
        return path

    def _register(self, path: str, *, is_folder: bool, implied: bool) -> None:
        """Every path once, in one spelling, and as one kind of thing."""
        seen = self._spelling.setdefault(unicodedata.normalize("NFC", path).casefold(), path)
        if seen != path:
            raise ArchiveRefused(f"{_shown(path)} and {_shown(seen)} differ only in case.")
        known = self._is_folder.setdefault(path, is_folder) if implied or is_folder else None
        if known is None:
            if path in self._is_folder:
                raise ArchiveRefused(f"{_shown(path)} is in the archive twice.")
            self._is_folder[path] = is_folder
        elif known is not is_folder:
            raise ArchiveRefused(f"{_shown(path)} is a file and a folder at once.")

    def _write(self, entry: zipfile.ZipInfo, path: str) -> None:
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        mode = 0o755 if (entry.external_attr >> 16) & 0o111 else 0o644
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as sink, self._archive.open(entry) as source:
            os.fchmod(descriptor, mode)  # whatever the umask is
            while piece := source.read(_COPY_BYTES):
                self._bytes += len(piece)
                if self._bytes > self._limits.unpacked_bytes:
                    raise self._too_large()
                sink.write(piece)

    def _link_target(self, entry: zipfile.ZipInfo, path: str) -> str:
        with self._archive.open(entry) as source:
            raw = source.read(_LINK_TARGET_BYTES + 1)
        target = raw.decode()
        depth = path.count("/")
        for part in target.split("/"):
            depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
            if depth < 0:
                raise _link_leads_out(path)
        if not raw or len(raw) > _LINK_TARGET_BYTES or raw.startswith(b"/") or b"\0" in raw:
            raise _link_leads_out(path)
        return target

    def _make_links(self, links: list[tuple[str, str]]) -> None:
        for path, target in links:
            (self._root / path).parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            (self._root / path).symlink_to(target)
        root = os.path.realpath(self._root)
        for path, _ in links:  # again, with all of them there: `a -> b/..` depends on what b is
            if not (os.path.realpath(self._root / path) + os.sep).startswith(root + os.sep):
                raise _link_leads_out(path)

    def _too_large(self) -> ArchiveRefused:
        return ArchiveRefused(f"The files are larger than {self._limits.unpacked_bytes // _MIB} MiB when unpacked.")


def _link_leads_out(path: str) -> ArchiveRefused:
    return ArchiveRefused(f"The link {_shown(path)} leads out of the project.")


def _shown(path: str) -> str:
    """Fit for a message: no control characters, and not endless."""
    return repr(path[:200])
