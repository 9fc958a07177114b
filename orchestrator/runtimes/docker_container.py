"""What a workspace's container looks like and what the engine's view of it means. Nothing here talks to the engine."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from orchestrator.runtimes.base import WorkspaceSpec, WorkspaceState, WorkspaceStatus
from orchestrator.settings import WorkspaceLimits

LABEL_INSTALLATION: Final = "code-sessions.installation"
LABEL_WORKSPACE: Final = "code-sessions.workspace"
LABEL_SESSION: Final = "code-sessions.session"
LABEL_ORGANIZATION: Final = "code-sessions.organization"

USER: Final = "dev"
HOME: Final = "/home/dev"
LINK_DIR: Final = "/run/code-sessions"

# What the sidecar needs to start the user's processes and to signal them, and no more: it is root in name only.
CAPABILITIES: Final = ("KILL", "SETGID", "SETPCAP", "SETUID")

_SIGKILLED: Final = 128 + 9
_SIGTERMED: Final = 128 + 15
_LONGEST_HOSTNAME: Final = 40  # hostname(7) allows 64; it stands in every prompt


@dataclass(frozen=True, slots=True)
class ContainerPlan:
    """What all workspaces of an installation have in common."""

    installation: str
    image: str
    limits: WorkspaceLimits
    link_mount: str  # a host folder when absolute, otherwise a volume's name


def container_name(workspace_id: str) -> str:
    """The name of the workspace's container, and of its volume."""
    return f"cs-{workspace_id}"


def labels(plan: ContainerPlan, spec: WorkspaceSpec) -> dict[str, str]:
    return {
        LABEL_INSTALLATION: plan.installation,
        LABEL_WORKSPACE: spec.workspace_id,
        LABEL_SESSION: spec.session_id,
        LABEL_ORGANIZATION: spec.organization_id,
    }


def hostname(project_dir_name: str) -> str:
    """The project's name with what RFC 1123 allows: letters, digits and inner hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", project_dir_name.lower())[:_LONGEST_HOSTNAME].strip("-") or "workspace"


def create_body(plan: ContainerPlan, spec: WorkspaceSpec, network: str) -> dict[str, Any]:
    """The body of the engine's `POST /containers/create` (API 1.41)."""
    return {
        "Image": plan.image,
        "Hostname": hostname(spec.project_dir_name),
        "User": "0:0",
        "Env": [f"{name}={value}" for name, value in _environment(spec).items()],
        "Labels": labels(plan, spec),
        "HostConfig": _host_config(plan, spec, network),
    }


def _environment(spec: WorkspaceSpec) -> dict[str, str]:
    return {
        "CODE_SESSIONS_LINK_URL": f"unix://{LINK_DIR}",
        "CODE_SESSIONS_SESSION_ID": spec.session_id,
        "CODE_SESSIONS_WORKSPACE_ID": spec.workspace_id,
        "CODE_SESSIONS_LINK_TOKEN": spec.link_token,
        "CODE_SESSIONS_PROJECT_DIR": f"{HOME}/{spec.project_dir_name}",
        "CODE_SESSIONS_HOME": HOME,
        "CODE_SESSIONS_USER": USER,
    }


def _host_config(plan: ContainerPlan, spec: WorkspaceSpec, network: str) -> dict[str, Any]:
    return {
        "NetworkMode": network,
        "Mounts": [_home_volume(plan, spec), _link_folder(plan.link_mount)],
        "Init": True,  # docker-init reaps what the user's daemons leave behind
        "RestartPolicy": {"Name": "no"},  # a session says that its workspace died; it does not come back empty
        "CapDrop": ["ALL"],
        "CapAdd": list(CAPABILITIES),
        # The default seccomp profile holds as long as none is named here.
        "SecurityOpt": ["no-new-privileges:true"],
        "Privileged": False,
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "Memory": plan.limits.memory_bytes,
        "MemorySwap": plan.limits.memory_bytes,  # the sum of both, so: no swap
        "NanoCpus": round(plan.limits.cpus * 1e9),
        "PidsLimit": plan.limits.pids,
        # When the host runs out of memory, workspaces go before the control plane and the store; inside a workspace the
        # sidecar marks the user's processes to go before itself.
        "OomScoreAdj": 500,
        # No `nproc`: the kernel counts it for each uid of the host, over all workspaces together; PidsLimit does it. No
        # `nofile`: an engine that may not raise its own limit refuses to start a container with a higher one.
        "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
        # The sidecar's own log, enough to explain a crash. Terminal output never goes here.
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "1"}},
    }


def _home_volume(plan: ContainerPlan, spec: WorkspaceSpec) -> dict[str, Any]:
    # The engine makes the volume together with the container, and with these labels. So there is no moment at which a
    # container has a volume that nobody owns, whoever else removes things meanwhile.
    return {
        "Type": "volume",
        "Source": container_name(spec.workspace_id),
        "Target": HOME,
        "VolumeOptions": {"Labels": labels(plan, spec)},
    }


def _link_folder(link_mount: str) -> dict[str, Any]:
    kind = "bind" if link_mount.startswith("/") else "volume"
    mount: dict[str, Any] = {"Type": kind, "Source": link_mount, "Target": LINK_DIR, "ReadOnly": True}
    if kind == "volume":
        mount["VolumeOptions"] = {"NoCopy": True}
    return mount


def link_refusal(security_options: Sequence[str], uid: int) -> str:
    """Why a container's root, who has no capability to pass over file modes, cannot reach a socket folder that only the
    user `uid` of this machine may enter; "" when it can. `security_options`: as the engine's info lists them.
    """
    names = {option.split(",")[0] for option in security_options}
    if "name=userns" in names:
        return "The Docker engine gives containers another root (userns-remap), who cannot reach the link's socket"
    # A rootless engine's containers have the user that runs it as their root.
    if uid != 0 and "name=rootless" not in names:
        return "With the docker runtime `serve` has to run as root (or in a container: see compose.yaml)"
    return ""


def status_of(state: Mapping[str, Any], limits: WorkspaceLimits) -> WorkspaceStatus:
    """What a container's `State`, as inspect gives it, means for its workspace."""
    if state["Status"] in {"running", "paused", "restarting"}:
        return WorkspaceStatus(WorkspaceState.RUNNING)
    if state["Status"] == "created":
        return WorkspaceStatus(WorkspaceState.STOPPED, "created but not started")
    return WorkspaceStatus(WorkspaceState.STOPPED, _end_of(state, limits))


def _end_of(state: Mapping[str, Any], limits: WorkspaceLimits) -> str:
    code = state["ExitCode"]
    # The engine also sets OOMKilled when only some process in there was killed and the workspace went on.
    if state.get("OOMKilled") and code == _SIGKILLED:
        return f"out of memory: it needed more than its {limits.memory_bytes // (1024 * 1024)} MiB"
    if state.get("Error"):
        return f"the engine reports: {state['Error']}"
    if code == _SIGKILLED:
        return "killed from outside (SIGKILL)"
    if code in {0, _SIGTERMED}:
        return "stopped from outside, or its sidecar ended"
    return f"exited with code {code}"
