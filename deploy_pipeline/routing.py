"""Which application name leads where: one Redis hash, changed under the queue's fence."""

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

if TYPE_CHECKING:
    from redis.asyncio import Redis

# One hash tag: both are changed together, which a cluster allows only within a slot.
_ROUTES: Final = "deploy:{routes}"  # field: the application's name; value: a Route as JSON
_FENCES: Final = "deploy:{routes}:fences"  # field: the name; value: the token of the claim that set it last

CHANGED: Final = "deploy:{routes}:changed"  # a channel: the names whose routes have just changed

# A worker that lost its claim must not move traffic: tokens only grow.
_SET: Final = """
if tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0') > tonumber(ARGV[3]) then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('PUBLISH', ARGV[4], ARGV[1])
return 1
"""
# A restarted process has another port; but by then a newer release may have taken over.
_MOVE: Final = """
local route = redis.call('HGET', KEYS[1], ARGV[1])
if not route or cjson.decode(route).deployment_id ~= ARGV[3] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('PUBLISH', ARGV[4], ARGV[1])
return 1
"""


class HttpTarget(BaseModel):
    """An application that listens."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["http"] = "http"
    host: str
    port: int


class StaticTarget(BaseModel):
    """A folder that the gateway serves itself."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["static"] = "static"
    root: str


class StoppedTarget(BaseModel):
    """An application that was stopped on purpose: visitors are told so."""

    model_config = ConfigDict(frozen=True)
    kind: Literal["stopped"] = "stopped"


Target = HttpTarget | StaticTarget | StoppedTarget


class Route(BaseModel):
    """Where an application's requests go now."""

    model_config = ConfigDict(frozen=True)
    app_id: str
    deployment_id: str
    target: Annotated[Target, Field(discriminator="kind")]


_ROUTE: Final = TypeAdapter(Route)


class Routes:
    """The route table. Any call may raise redis-py's `RedisError`."""

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis
        self._set = redis.register_script(_SET)
        self._move = redis.register_script(_MOVE)

    async def get(self, name: str) -> Route | None:
        raw: Any = await self._redis.hget(_ROUTES, name)
        return None if raw is None else _ROUTE.validate_json(raw)

    async def all(self) -> dict[str, Route]:
        """Every route by application name."""
        raw: Any = await self._redis.hgetall(_ROUTES)
        return {str(name, "utf-8"): _ROUTE.validate_json(value) for name, value in raw.items()}

    async def set(self, name: str, route: Route, *, token: int) -> bool:
        """Move the traffic. False, and nothing done, when a claim with a higher token did so before."""
        return bool(await self._set(keys=[_ROUTES, _FENCES], args=[name, route.model_dump_json(), token, CHANGED]))

    async def move(self, name: str, route: Route) -> bool:
        """Give the same deployment another target. False when the route is another deployment's by now."""
        arguments = [name, route.model_dump_json(), route.deployment_id, CHANGED]
        return bool(await self._move(keys=[_ROUTES], args=arguments))

    async def remove(self, name: str) -> None:
        """Also when there was none. The fence stays, so that a late worker cannot bring the route back."""
        await self._redis.hdel(_ROUTES, name)
        await self._redis.publish(CHANGED, name)
