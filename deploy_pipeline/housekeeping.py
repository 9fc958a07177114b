"""Ending and removing what is left on this machine although nothing needs it: what a crash left in between."""

import asyncio
import time
from pathlib import Path
from typing import Final

from deploy_pipeline.archive import ArchiveStore
from deploy_pipeline.jobs import Deployment, DeploymentState, kept_ids
from deploy_pipeline.queue import DeploymentQueue
from deploy_pipeline.releases import Releases

_ENDED: Final = frozenset(
    {DeploymentState.REPLACED, DeploymentState.FAILED, DeploymentState.CANCELLED, DeploymentState.SUPERSEDED}
)
# A folder this young may belong to a deployment that another worker is about to record.
_YOUNG_S: Final = 60.0
# An archive is stored some moments before its deployment names it.
ARCHIVE_YOUNG_S: Final = 3600.0
# An archive on its way may pause, but the whole of it has less time than this.
_HALF_WRITTEN_S: Final = 300.0


class Housekeeping:
    def __init__(
        self, queue: DeploymentQueue, releases: Releases, archives: ArchiveStore, *, apps_dir: Path, drain_s: float
    ) -> None:
        self._queue, self._releases, self._archives = queue, releases, archives
        self._apps_dir, self._drain_s = apps_dir, drain_s
        self._archives_looked_at: float | None = None

    async def round(self) -> None:
        await self._end_releases()
        await self._remove_archives()

    async def _end_releases(self) -> None:
        """End what runs or lies here although its deployment has ended."""
        serving = await self._releases.serving()
        for app_id, deployment_id in await self._releases.known():
            if deployment_id in serving:
                continue
            deployment = await self._queue.find(deployment_id)
            if deployment is None:
                if _age_s(self._apps_dir / app_id / deployment_id) < _YOUNG_S:
                    continue
            elif deployment.state not in _ENDED or self._drains(deployment):
                continue
            await self._releases.retire(app_id, deployment_id)

    def _drains(self, deployment: Deployment) -> bool:
        """Whether it was replaced so lately that old connections may still be served by it."""
        replaced_at = deployment.times.get(DeploymentState.REPLACED, 0)
        return time.time() - replaced_at / 1000 < self._drain_s

    async def _remove_archives(self) -> None:
        """Half-written ones, and those of neither a release that is kept nor a deployment in progress."""
        await self._archives.remove_half_written(_HALF_WRITTEN_S)
        now = time.monotonic()
        if self._archives_looked_at is not None and now - self._archives_looked_at < self._archives.look_every_s:
            return
        self._archives_looked_at = now
        unneeded = await self._archives.stored_before(ARCHIVE_YOUNG_S)
        if unneeded:
            unneeded -= await self._queue.archives_in_progress()
            unneeded -= await asyncio.to_thread(self._releases.archives)
        if unneeded and self._archives.is_shared:
            unneeded -= await self._kept_anywhere()
        for sha256 in unneeded:
            await self._archives.remove(sha256)

    async def _kept_anywhere(self) -> set[str]:
        """The archives of releases that any machine keeps."""
        found = set()
        for app_id in await self._releases.routed_apps():
            app = await self._queue.find_app(app_id)
            for deployment_id in kept_ids(app) if app is not None else []:
                deployment = await self._queue.find(deployment_id)
                if deployment is not None:
                    found.add(deployment.archive_sha256)
        return found


def _age_s(path: Path) -> float:
    """0 for one that is not there."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
