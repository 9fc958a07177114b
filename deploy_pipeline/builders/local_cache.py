"""What local builds of one application leave for the next one: whole results, virtual environments, node_modules.

Everything stands in `<app>/builds/<name>/`, and counts only once its file `complete` is there. A release notes what
it uses in its file `built`; what no release of the application uses any more is removed with the last that did.
Blocking throughout.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import stat
import sys
from pathlib import Path
from typing import Final

from deploy_pipeline.builders.base import Release, write_atomically
from deploy_pipeline.builders.dockerfile import early_steps

_VERSION: Final = 1  # to be raised when builds are made in another way
_COMPLETE: Final = "complete"
_NOTE: Final = "built"


class BuildCache:
    """The one of a release's application."""

    def __init__(self, release: Release) -> None:
        self._release = release
        self._folder = release.folder.parent / "builds"
        plan = release.plan
        early = early_steps(plan, release.src)
        self._early = {step[0]: (step, names) for step, names in early}
        pip_steps = [step for step in plan.build if step[0] == "pip"]
        alone = all(step in {early_step for early_step, _ in early} for step in pip_steps) and all(
            step[0] in {"pip", "npm"} for step in plan.build
        )
        # A line of the project's own may install into the environment whatever it likes: then it is not shared.
        self._shares_venv = bool(plan.venv and alone)
        described = sorted(dataclasses.asdict(plan).items())
        self._result = "result-" + _hash(_VERSION, release.archive_sha256, described, sys.version, platform.platform())
        self._venv = "venv-" + (self._dependencies("pip") if self._shares_venv else self._result)
        self._modules = "modules-" + self._dependencies("npm") if "npm" in self._early else ""

    @property
    def venv(self) -> Path:
        """Where the environment is made; `release.folder / "venv"` leads there."""
        return self._folder / self._venv / "venv"

    @property
    def has_venv(self) -> bool:
        """A complete one from before, with everything installed."""
        return (self._folder / self._venv / _COMPLETE).exists()

    @property
    def has_modules(self) -> bool:
        return bool(self._modules) and (self._folder / self._modules / _COMPLETE).exists()

    def begin(self) -> None:
        """Note what this release uses, before any of it is made or read: nobody removes it from now on."""
        names = [name for name in (self._result, self._venv, self._modules) if name]
        write_atomically(self._release.folder / _NOTE, json.dumps(names))
        self._folder.mkdir(exist_ok=True)
        if self._release.plan.venv:
            if not self.has_venv:
                shutil.rmtree(self._folder / self._venv, ignore_errors=True)
                (self._folder / self._venv).mkdir()
            link = self._release.folder / "venv"
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(self.venv, self._release.folder))

    def reuse(self) -> bool:
        """Take the result of an earlier build of the same files and plan; whether there was one."""
        result = self._folder / self._result
        if not (result / _COMPLETE).exists() or (self._release.plan.venv and not self.has_venv):
            return False
        shutil.rmtree(self._release.src)
        shutil.copytree(result / "src", self._release.src, symlinks=True)
        return True

    def take_modules(self) -> None:
        shutil.copytree(
            self._folder / self._modules / "node_modules", self._release.src / "node_modules", symlinks=True
        )

    def keep_modules(self) -> None:
        made = self._release.src / "node_modules"
        if self._modules and made.is_dir():
            self._keep(self._modules, made, "node_modules")

    def keep_venv(self) -> None:
        (self._folder / self._venv / _COMPLETE).touch()

    def keep_result(self) -> None:
        """Before the release starts, which may write into its own folder."""
        self._keep(self._result, self._release.src, "src")

    def _keep(self, name: str, made: Path, inside: str) -> None:
        target = self._folder / name
        shutil.rmtree(target, ignore_errors=True)
        try:
            shutil.copytree(made, target / inside, symlinks=True, ignore=_special_files)
            (target / _COMPLETE).touch()
        except OSError:  # a full disk, or files that the build closed to us: the release itself is as good without
            shutil.rmtree(target, ignore_errors=True)

    def _dependencies(self, tool: str) -> str:
        if tool not in self._early:
            return _hash(_VERSION, sys.executable, sys.version)
        step, names = self._early[tool]
        contents = [(self._release.src / name).read_bytes() for name in names]
        program = sys.executable if tool == "pip" else os.path.realpath(shutil.which("node") or "")
        seen = Path(program).stat().st_mtime_ns if program else 0
        return _hash(_VERSION, step, names, contents, program, seen, sys.version)


def _special_files(folder: str, names: list[str]) -> list[str]:
    """Sockets and pipes, which a build may leave behind and nobody can copy."""
    return [name for name in names if not _is_plain(os.lstat(os.path.join(folder, name)).st_mode)]  # noqa: PTH118


def _is_plain(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)


def prune(app_folder: Path, *, without: str) -> None:
    """Remove what no release uses, the release `without` not counted, unless another runs what it built."""
    used: set[str] = set()
    built = _built_for_others(app_folder, without)
    for note in app_folder.glob(f"dep_*/{_NOTE}"):
        if note.parent.name != without or note.parent in built:
            try:
                used.update(json.loads(note.read_bytes()))
            except (OSError, ValueError):
                return  # it is being written or removed: another time
    for folder in (app_folder / "builds").glob("*"):
        if folder.name not in used:
            shutil.rmtree(folder, ignore_errors=True)


def _built_for_others(app_folder: Path, without: str) -> set[Path]:
    """The folders that releases besides `without` run in: a rollback runs what an earlier release built."""
    others = [Release.load(folder) for folder in app_folder.glob("dep_*") if folder.name != without]
    return {release.built for release in others if release is not None}


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
