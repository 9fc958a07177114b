"""Where workspaces run. One contract suite (tests/contracts) holds every runtime to what stands here."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.errors import RuntimeUnavailable


@dataclass(frozen=True, slots=True)
class WorkspaceSpec:
    """What a workspace is started with."""

    workspace_id: str
    session_id: str
    organization_id: str
    project_dir_name: str  # safe as one path component
    link_token: str = field(repr=False)  # the sidecar's secret, for this session only


class WorkspaceState(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"  # still there (a stopped container, a folder), but nothing runs in it
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class WorkspaceStatus:
    state: WorkspaceState
    reason: str = ""  # for STOPPED: what the runtime knows, e.g. "out of memory" or "exited with code 137"


class WorkspaceStartFailed(Exception):
    """The runtime was reached but the workspace did not start; the message is fit for `statusReason`."""


class WorkspaceRuntime(ABC):
    """Starts and removes workspaces. Any call may raise `RuntimeUnavailable` when the engine cannot be reached."""

    @abstractmethod
    async def check(self) -> None:
        """Return when workspaces could be started now (within 2 s).

        Raises:
            RuntimeUnavailable: the engine does not answer or what it needs (the image) is missing.
        """

    @abstractmethod
    async def start(self, spec: WorkspaceSpec) -> None:
        """Start the workspace and its sidecar; return once it runs (its link comes up on its own afterwards).

        On any failure, cancellation included, nothing is left behind.

        Raises:
            WorkspaceStartFailed: refused or crashed, with the engine's reason.
        """

    @abstractmethod
    async def stop(self, workspace_id: str, *, grace_s: float) -> None:
        """SIGTERM to the sidecar (it hangs up the shell), SIGKILL to all of it after `grace_s`, then remove
        container, volume, processes and files. Returns when all of it is confirmed gone; already gone is success."""

    @abstractmethod
    async def status(self, workspace_id: str) -> WorkspaceStatus:
        """What the engine sees now. An unknown id is `GONE`, never an error."""

    @abstractmethod
    async def list_workspaces(self) -> dict[str, str]:
        """Workspace id -> session id of everything this installation's runtime has, stopped ones included."""

    async def close(self) -> None:  # noqa: B027 - optional for a runtime
        """Release clients and threads. Workspaces go on."""


__all__ = [
    "RuntimeUnavailable",
    "WorkspaceRuntime",
    "WorkspaceSpec",
    "WorkspaceStartFailed",
    "WorkspaceState",
    "WorkspaceStatus",
]
