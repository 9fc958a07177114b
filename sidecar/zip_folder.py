"""`python -m sidecar.zip_folder ROOT`: ROOT as a zip to standard output, facts about it as JSON to standard error.

A program of its own that runs as the workspace's user: it can read no more than that user can. The same files give the
same bytes: entries are sorted, times fixed, modes 0644 or 0755. Only regular files and symbolic links that stay inside
are taken, and no link is ever followed: each folder and file is opened relative to its parent with O_NOFOLLOW, so a
tree that changes meanwhile cannot lead out of it either.
"""

import json
import os
import stat
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

import pathspec

MAX_FILES: Final = 50_000
MAX_BYTES: Final = 512 * 1024 * 1024
MAX_PATH_BYTES: Final = 1024
COPY_BYTES: Final = 256 * 1024
FIXED_TIME: Final = (1980, 1, 1, 0, 0, 0)  # the oldest that a zip can hold
IGNORE_FILES: Final = (".deployignore", ".dockerignore", ".gitignore")  # the first that is there counts
MAX_IGNORE_FILE_BYTES: Final = 256 * 1024
# Never wanted in a release: history, secrets, and what a build makes again.
LEFT_OUT: Final = (
    ".git/", ".hg/", ".svn/", ".env", ".env.*", "!.env.example", "*.pem", "*.key", "id_rsa*", "id_ed25519*",
    "id_ecdsa*", ".ssh/", ".netrc", ".npmrc", ".pypirc", "node_modules/", ".venv/", "venv/", "__pycache__/", "*.pyc",
    ".mypy_cache/", ".pytest_cache/", ".ruff_cache/", ".cache/", ".npm/", ".DS_Store", "*.swp",
)  # fmt: skip


class TooLarge(Exception):
    """The folder is past a limit; the message says which."""


class Archive:
    def __init__(self, root: Path, sink: zipfile.ZipFile) -> None:
        self._root, self._sink = root, sink
        self._defaults = pathspec.GitIgnoreSpec.from_lines(LEFT_OUT)
        self._ignored = pathspec.GitIgnoreSpec.from_lines(_ignore_lines(root))
        self.files = self.bytes = self.left_out = 0

    def write(self) -> None:
        """
        Raises:
            TooLarge: past MAX_FILES, MAX_BYTES or MAX_PATH_BYTES.
            OSError: the root cannot be read.
        """
        root = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._folder(root, PurePosixPath())
        finally:
            os.close(root)

    def _folder(self, folder: int, path: PurePosixPath) -> None:
        for name in sorted(os.listdir(folder)):
            entry_path = path / name
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except OSError:
                continue  # gone meanwhile
            is_folder = stat.S_ISDIR(status.st_mode)
            if self._is_left_out(entry_path, is_folder=is_folder):
                self.left_out += 1
                continue
            if is_folder:
                with suppress(OSError), _opened(name, os.O_DIRECTORY, folder) as below:
                    self._folder(below, entry_path)
            elif stat.S_ISREG(status.st_mode):
                self._file(name, folder, entry_path)
            elif stat.S_ISLNK(status.st_mode):
                self._link(name, folder, entry_path)
            else:
                self.left_out += 1  # sockets, pipes, devices

    def _is_left_out(self, path: PurePosixPath, *, is_folder: bool) -> bool:
        text = f"{path}/" if is_folder else str(path)
        return self._defaults.match_file(text) or self._ignored.match_file(text)

    def _entry(self, path: PurePosixPath, mode: int) -> zipfile.ZipInfo:
        text = str(path)
        if len(os.fsencode(text)) > MAX_PATH_BYTES:
            raise TooLarge(f"a path is longer than {MAX_PATH_BYTES} bytes: {text[:80]}…")
        self.files += 1
        if self.files > MAX_FILES:
            raise TooLarge(f"more than {MAX_FILES} files")
        entry = zipfile.ZipInfo(text, FIXED_TIME)
        entry.external_attr = mode << 16
        entry.create_system = 3  # Unix, whatever this runs on
        entry.compress_type = zipfile.ZIP_DEFLATED
        return entry

    def _file(self, name: str, folder: int, path: PurePosixPath) -> None:
        try:
            os.fsencode(name).decode()
        except UnicodeDecodeError:
            self.left_out += 1  # a zip's names are UTF-8
            return
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError:
            self.left_out += 1  # unreadable or gone
            return
        with open(file, "rb", buffering=0) as source:  # noqa: PTH123 - a descriptor, not a path
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                self.left_out += 1
                return
            mode = 0o755 if status.st_mode & 0o111 else 0o644
            entry = self._entry(path, stat.S_IFREG | mode)
            entry.file_size = status.st_size  # only a hint for zip64
            with self._sink.open(entry, "w") as target:
                while piece := source.read(COPY_BYTES):
                    self._count(len(piece))
                    target.write(piece)

    def _link(self, name: str, folder: int, path: PurePosixPath) -> None:
        try:
            target = os.readlink(name, dir_fd=folder)
            target.encode()
            name.encode()
        except (OSError, UnicodeEncodeError):
            self.left_out += 1
            return
        if not _stays_inside(path, target):
            self.left_out += 1
            return
        self._count(len(target))
        self._sink.writestr(self._entry(path, stat.S_IFLNK | 0o777), target)

    def _count(self, size: int) -> None:
        self.bytes += size
        if self.bytes > MAX_BYTES:
            raise TooLarge(f"more than {MAX_BYTES // (1024 * 1024)} MiB of files")


class _opened:  # noqa: N801 - used as a function
    """A file descriptor, opened without following a link, closed at the end of the block."""

    def __init__(self, name: str, flags: int, folder: int) -> None:
        self._fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | flags, dir_fd=folder)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _stays_inside(path: PurePosixPath, target: str) -> bool:
    if not target or target.startswith("/"):
        return False
    depth = len(path.parent.parts)
    for part in PurePosixPath(target).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return False
    return True


def _ignore_lines(root: Path) -> Iterator[str]:
    for name in IGNORE_FILES:
        try:
            with open(os.open(root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
                lines = file.read(MAX_IGNORE_FILE_BYTES).decode(errors="replace").splitlines()
        except OSError:
            continue
        yield from lines
        return


def main() -> int:
    """0 and facts; 1 and `{"error": …}`."""
    root = Path(sys.argv[1])
    try:
        with zipfile.ZipFile(sys.stdout.buffer, "w", compresslevel=1) as sink:
            archive = Archive(root, sink)
            archive.write()
        sys.stdout.buffer.flush()
    except (TooLarge, OSError) as error:
        sys.stderr.write(json.dumps({"error": str(error)}))
        return 1
    sys.stderr.write(json.dumps({"files": archive.files, "bytes": archive.bytes, "leftOut": archive.left_out}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
