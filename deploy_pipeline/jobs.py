"""What a deployment is: its states, the one table of their changes, and what is kept about it. No I/O."""

import base64
import hashlib
import json
import re
import secrets
import unicodedata
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field

LOG_TAIL_LINES: Final = 100
LOG_LINE_CHARACTERS: Final = 500
REASON_CHARACTERS: Final = 2000

_ID_CHARACTERS: Final = 20  # 5 bits each
_NONCE_CHARACTERS: Final = 16
_SLUG_CHARACTERS: Final = 40  # with "-" and the short id well inside a DNS label's 63
_SHORT_ID_CHARACTERS: Final = 8
_DEPLOYMENT_ID: Final = re.compile(rf"dep_([a-z2-7]{{{_ID_CHARACTERS}}})[a-z2-7]{{{_NONCE_CHARACTERS}}}")
_APP_ID: Final = re.compile(rf"app_[a-z2-7]{{{_ID_CHARACTERS}}}")


class DeploymentState(StrEnum):
    """`queued → archiving → building → starting → running`, and the ways to end."""

    QUEUED = "queued"
    ARCHIVING = "archiving"  # the workspace's files are being fetched
    BUILDING = "building"  # the archive is stored; a worker builds it, or will
    STARTING = "starting"  # built; the new release runs beside the old one until it answers
    RUNNING = "running"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"  # it waited, and a newer one took its place: `superseded_by`
    REPLACED = "replaced"  # it ran, and a newer release took over or the application was removed


ALLOWED: Final[dict[DeploymentState, frozenset[DeploymentState]]] = {
    DeploymentState.QUEUED: frozenset(
        {
            DeploymentState.ARCHIVING,
            DeploymentState.STARTING,  # a rollback: it was built before
            DeploymentState.FAILED,
            DeploymentState.CANCELLED,
            DeploymentState.SUPERSEDED,
        }
    ),
    DeploymentState.ARCHIVING: frozenset({DeploymentState.BUILDING, DeploymentState.FAILED, DeploymentState.CANCELLED}),
    DeploymentState.BUILDING: frozenset({DeploymentState.STARTING, DeploymentState.FAILED, DeploymentState.CANCELLED}),
    DeploymentState.STARTING: frozenset({DeploymentState.RUNNING, DeploymentState.FAILED, DeploymentState.CANCELLED}),
    DeploymentState.RUNNING: frozenset({DeploymentState.REPLACED}),
    DeploymentState.FAILED: frozenset(),
    DeploymentState.CANCELLED: frozenset(),
    DeploymentState.SUPERSEDED: frozenset(),
    DeploymentState.REPLACED: frozenset(),
}

# States in which a deployment no longer holds its application's place in the queue.
SETTLED: Final = frozenset(
    {
        DeploymentState.RUNNING,
        DeploymentState.FAILED,
        DeploymentState.CANCELLED,
        DeploymentState.SUPERSEDED,
        DeploymentState.REPLACED,
    }
)


def sources_of(state: DeploymentState) -> frozenset[DeploymentState]:
    """The states from which `state` may be entered; `state` itself counts, so that a resumed job may repeat a step."""
    return frozenset(source for source, targets in ALLOWED.items() if state in targets) | {state}


def public_status(state: DeploymentState) -> str:
    """The API's coarse status: "deploying" until it has settled, then the state's own name."""
    return state.value if state in SETTLED else "deploying"


class Stage(StrEnum):
    """The queues that a deployment may go through."""

    ARCHIVE = "archive"  # served by the control plane, which can reach the workspace
    BUILD = "build"  # served by deploy workers
    START = "start"  # likewise, but nothing is built, so nobody has to wait behind a build


class Deployment(BaseModel):
    """One attempt to turn a workspace's files into a running application. Times are UTC milliseconds."""

    model_config = ConfigDict(frozen=True)

    id: str
    app_id: str
    session_id: str
    workspace_id: str
    organization_id: str
    user_id: str
    state: DeploymentState
    reason: str = ""  # why it failed, for people
    log_tail: list[str] = Field(default_factory=list)  # the last lines of the build or of the application
    archive_sha256: str = ""
    archive_bytes: int = 0
    kind: str = ""  # what was detected: "static", "python", ...
    url: str = ""
    superseded_by: str = ""
    rollback_of: str = ""  # the deployment whose release this one runs again
    settings_version: int = 0  # of the environment that it runs with
    cancel_requested: int = 0  # when somebody asked for it; 0: nobody
    times: dict[DeploymentState, int] = Field(default_factory=dict)  # when each state was entered
    created_at: int
    updated_at: int

    def to_hash(self) -> dict[str, str]:
        """As fields of a Redis hash: every value a string, `times` as one field `at:<state>` for each."""
        fields = {name: str(value) for name, value in self.model_dump(exclude={"log_tail", "times"}).items()}
        fields["state"] = self.state.value
        fields["log_tail"] = json.dumps(self.log_tail)
        return fields | {f"at:{state}": str(at) for state, at in self.times.items()}

    @classmethod
    def from_hash(cls, fields: Mapping[str, str]) -> Self:
        values: dict[str, Any] = {name: value for name, value in fields.items() if not name.startswith("at:")}
        values["log_tail"] = json.loads(fields.get("log_tail") or "[]")
        values["times"] = {name[3:]: int(value) for name, value in fields.items() if name.startswith("at:")}
        return cls.model_validate(values)


class Desired(StrEnum):
    """What an application was ordered to be."""

    RUNNING = "running"
    STOPPED = "stopped"
    REMOVED = "removed"


class Health(StrEnum):
    """How the release that serves is."""

    RUNNING = "running"
    RESTARTING = "restarting"  # it ended, and is started again
    CRASH_LOOPING = "crash-looping"  # it ended again and again: the pauses grow
    STOPPED = "stopped"


class App(BaseModel):
    """Where a session's deployments run: one for each session, with a name and URL that stay. Times: UTC ms."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # the hash also holds the queue's lease

    id: str
    session_id: str
    organization_id: str
    name: str  # its first label in the URL
    project_name: str
    url: str = ""  # set with its first running deployment
    current_deployment_id: str = ""  # the one that serves
    active_deployment_id: str = ""  # the one in progress
    waiting_deployment_id: str = ""  # the one that follows it
    kept: str = ""  # the last healthy ones by comma, the oldest first: those that can be gone back to
    settings_version: int = 0  # of the environment that the next release gets; 0: none was ever set
    desired: Desired = Desired.RUNNING
    health: Health = Health.RUNNING  # of the release that serves
    health_reason: str = ""
    restarts: int = 0
    order: str = ""  # the last one
    ordered: int = 0  # how many orders there were
    obeyed: int = 0  # up to which they were carried out
    order_error: str = ""  # why the last one was not, as far as could be
    ordered_at: int = 0
    created_at: int
    updated_at: int


def kept_ids(app: App) -> list[str]:
    """The deployments whose releases can be gone back to, the oldest first, with the one that serves."""
    return [deployment_id for deployment_id in app.kept.split(",") if deployment_id]


def app_id_of_session(session_id: str) -> str:
    """The session's application id: derived, so that two first deployments at once agree on it."""
    digest = hashlib.sha256(b"app of " + session_id.encode()).digest()
    return "app_" + base64.b32encode(digest).decode().lower()[:_ID_CHARACTERS]


def new_deployment_id(app_id: str) -> str:
    """A fresh id that carries its application's, so that a deployment is found without an index to keep true."""
    nonce = base64.b32encode(secrets.token_bytes(_NONCE_CHARACTERS)).decode().lower()[:_NONCE_CHARACTERS]
    return "dep_" + app_id.removeprefix("app_") + nonce


def app_id_of_deployment(deployment_id: str) -> str | None:
    """None when it is no deployment id at all."""
    match = _DEPLOYMENT_ID.fullmatch(deployment_id)
    return f"app_{match[1]}" if match else None


def is_app_id(value: str) -> bool:
    return _APP_ID.fullmatch(value) is not None


def app_name(project_name: str, app_id: str) -> str:
    """`<slug>-<short id>`, safe as a DNS label, at most 49 characters: "Café Ω" gives "cafe-k5xq2abc"."""
    plain = unicodedata.normalize("NFKD", project_name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain)[:_SLUG_CHARACTERS].strip("-") or "app"
    return f"{slug}-{app_id.removeprefix('app_')[:_SHORT_ID_CHARACTERS]}"


def log_tail_of(lines: list[str]) -> list[str]:
    """The last `LOG_TAIL_LINES` lines, each cut to `LOG_LINE_CHARACTERS`."""
    return [line[:LOG_LINE_CHARACTERS] for line in lines[-LOG_TAIL_LINES:]]
