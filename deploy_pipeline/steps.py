"""Running `queue.lua`, the only thing that changes applications and deployments, and announcing what is to be done."""

import importlib.resources
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import ResponseError

from deploy_pipeline.jobs import Stage
from deploy_pipeline.records import Records, app_key, text_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

GROUP: Final = "consumers"
BUSY_APPS: Final = "deploy:busy"  # a set: the applications that the sweep looks at


class Steps(Records):
    """Any call may raise redis-py's `RedisError`."""

    def __init__(self, redis: "Redis") -> None:
        super().__init__(redis)
        source = importlib.resources.files("deploy_pipeline").joinpath("queue.lua").read_text("utf-8")
        self._script = redis.register_script(source)
        self._groups: set[Stage] = set()

    async def _ensure_group(self, stage: Stage) -> None:
        if stage in self._groups:
            return
        try:
            await self._redis.xgroup_create(stream_key(stage), GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):  # it is there already
                raise
        self._groups.add(stage)

    async def _announce(self, app_id: str, deployment_id: str, stage: Stage) -> None:
        await self._ensure_group(stage)
        entry_id = await self._redis.xadd(stream_key(stage), {"deployment": deployment_id})
        await self._run(app_id, "announced", deployment_id, stage.value, text_of(entry_id))

    async def _run(self, app_id: str, step: str, *arguments: str) -> Any:
        return await self._script(keys=[app_key(app_id)], args=[step, *arguments])

    async def _now_ms(self) -> int:
        seconds, microseconds = await self._redis.time()
        return int(seconds) * 1000 + int(microseconds) // 1000


def stream_key(stage: Stage) -> str:
    return f"deploy:stream:{stage}"
