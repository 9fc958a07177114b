"""Orders to applications: stop, start, restart, remove; going back to an earlier release; their environment.

An order is a wish in the application's hash with a number. Whoever looks after the application's machine carries out
the last one and says so; one that was interrupted is carried out again. A deployment that starts to serve makes earlier
orders void: it is running then.
"""

import json
from enum import StrEnum
from typing import Any, Final

from deploy_pipeline.errors import AppIsRemoved, DeploymentInProgress, NothingToRun, ReleaseNotKept
from deploy_pipeline.jobs import REASON_CHARACTERS, App, Deployment, Desired, Health, Stage, new_deployment_id
from deploy_pipeline.records import app_key, organization_key, text_of
from deploy_pipeline.steps import BUSY_APPS, Steps

_PENDING: Final = "deploy:orders"  # a set: the applications with orders that may not have been carried out yet


class Verb(StrEnum):
    STOP = "stop"
    START = "start"
    RESTART = "restart"
    REMOVE = "remove"


class Orders(Steps):
    """Any call may raise redis-py's `RedisError`."""

    async def give(self, app_id: str, verb: Verb) -> int:
        """The order's number: it is carried out when the application's `obeyed` has reached it.

        Raises:
            NothingToRun: it has no release, or does not exist.
            AppIsRemoved: it is being removed, and another thing was asked.
        """
        await self._redis.sadd(_PENDING, app_id)
        outcome, number = await self._run(app_id, "order", verb.value)
        if outcome == b"removed":
            raise AppIsRemoved(app_id)
        if outcome != b"ok":
            raise NothingToRun(app_id)
        return int(number)

    async def pending(self) -> list[App]:
        """Applications with an order that was not carried out yet."""
        found = []
        for raw in await self._redis.smembers(_PENDING):
            app = await self._with_order(text_of(raw))
            if app is None:
                # Removed before the second look: an order that is given in between is not forgotten.
                await self._redis.srem(_PENDING, raw)
                app = await self._with_order(text_of(raw))
                if app is None:
                    continue
                await self._redis.sadd(_PENDING, raw)
            found.append(app)
        return found

    async def obeyed(self, app: App, error: str = "") -> None:
        """The order that `app` shows was carried out, or could not be."""
        await self._run(app.id, "obeyed", str(app.ordered), error[:REASON_CHARACTERS])

    async def report(self, app_id: str, deployment_id: str, health: Health, reason: str, restarts: int) -> None:
        """How a release is; ignored when it does not serve any more."""
        await self._run(app_id, "report", deployment_id, health.value, reason[:REASON_CHARACTERS], str(restarts))

    async def forget(self, app: App) -> bool:
        """Remove the application's records. False while a deployment is in progress."""
        if not await self._run(app.id, "forget"):
            return False
        await self._redis.zrem(organization_key(app.organization_id), app.id)
        await self._redis.srem(_PENDING, app.id)
        return True

    async def roll_back(self, app: App, target_id: str, *, user_id: str) -> Deployment:
        """Queue a deployment that runs the release of an earlier one again: of `target_id`, or, when that is empty, of
        the one that served before.

        Raises:
            DeploymentInProgress, ReleaseNotKept, AppIsRemoved: as named.
        """
        deployment_id = new_deployment_id(app.id)
        await self._redis.sadd(BUSY_APPS, app.id)
        outcome, named = await self._run(app.id, "rollback", deployment_id, target_id, "user_id", user_id)
        if outcome == b"removed":
            raise AppIsRemoved(app.id)
        if outcome == b"busy":
            raise DeploymentInProgress(text_of(named))
        if outcome != b"ok":
            raise ReleaseNotKept(text_of(named))
        await self._announce(app.id, deployment_id, Stage.START)
        return await self.just_made(deployment_id)

    async def put_env(self, app_id: str, variables: dict[str, str]) -> int:
        """The environment of the application's next releases, in full. Its version; 0: no such application."""
        return int(await self._run(app_id, "put_env", json.dumps(variables)))

    async def env(self, app_id: str, version: int) -> dict[str, str]:
        """The environment of a release with this settings version."""
        raw: Any = await self._redis.hget(f"{app_key(app_id)}:env", str(version)) if version else None
        variables: dict[str, str] = json.loads(raw) if raw else {}
        return variables

    async def _with_order(self, app_id: str) -> App | None:
        app = await self.find_app(app_id)
        # A removal ends with the record, not with being obeyed.
        return app if app is not None and (app.ordered > app.obeyed or app.desired is Desired.REMOVED) else None
