"""What a deployment would do with a workspace's files, without doing it: the worker's own detection on a zip that has
every file's name but little content (see `READ`)."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy_pipeline.archive import Limits, extract
from deploy_pipeline.detect import (
    READ_BYTES,
    READ_DEPTH,
    READ_NAMES,
    Plan,
    command_line,
    detect,
    refusal_by_local_runtime,
)
from deploy_pipeline.errors import ArchiveRefused, NotDeployable
from deploy_pipeline.project_settings import Kind

_MIB: Final = 1024 * 1024
_READ_TOTAL_BYTES: Final = 8 * _MIB
READ: Final = {
    "read": list(READ_NAMES),
    "depth": READ_DEPTH,
    "fileBytes": READ_BYTES,
    "totalBytes": _READ_TOTAL_BYTES,
}
"""What the sidecar's operation `preview` is to give the content of."""
LIMITS: Final = Limits(packed_bytes=64 * _MIB, unpacked_bytes=64 * _MIB)
_BUILT_FOLDERS: Final = frozenset({"dist", "build", "out", "public", "_site", ".next", ".output"})
_OTHER_LOCKS: Final = ("yarn.lock", "pnpm-lock.yaml", "bun.lock", "bun.lockb")
_LISTED: Final = 1000
_SHOWN_PATH: Final = 1024


class _LeftOut(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    path: str = Field(max_length=4096)
    reason: str = Field(max_length=64)
    rule: str = Field(default="", max_length=2048)


class Facts(BaseModel):
    """What the sidecar's helper says of the files; it runs as the workspace's user, so it is checked like any input."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, validate_by_alias=True, validate_by_name=True)

    files: int = Field(ge=0)
    bytes: int = Field(ge=0)
    left_out: int = Field(default=0, ge=0, alias="leftOut")
    left_out_reasons: dict[str, int] = Field(default_factory=dict, alias="leftOutReasons", max_length=50)
    left_out_list: list[_LeftOut] = Field(default_factory=list, alias="leftOutList", max_length=_LISTED)
    listed: list[tuple[str, int]] = Field(default_factory=list, alias="list", max_length=_LISTED)  # path, bytes
    ignore_file: str = Field(default="", alias="ignoreFile", max_length=64)


@dataclass(frozen=True, slots=True)
class Preview:
    """`plan` is None when the files cannot be deployed; then `problem` is what the deployment's reason would be."""

    facts: Facts
    plan: Plan | None
    problem: str
    warnings: list[str]

    @property
    def build_lines(self) -> list[str]:
        return [command_line(step) for step in self.plan.build] if self.plan is not None else []

    @property
    def start_line(self) -> str:
        return command_line(self.plan.start) if self.plan is not None else ""


def facts_of(found: dict[str, Any]) -> Facts:
    """
    Raises:
        ArchiveRefused: they are not what our helper would say.
    """
    try:
        return Facts.model_validate({**found, "list": [tuple(item) for item in found.get("list", [])]})
    except (ValidationError, TypeError, AttributeError):
        raise ArchiveRefused("The workspace gave no sound account of its files.") from None


def preview(archive: Path, found: dict[str, Any], runtime: Literal["local", "docker"], scratch: Path) -> Preview:
    """The preview of an archive made with `READ`, and the facts that came with it. Blocking; nothing is left behind in
    the folder `scratch`.

    Raises:
        ArchiveRefused: the archive is not what our helper would make.
    """
    facts = facts_of(found)
    folder = Path(tempfile.mkdtemp(prefix=".preview-", dir=scratch))
    try:
        extract(archive, folder / "src", LIMITS)
        warnings = _warnings(folder / "src", facts)
        try:
            plan = detect(folder / "src")
        except NotDeployable as error:
            return Preview(facts, None, str(error), warnings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if runtime == "local" and (refusal := refusal_by_local_runtime(plan)):
        return Preview(facts, None, refusal, warnings)
    return Preview(facts, plan, "", [*warnings, *_warnings_of_plan(plan, facts)])


def _warnings(src: Path, facts: Facts) -> list[str]:
    found = []
    for item in facts.left_out_list:
        name = item.path.rstrip("/").rpartition("/")[2]
        if item.reason == "ignored" and item.path.endswith("/") and name in _BUILT_FOLDERS:
            found.append(
                f"{item.path[:_SHOWN_PATH]} is left out ({item.rule}). If it has what is to be deployed, and no build "
                "makes it again, write a .deployignore without it."
            )
    if facts.left_out_reasons.get("secret"):
        found.append("Files that look like secrets are left out: an application gets secrets from its environment.")
    if facts.left_out_reasons.get("link-out"):
        found.append("Links that lead out of the project are left out.")
    others = [name for name in _OTHER_LOCKS if (src / name).is_file()]
    if others and not (src / "package-lock.json").is_file():
        found.append(f"{others[0]} is not read: dependencies are installed with npm, which has no lock file here.")
    elif (src / "package.json").is_file() and not any(
        (src / name).is_file() for name in ("package-lock.json", "npm-shrinkwrap.json")
    ):
        found.append("There is no package-lock.json: another build may install other versions.")
    return found


def _warnings_of_plan(plan: Plan, facts: Facts) -> list[str]:
    found = []
    if plan.kind is Kind.STATIC and plan.roots == (".",) and not plan.build and facts.files > 1:
        found.append("Every file of the project is published, except dot files.")
    return found
