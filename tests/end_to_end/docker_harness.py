"""A control plane whose workspaces are containers, and what it has on the engine."""

import contextlib
from pathlib import Path

import docker
import redis

from orchestrator.settings import Settings
from tests.end_to_end.harness import Serve


class OnEngine:
    """What one installation has on the engine, and nothing of anybody else."""

    def __init__(self, installation: str):
        self.installation = installation
        self.engine = docker.from_env()

    def _filters(self, *labels):
        return {"label": [f"code-sessions.installation={self.installation}", *labels]}

    def workspaces(self):
        """The names of all containers and volumes of workspaces."""
        filters = self._filters("code-sessions.workspace")
        containers = self.engine.containers.list(all=True, filters=filters, ignore_removed=True)
        return sorted({thing.name for thing in (*containers, *self.engine.volumes.list(filters=filters))})

    def workspace(self, session_id):
        """The container of a session."""
        [container] = self.engine.containers.list(
            all=True, filters=self._filters(f"code-sessions.session={session_id}")
        )
        return container

    def everything(self):
        """Workspaces, applications, networks and images."""
        filters = self._filters()
        return [
            *self.engine.containers.list(all=True, filters=filters, ignore_removed=True),
            *self.engine.volumes.list(filters=filters),
            *self.engine.networks.list(filters=filters),
            *self.engine.images.list(filters=filters),
        ]

    def remove_all(self):
        for thing in self.everything():
            with contextlib.suppress(docker.errors.NotFound):
                match thing:
                    case docker.models.images.Image():
                        self.engine.images.remove(thing.id, force=True)
                    case docker.models.networks.Network():
                        thing.remove()
                    case _:
                        thing.remove(force=True)
        self.engine.close()


class DockerServe(Serve):
    def __init__(self, data_dir: Path, **settings: str):
        super().__init__(data_dir, **{"CODE_SESSIONS_RUNTIME": "docker"} | settings)
        self.on_engine: OnEngine | None = None

    def start(self, timeout_s=30.0):
        super().start(timeout_s)
        if self.on_engine is None:
            with redis.Redis(unix_socket_path=str(Settings(data_dir=self.data_dir).run_dir / "store.sock")) as store:
                self.on_engine = OnEngine(store.get("cs:installation").decode())
        return self

    def remove_all(self):
        super().remove_all()
        self.on_engine.remove_all()
