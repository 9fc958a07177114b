"""Logs of deployments and applications as callers read them: in pages, and held while there is nothing new."""

import time
from dataclasses import dataclass
from typing import Final

from deploy_pipeline.jobs import SETTLED
from deploy_pipeline.logs import Log, LogStore, Page
from orchestrator.deployments.service import Deployments

_LOOK_S: Final = 1.0  # a deployment's end is no chunk that would wake a reader


@dataclass(frozen=True, slots=True)
class LogPage:
    page: Page
    after: int
    ended: str = ""  # the state that the deployment has settled in: nothing comes after this page; empty: it may

    @property
    def last_seq(self) -> int:
        return self.page.chunks[-1].seq if self.page.chunks else self.page.last_seq

    @property
    def has_more(self) -> bool:
        return bool(self.page.chunks) and self.page.chunks[-1].seq < self.page.last_seq

    @property
    def truncated(self) -> bool:
        return self.after + 1 < self.page.first_seq and self.page.last_seq > self.after


class Logs:
    def __init__(self, deployments: Deployments, store: LogStore) -> None:
        self._deployments, self._store = deployments, store

    async def of_deployment(
        self, organization_id: str, deployment_id: str, *, after: int, limit: int, wait_s: float
    ) -> LogPage:
        """What the build and the start wrote after `after`; with nothing there, what comes within `wait_s`. Nothing
        comes any more once the deployment has settled.

        Raises:
            DeploymentNotFound: not in this organization.
        """
        deadline = time.monotonic() + wait_s
        while True:
            deployment = await self._deployments.get(organization_id, deployment_id)
            ended = deployment.state.value if deployment.state in SETTLED else ""
            found = await self._read(Log(deployment.app_id, deployment.id), after, limit, ended)
            left_s = deadline - time.monotonic()
            if found.page.chunks or left_s <= 0 or ended:
                return found
            await self._wait(Log(deployment.app_id, deployment.id), found, left_s)

    async def of_app(self, organization_id: str, app_id: str, *, after: int, limit: int, wait_s: float) -> LogPage:
        """What the application's releases wrote after `after`; with nothing there, what comes within `wait_s`.

        Raises:
            AppNotFound: not in this organization.
        """
        deadline = time.monotonic() + wait_s
        app, _ = await self._deployments.get_app(organization_id, app_id)
        while True:
            found = await self._read(Log(app.id), after, limit)
            left_s = deadline - time.monotonic()
            if found.page.chunks or left_s <= 0:
                return found
            await self._wait(Log(app.id), found, left_s)

    async def _read(self, log: Log, after: int, limit: int, ended: str = "") -> LogPage:
        return LogPage(await self._store.read(log, after=after, limit=limit), after, ended)

    async def _wait(self, log: Log, found: LogPage, left_s: float) -> None:
        newest = max(found.after, found.page.last_seq)
        await self._store.wait(log, after=newest, wait_s=min(left_s, _LOOK_S))
