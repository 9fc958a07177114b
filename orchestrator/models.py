"""What a code session is, and the one table of its lifecycle."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final


class SessionStatus(StrEnum):
    CREATING = "creating"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        return not ALLOWED[self]


ALLOWED: Final[dict[SessionStatus, frozenset[SessionStatus]]] = {
    SessionStatus.CREATING: frozenset({SessionStatus.RUNNING, SessionStatus.COMPLETED, SessionStatus.FAILED}),
    SessionStatus.RUNNING: frozenset({SessionStatus.COMPLETED, SessionStatus.FAILED}),
    SessionStatus.COMPLETED: frozenset(),
    SessionStatus.FAILED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Session:
    """Times are Unix milliseconds."""

    id: str
    workspace_id: str
    organization_id: str
    user_id: str
    project_name: str
    project_description: str
    project_dir_name: str
    status: SessionStatus
    created_at_ms: int
    updated_at_ms: int
    link_token_sha256: str
    status_reason: str = ""
    output_policy: str = "block"  # see `OutputPolicy` of the sidecars' protocol
    # Somebody asked for its end, or it failed: nothing new is begun, and `completed` or `failed` follows when all of
    # the workspace is gone, whoever has to finish it.
    ending_as: SessionStatus | None = None

    @property
    def ended(self) -> bool:
        """Ended, or on the way to it."""
        return self.status.ended or self.ending_as is not None


@dataclass(frozen=True, slots=True)
class TerminalState:
    """What the output log says of the terminal: `state` is starting, running, exited or lost."""

    state: str = "starting"
    cols: int = 80
    rows: int = 24
    exit: dict[str, Any] = field(default_factory=dict)
