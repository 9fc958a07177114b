"""What callers do with applications: stop, start, restart, remove, go back, set the environment."""

import asyncio
import time
from typing import Final

from deploy_pipeline import errors as pipeline
from deploy_pipeline.jobs import SETTLED, App, Deployment, DeploymentState
from deploy_pipeline.orders import Orders, Verb
from deploy_pipeline.queue import DeploymentQueue
from orchestrator.deployments.service import Deployments
from orchestrator.errors import (
    AppIsRemoved,
    AppNotDeployed,
    AppNotFound,
    AppNotStarted,
    DeploymentInProgress,
    ReleaseNotKept,
)

PATIENCE_S: Final = 30.0
_LOOK_S: Final = 0.05


class Apps:
    """Each call waits up to `PATIENCE_S` until what was asked is true, and says whether it is."""

    def __init__(self, deployments: Deployments, queue: DeploymentQueue, orders: Orders) -> None:
        self._deployments, self._queue, self._orders = deployments, queue, orders

    async def order(self, organization_id: str, app_id: str, verb: Verb) -> bool:
        """Stop, start or restart.

        Raises:
            AppNotFound, AppNotDeployed, AppIsRemoved: as named.
            AppNotStarted: it was started, but does not answer; `reason` says why. It is tried again.
        """
        await self._deployments.get_app(organization_id, app_id)
        number = await self._give(app_id, verb)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            app, _ = await self._deployments.get_app(organization_id, app_id)
            if app.obeyed >= number:
                if app.obeyed == number and app.order_error:
                    raise AppNotStarted(app.order_error)
                return True
            await asyncio.sleep(_LOOK_S)
        return False

    async def remove(self, organization_id: str, app_id: str) -> bool:
        """Cancel what is in progress, then remove everything: processes, files, images, logs, records.

        Raises:
            AppNotFound: not in this organization.
        """
        await self._deployments.get_app(organization_id, app_id)
        await self._give(app_id, Verb.REMOVE)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            app = await self._queue.get_app(organization_id, app_id)
            if app is None:
                return True
            for deployment_id in (app.waiting_deployment_id, app.active_deployment_id):
                if deployment_id:
                    await self._queue.request_cancel(deployment_id)
            await asyncio.sleep(_LOOK_S)
        return False

    async def roll_back(self, organization_id: str, app_id: str, target_id: str, *, user_id: str) -> Deployment:
        """Run a kept release again, by default the one that served before: a new deployment without a build.

        Raises:
            AppNotFound, AppIsRemoved, DeploymentInProgress, ReleaseNotKept: as named.
            AppNotStarted: the release does not answer any more; the one that served goes on serving.
        """
        app, _ = await self._deployments.get_app(organization_id, app_id)
        try:
            deployment = await self._orders.roll_back(app, target_id, user_id=user_id)
        except pipeline.DeploymentInProgress as error:
            raise DeploymentInProgress(
                "a deployment is in progress, which would undo this; cancel it first", deployment_id=str(error)
            ) from None
        except pipeline.ReleaseNotKept:
            raise ReleaseNotKept(f"no release {target_id[:64]} is kept besides the one that serves") from None
        except pipeline.AppIsRemoved:
            raise _removed(app_id) from None
        deadline = time.monotonic() + PATIENCE_S
        while deployment.state not in SETTLED and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)
            deployment = await self._deployments.get(organization_id, deployment.id)
        if deployment.state is DeploymentState.FAILED:
            raise AppNotStarted(deployment.reason, deployment_id=deployment.id)
        return deployment

    async def put_env(self, organization_id: str, app_id: str, variables: dict[str, str]) -> int:
        """The environment of the next releases, in full; its version.

        Raises:
            AppNotFound: not in this organization.
        """
        await self._deployments.get_app(organization_id, app_id)
        version = await self._orders.put_env(app_id, variables)
        if not version:
            raise AppNotFound(f"no application {app_id[:64]}")
        return version

    async def env_names(self, app: App) -> list[str]:
        """The names of the variables that the next release gets. Values are never given out."""
        return sorted(await self._orders.env(app.id, app.settings_version))

    async def _give(self, app_id: str, verb: Verb) -> int:
        try:
            return await self._orders.give(app_id, verb)
        except pipeline.NothingToRun:
            raise AppNotDeployed("the application has no release yet") from None
        except pipeline.AppIsRemoved:
            raise _removed(app_id) from None


def _removed(app_id: str) -> AppIsRemoved:
    return AppIsRemoved(f"the application {app_id} is being removed")
