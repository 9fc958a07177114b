"""What stays out of an archive, and why: what is never wanted in a release, and what the project's ignore files name.

`.deployignore` in the project's folder, else `.dockerignore`, else `.gitignore`: the first that is there counts alone.
`.deployignore` and `.gitignore` work as in git, those in folders below included; `.dockerignore` as for `docker build`:
one file, patterns from the project's folder on, and what is in a folder that is left out can be taken back.
"""

import os
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from pathspec.patterns.gitignore import GitIgnorePatternError
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

IGNORE_FILES: Final = (".deployignore", ".dockerignore", ".gitignore")
MAX_IGNORE_FILE_BYTES: Final = 256 * 1024
_MAX_SHOWN_PATTERN: Final = 100
# `docker build` reads these whatever .dockerignore says of them, and so do we.
_ALWAYS_IN_CONTEXT: Final = frozenset({"Dockerfile", ".dockerignore", "deploy.toml"})

# Never wanted in a release. Folders that a build makes (dist/, build/) are not here: they are often what is deployed.
_FOLDERS: Final = {
    **dict.fromkeys((".git", ".hg", ".svn", ".jj"), "history"),
    **dict.fromkeys((".ssh", ".gnupg", ".aws", ".kube"), "secret"),
    **dict.fromkeys(("node_modules", "bower_components", ".venv", "venv", "__pypackages__"), "dependencies"),
    **dict.fromkeys(
        (
            "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".tox", ".nox", ".cache",
            ".npm", ".parcel-cache", ".turbo", ".ipynb_checkpoints",
        ),
        "cache",
    ),
}  # fmt: skip
_FILES: Final = {
    ".git": "history",  # of a submodule or a worktree: a file that leads to the folder
    **dict.fromkeys((".env", ".netrc", ".npmrc", ".pypirc", ".git-credentials", ".pgpass"), "secret"),
    **dict.fromkeys((".DS_Store", "Thumbs.db", ".coverage"), "cache"),
}
_EXAMPLES: Final = {".env.example", ".env.sample", ".env.template"}
_SECRET_PREFIXES: Final = (".env.", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519")
_SECRET_SUFFIXES: Final = (".pem", ".key", ".p12", ".pfx", ".jks", ".keystore")
_CACHE_SUFFIXES: Final = (".pyc", ".pyo", ".swp")


class LeftOut(NamedTuple):
    """`reason` is stable: history, secret, dependencies, cache, ignored, link-out, special-file, unreadable, name."""

    path: str  # with a final slash for a folder, whose content is not looked at
    reason: str
    rule: str = ""  # of "ignored": `.gitignore:2: *.log`

    def as_json(self) -> dict[str, str]:
        return {name: value for name, value in self._asdict().items() if value}


class _Rule(NamedTuple):
    regex: re.Pattern[str]
    excludes: bool
    sees_folder_mark: bool  # its regular expression wants a folder's path with a final slash
    text: str  # the pattern as it was written
    source: str


class _RuleFile(NamedTuple):
    folder: str  # where its patterns start: "" or with a final slash
    rules: list[_Rule]  # the last first: it has the last word

    def decide(self, path: str, *, is_folder: bool) -> _Rule | None:
        name = path[len(self.folder) :]
        marked = name + "/" if is_folder else name
        for rule in self.rules:
            if rule.regex.search(marked if rule.sees_folder_mark else name):
                return rule
        return None


class IgnoreRules:
    """Rules of one project. `enter` and `leave` follow the walk, so that nested files count where they are."""

    def __init__(self, read: Callable[[str], bytes | None]) -> None:
        """`read` gives the start of a file in the project's folder, None when there is none."""
        self._files: list[_RuleFile] = []
        self.name = ""
        for name in IGNORE_FILES:
            data = read(name)
            if data is not None:
                self.name = name
                self._files.append(_parse(data, "", name))
                break

    @property
    def nests(self) -> bool:
        """Whether files of the same name in folders below count, too."""
        return self.name in {".deployignore", ".gitignore"}

    def enter(self, folder: PurePosixPath, data: bytes | None) -> None:
        """The walk goes into a folder whose own ignore file is `data`."""
        if data is not None:
            self._files.append(_parse(data, f"{folder}/", self.name))

    def leave(self, folder: PurePosixPath) -> None:
        if self._files and self._files[-1].folder == f"{folder}/":
            self._files.pop()

    def why_left_out(self, path: PurePosixPath, *, is_folder: bool) -> LeftOut | None:
        """None: it belongs into the archive, or, for a folder, something in it may."""
        text = str(path)
        if self.name == ".dockerignore" and text in _ALWAYS_IN_CONTEXT:
            return None
        decided = self._decide(text, is_folder=is_folder)
        shown = text + "/" if is_folder else text
        default = _default_reason(path.name, is_folder=is_folder)
        if default and not (decided is not None and _names(decided, path.name)):
            return LeftOut(shown, default)
        if decided is None or not decided.excludes:
            return None
        if is_folder and self.name == ".dockerignore" and any(not rule.excludes for rule in self._files[0].rules):
            return None  # something in it may be taken back
        return LeftOut(shown, "ignored", f"{decided.source}: {decided.text[:_MAX_SHOWN_PATTERN]}")

    def _decide(self, path: str, *, is_folder: bool) -> _Rule | None:
        """The rule with the last word: git asks the nearest file first."""
        for file in reversed(self._files):
            rule = file.decide(path, is_folder=is_folder)
            if rule is not None:
                return rule
        return None


def _names(rule: _Rule, name: str) -> bool:
    """`!.env.production` in .deployignore takes back what is left out by default; `!*` and other files do not."""
    return not rule.excludes and rule.source.startswith(".deployignore") and rule.text.rstrip("/").endswith(name)


def _default_reason(name: str, *, is_folder: bool) -> str:
    if is_folder:
        return _FOLDERS.get(name, "")
    if name in _FILES:
        return _FILES[name]
    if (name.startswith(_SECRET_PREFIXES) and not name.endswith(".pub") and name not in _EXAMPLES) or name.endswith(
        _SECRET_SUFFIXES
    ):
        return "secret"
    return "cache" if name.endswith(_CACHE_SUFFIXES) else ""


def _parse(data: bytes, folder: str, name: str) -> _RuleFile:
    lines = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")).split("\n")
    translate = _docker_rule if name == ".dockerignore" else _git_rule
    rules = []
    for number, line in enumerate(lines, start=1):
        rule = translate(line.removesuffix("\r"), f"{folder}{name}:{number}")
        if rule is not None:
            rules.append(rule)
    return _RuleFile(folder, rules[::-1])


def _git_rule(line: str, source: str) -> _Rule | None:
    """Git decides for each entry by itself on its way down, so a pattern has to match the entry, not a folder above."""
    try:
        regex, excludes = GitIgnoreSpecPattern.pattern_to_regex(line)
    except GitIgnorePatternError:
        return None  # as git does with what is no pattern
    if regex is None or excludes is None:
        return None
    has_mark = "(?P<ps_d>/)" in regex
    return _Rule(re.compile(regex + (r"\Z" if has_mark else ""), re.DOTALL), excludes, has_mark, line.strip(), source)


def _docker_rule(line: str, source: str) -> _Rule | None:
    """https://docs.docker.com/build/concepts/context/#dockerignore-files: anchored, cleaned, the last match decides,
    and a pattern that matches a folder matches all in it."""
    text = line.strip()
    if not text or text.startswith("#"):
        return None
    excludes = not text.startswith("!")
    pattern = os.path.normpath("/" + text.removeprefix("!").strip()).lstrip("/")
    try:
        regex, _ = GitIgnoreSpecPattern.pattern_to_regex("/" + pattern)
    except GitIgnorePatternError:
        return None
    return _Rule(re.compile(regex, re.DOTALL), excludes, False, text, source) if regex else None
