"""`python -m sidecar.zip_folder ROOT`: ROOT as a zip to standard output, facts about it as JSON to standard error.

A program of its own that runs as the workspace's user: it can read no more than that user can. The same files give the
same bytes: entries are sorted, times fixed, modes 0644 or 0755. Only regular files and symbolic links that stay inside
are taken, and no link is ever followed: each folder and file is opened relative to its parent with O_NOFOLLOW, so a
tree that changes meanwhile cannot lead out of it either.

Facts: {files, bytes, leftOut, leftOutReasons: {reason: count}, leftOutList: [{path, reason, rule}], ignoreFile}.

With `--preview '{"read": [name…], "depth": n, "fileBytes": n, "totalBytes": n}'` the zip has every file, but content
only of those with a name in `read` at most `depth` folders down, and of these only the start; and the facts have
`list`: [[path, bytes]…] of the first files. It costs the walk and not the reading.
"""

import json
import os
import stat
import sys
import zipfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from sidecar.ignore import MAX_IGNORE_FILE_BYTES, IgnoreRules, LeftOut

MAX_FILES: Final = 50_000
MAX_BYTES: Final = 512 * 1024 * 1024
MAX_PATH_BYTES: Final = 1024
COPY_BYTES: Final = 256 * 1024
FIXED_TIME: Final = (1980, 1, 1, 0, 0, 0)  # the oldest that a zip can hold
# What the lists in the facts may hold; the counts beside them are complete.
LISTED_FILES: Final = 1000
LISTED_LEFT_OUT: Final = 500
LISTED_BYTES: Final = 256 * 1024


class TooLarge(Exception):
    """The folder is past a limit; the message says which."""


@dataclass(frozen=True, slots=True)
class Preview:
    """Of which files a preview has the start: so many bytes of each, and of all of them together."""

    read: frozenset[str]
    depth: int
    file_bytes: int
    total_bytes: int

    @classmethod
    def from_json(cls, text: str) -> "Preview":
        wanted: dict[str, Any] = json.loads(text)
        return cls(
            frozenset(map(str, wanted["read"])),
            int(wanted["depth"]),
            int(wanted["fileBytes"]),
            int(wanted["totalBytes"]),
        )


class BoundedList:
    """The first items of many, as JSON."""

    def __init__(self, most: int) -> None:
        self.items: list[Any] = []
        self._most, self._bytes_left = most, LISTED_BYTES

    def add(self, item: Any, path: str) -> None:
        self._bytes_left -= len(os.fsencode(path)) + 64
        if len(self.items) < self._most and self._bytes_left > 0:
            self.items.append(item)


class Archive:
    def __init__(self, root: Path, sink: zipfile.ZipFile, preview: Preview | None = None) -> None:
        self._root, self._sink, self._preview = root, sink, preview
        self._content_bytes_left = preview.total_bytes if preview is not None else 0
        self._listed = BoundedList(LISTED_FILES)
        self._left_out, self._reasons = BoundedList(LISTED_LEFT_OUT), Counter[str]()
        self._rules = IgnoreRules(lambda _: None)
        self.files = self.bytes = 0

    def write(self) -> None:
        """
        Raises:
            TooLarge: past MAX_FILES, MAX_BYTES or MAX_PATH_BYTES.
            OSError: the root cannot be read.
        """
        root = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._rules = IgnoreRules(lambda name: _start_of(name, root))
            self._folder(root, PurePosixPath())
        finally:
            os.close(root)

    def facts(self) -> dict[str, Any]:
        facts = {
            "files": self.files,
            "bytes": self.bytes,
            "leftOut": self._reasons.total(),
            "leftOutReasons": dict(self._reasons),
            "leftOutList": self._left_out.items,
            "ignoreFile": self._rules.name,
        }
        return facts if self._preview is None else facts | {"list": self._listed.items}

    def _leave_out(self, left_out: LeftOut) -> None:
        self._reasons[left_out.reason] += 1
        shown = os.fsencode(left_out.path).decode(errors="replace")
        self._left_out.add(left_out._replace(path=shown).as_json(), shown)

    def _folder(self, folder: int, path: PurePosixPath) -> None:
        for name in sorted(os.listdir(folder)):
            entry_path = path / name
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except OSError:
                continue  # gone meanwhile
            is_folder = stat.S_ISDIR(status.st_mode)
            left_out = self._rules.why_left_out(entry_path, is_folder=is_folder)
            if left_out is not None:
                self._leave_out(left_out)
            elif not _is_utf8(name):
                self._leave_out(LeftOut(str(entry_path), "name"))  # a zip's names are UTF-8
            elif is_folder:
                self._below(name, folder, entry_path)
            elif stat.S_ISREG(status.st_mode):
                self._file(name, folder, entry_path)
            elif stat.S_ISLNK(status.st_mode):
                self._link(name, folder, entry_path)
            else:
                self._leave_out(LeftOut(str(entry_path), "special-file"))

    def _below(self, name: str, folder: int, path: PurePosixPath) -> None:
        _check_length(path)
        try:
            below = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY, dir_fd=folder)
        except OSError:
            self._leave_out(LeftOut(f"{path}/", "unreadable"))
            return
        try:
            if self._rules.nests:
                self._rules.enter(path, _start_of(self._rules.name, below))
            self._folder(below, path)
        except PermissionError:  # it may be entered, but not listed
            self._leave_out(LeftOut(f"{path}/", "unreadable"))
        finally:
            self._rules.leave(path)
            os.close(below)

    def _entry(self, path: PurePosixPath, mode: int) -> zipfile.ZipInfo:
        _check_length(path)
        self.files += 1
        if self.files > MAX_FILES:
            raise TooLarge(f"more than {MAX_FILES} files")
        entry = zipfile.ZipInfo(str(path), FIXED_TIME)
        entry.external_attr = mode << 16
        entry.create_system = 3  # Unix, whatever this runs on
        entry.compress_type = zipfile.ZIP_DEFLATED
        return entry

    def _file(self, name: str, folder: int, path: PurePosixPath) -> None:
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError:
            self._leave_out(LeftOut(str(path), "unreadable"))  # or gone
            return
        with open(file, "rb", buffering=0) as source:  # noqa: PTH123 - a descriptor, not a path
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                self._leave_out(LeftOut(str(path), "special-file"))
                return
            mode = 0o755 if status.st_mode & 0o111 else 0o644
            entry = self._entry(path, stat.S_IFREG | mode)
            if self._preview is not None:
                self._count(status.st_size)
                self._listed.add([str(path), status.st_size], str(path))
                content = source.read(self._wanted_bytes(path, self._preview))
                self._content_bytes_left -= len(content)
                self._sink.writestr(entry, content)
                return
            entry.file_size = status.st_size  # only a hint for zip64
            with self._sink.open(entry, "w") as target:
                while piece := source.read(COPY_BYTES):
                    self._count(len(piece))
                    target.write(piece)

    def _wanted_bytes(self, path: PurePosixPath, preview: Preview) -> int:
        if path.name not in preview.read or len(path.parts) > preview.depth + 1:
            return 0
        return min(preview.file_bytes, self._content_bytes_left)

    def _link(self, name: str, folder: int, path: PurePosixPath) -> None:
        try:
            target = os.readlink(name, dir_fd=folder)
            target.encode()
        except (OSError, UnicodeEncodeError):
            self._leave_out(LeftOut(str(path), "unreadable"))
            return
        if not _stays_inside(path, target):
            self._leave_out(LeftOut(str(path), "link-out"))
            return
        self._count(len(target))
        self._listed.add([str(path), len(target)], str(path))
        self._sink.writestr(self._entry(path, stat.S_IFLNK | 0o777), target)

    def _count(self, size: int) -> None:
        self.bytes += size
        if self.bytes > MAX_BYTES:
            raise TooLarge(f"more than {MAX_BYTES // (1024 * 1024)} MiB of files")


def _check_length(path: PurePosixPath) -> None:
    text = str(path)
    if len(os.fsencode(text)) > MAX_PATH_BYTES:
        raise TooLarge(f"a path is longer than {MAX_PATH_BYTES} bytes: {text[:80]}…")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _start_of(name: str, folder: int) -> bytes | None:
    """The start of a regular file; None when there is none."""
    with suppress(OSError):
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        with open(file, "rb") as source:  # noqa: PTH123 - a descriptor, not a path
            if stat.S_ISREG(os.fstat(file).st_mode):
                return source.read(MAX_IGNORE_FILE_BYTES)
    return None


def _stays_inside(path: PurePosixPath, target: str) -> bool:
    if not target or target.startswith("/"):
        return False
    depth = len(path.parent.parts)
    for part in PurePosixPath(target).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return False
    return True


def main() -> int:
    """0 and facts; 1 and `{"error": …}`."""
    root = Path(sys.argv[1])
    sys.setrecursionlimit(3 * MAX_PATH_BYTES)  # two frames for a folder, and a path has at most one for two bytes
    preview = Preview.from_json(sys.argv[3]) if sys.argv[2:3] == ["--preview"] else None
    try:
        with zipfile.ZipFile(sys.stdout.buffer, "w", compresslevel=1) as sink:
            archive = Archive(root, sink, preview)
            archive.write()
        sys.stdout.buffer.flush()
    except (TooLarge, OSError) as error:
        sys.stderr.write(json.dumps({"error": str(error)}))
        return 1
    sys.stderr.write(json.dumps(archive.facts()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
