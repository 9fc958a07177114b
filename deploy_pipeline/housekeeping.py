"""Ending and removing what is left on this machine although nothing needs it: what a crash left in between."""

import asyncio
import time
from pathlib import Path
from typing import Final

from deploy_pipeline.jobs import Deployment, DeploymentState
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
        self, queue: DeploymentQueue, releases: Releases, *, apps_dir: Path, archives_dir: Path, drain_s: float
    ) -> None:
        self._queue, self._releases = queue, releases
        self._apps_dir, self._archives_dir, self._drain_s = apps_dir, archives_dir, drain_s

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
        """Half-written ones, and those of neither a release that is kept here nor a deployment in progress."""
        for path in self._archives_dir.glob(".*.part"):
            if _age_s(path) > _HALF_WRITTEN_S:
                path.unlink(missing_ok=True)
        old = [path for path in self._archives_dir.glob("*.zip") if _age_s(path) > ARCHIVE_YOUNG_S]
        if not old:
            return
        wanted = await self._queue.archives_in_progress()
        wanted |= await asyncio.to_thread(self._releases.archives)
        for path in old:
            if path.name.removesuffix(".zip") not in wanted:
                path.unlink(missing_ok=True)


def _age_s(path: Path) -> float:
    """0 for one that is not there."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
