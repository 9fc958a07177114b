"""What a project says of itself in `deploy.toml`, else in `app.json`. Strict: a mistake is named by file and field."""

import json
import re
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from deploy_pipeline.errors import NotDeployable

MANIFEST_BYTES: Final = 1024 * 1024
_MOST_VARIABLES: Final = 100
_VARIABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_VALUE_CHARACTERS: Final = 4096
_RESERVED: Final = frozenset({"HOME", "HOST", "PATH", "PORT"})

_Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f]+$")]


class Kind(StrEnum):
    DOCKERFILE = "dockerfile"
    PROCFILE = "procfile"
    STATIC = "static"
    PYTHON = "python"
    NODE = "node"


class ProjectSettings(BaseModel):
    """`build` and `start` are command lines for /bin/sh. `root`: the folder of a static site. `port`: where the
    application listens in its container. `env`: for the build and for the running application, so nothing secret."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    kind: Annotated[Kind, Field(strict=False)] | None = None
    build: _Text | None = None
    start: _Text | None = None
    root: _Text | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    health_path: Annotated[_Text, StringConstraints(pattern=r"^/[!-~]*$")] | None = None
    env: dict[str, str] = Field(default_factory=dict, max_length=_MOST_VARIABLES)

    @field_validator("root")
    @classmethod
    def _root_is_inside(cls, root: str | None) -> str | None:
        if root is not None and (root.startswith("/") or "\\" in root or ".." in root.split("/")):
            raise ValueError("has to be a folder inside the project")
        return root

    @field_validator("env")
    @classmethod
    def _env_is_sound(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if not _VARIABLE_NAME.fullmatch(name):
                raise ValueError(f"{name[:100]!r} is no name of a variable")
            if name in _RESERVED or name.startswith("CODE_SESSIONS_"):
                raise ValueError(f"{name} is set by the platform")
            if len(value) > _VALUE_CHARACTERS or any(character < " " for character in value):
                raise ValueError(f"the value of {name} is too long or has control characters")
        return env

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.kind is Kind.STATIC and self.start is not None:
            raise ValueError("start: a static site starts nothing")
        if self.kind is Kind.DOCKERFILE and self.build is not None:
            raise ValueError("build: a Dockerfile has the build's steps itself")
        return self


def project_settings(folder: Path) -> ProjectSettings:
    """
    Raises:
        NotDeployable: with the file, the field and what is wrong with it.
    """
    if (folder / "deploy.toml").is_file():
        return _validated("deploy.toml", read_toml(folder / "deploy.toml"))
    if (folder / "app.json").is_file():
        return _validated("app.json", _ours_of_app_json(read_json(folder / "app.json")))
    return ProjectSettings()


def _ours_of_app_json(found: dict[str, Any]) -> dict[str, Any]:
    """Other keys of `app.json` are somebody else's. A variable may stand there with a description beside its value, and
    without a value when it is to be set by hand."""
    ours = {name: found[name] for name in ProjectSettings.model_fields if name in found}
    env = ours.get("env")
    if isinstance(env, dict):
        plain = {name: item.get("value") if isinstance(item, dict) else item for name, item in env.items()}
        ours["env"] = {name: value for name, value in plain.items() if value is not None}
    return ours


def _validated(file: str, found: dict[str, Any]) -> ProjectSettings:
    try:
        return ProjectSettings.model_validate(found)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = ", ".join(ProjectSettings.model_fields)
            what = f"is no setting; known are {known}"
        raise NotDeployable(f"{file}: {field}: {what}." if field else f"{file}: {what}.") from None


def read_text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MANIFEST_BYTES).decode("utf-8", "replace").removeprefix("\ufeff")


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        NotDeployable: it is no JSON object.
    """
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise NotDeployable(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise NotDeployable(f"{path.name} is not a JSON object.")
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """
    Raises:
        NotDeployable: it is no TOML.
    """
    try:
        return tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise NotDeployable(f"{path.name} is not valid TOML: {error}") from error
