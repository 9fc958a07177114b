"""What the store knows of applications and deployments: reading it. Only `queue.lua` changes it."""

from typing import TYPE_CHECKING, Any

from deploy_pipeline.jobs import App, Deployment, app_id_of_deployment, app_id_of_session, is_app_id

if TYPE_CHECKING:
    from redis.asyncio import Redis


class Records:
    """Any call may raise redis-py's `RedisError`."""

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis

    async def get(self, organization_id: str, deployment_id: str) -> Deployment | None:
        """None for an unknown one and for another organization's."""
        found = await self.find(deployment_id)
        return found if found is not None and found.organization_id == organization_id else None

    async def find(self, deployment_id: str) -> Deployment | None:
        """For workers, which act for every organization. Never to answer a caller with."""
        app_id = app_id_of_deployment(deployment_id)
        fields = await self._hash(f"{app_key(app_id)}:{deployment_id}") if app_id else {}
        return Deployment.from_hash(fields) if fields else None

    async def just_made(self, deployment_id: str) -> Deployment:
        made = await self.find(deployment_id)
        if made is None:  # it was written a moment ago, and is never removed while it is the newest
            raise RuntimeError(f"{deployment_id} vanished from the store")
        return made

    async def get_app(self, organization_id: str, app_id: str) -> App | None:
        """None for an unknown one and for another organization's."""
        if not is_app_id(app_id):
            return None
        fields = await self._hash(app_key(app_id))
        if fields.get("organization_id") != organization_id:
            return None
        return App.model_validate(fields)

    async def find_app(self, app_id: str) -> App | None:
        """For workers, which act for every organization. Never to answer a caller with."""
        fields = await self._hash(app_key(app_id))
        return App.model_validate(fields) if "id" in fields else None

    async def app_of_session(self, organization_id: str, session_id: str) -> App | None:
        """None when the session was never deployed, and for another organization's."""
        return await self.get_app(organization_id, app_id_of_session(session_id))

    async def list_apps(self, organization_id: str) -> list[App]:
        """Newest first."""
        ids = await self._redis.zrevrange(organization_key(organization_id), 0, -1)
        apps = [await self.get_app(organization_id, text_of(app_id)) for app_id in ids]
        return [app for app in apps if app is not None]

    async def list_deployments(self, organization_id: str, app_id: str) -> list[Deployment]:
        """Newest first, the last 100; empty for an unknown application and for another organization's."""
        if not is_app_id(app_id):
            return []
        ids = await self._redis.zrevrange(f"{app_key(app_id)}:deployments", 0, -1)
        found = [await self.get(organization_id, text_of(deployment_id)) for deployment_id in ids]
        return [deployment for deployment in found if deployment is not None]

    async def _hash(self, key: str) -> dict[str, str]:
        fields = await self._redis.hgetall(key)
        return {text_of(name): text_of(value) for name, value in fields.items()}


def app_key(app_id: str) -> str:
    return f"deploy:{{{app_id}}}"


def organization_key(organization_id: str) -> str:
    return f"deploy:apps-of:{organization_id}"


def text_of(value: Any) -> str:
    """redis-py's annotations do not know that this client answers with bytes."""
    return str(value, "utf-8")
