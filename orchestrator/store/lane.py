"""One connection for a script that is run all the time by many: calls that wait for each other go out together.

redis-py spends several times as long on a command of its own as the store does. Here a call that finds the lane free
goes out at once, and those that come while it is under way share the next trip.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from redis import exceptions as redis_errors
from redis.asyncio.cluster import RedisCluster
from redis.commands.core import AsyncScript

from orchestrator.store.connection import StoreClient

_TOGETHER: Final = 64
_LARGE_BYTES: Final = 32 * 1024  # such a call goes alone and on another connection: it would hold the small ones up

Argument = int | str | bytes


class ScriptLane:
    def __init__(self, redis: StoreClient, script: AsyncScript) -> None:
        self._redis, self._script = redis, script
        # A cluster's client knows which node a key is on; a lane leads to one server.
        self._connection: Any = None
        self._usable = not isinstance(redis, RedisCluster)
        self._waiting: deque[tuple[Sequence[str], Sequence[Argument], asyncio.Future[Any]]] = deque()
        self._under_way = False

    async def run(self, keys: Sequence[str], args: Sequence[Argument], *, size_bytes: int) -> Any:
        """The script's answer. `size_bytes`: about how much data its arguments are.

        Raises redis-py's errors; as everywhere, the call may have been carried out all the same.
        """
        if not self._usable or size_bytes >= _LARGE_BYTES:
            return await self._script(keys=keys, args=args)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((keys, args, future))
        if not self._under_way:
            await self._trips(until=future)
        answer = await future
        if isinstance(answer, redis_errors.NoScriptError):  # the store was emptied or restarted
            return await self._script(keys=keys, args=args)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _trips(self, *, until: "asyncio.Future[Any] | None" = None) -> None:
        self._under_way = True
        try:
            while self._waiting and (until is None or not until.done()):
                await self._trip([self._waiting.popleft() for _ in range(min(len(self._waiting), _TOGETHER))])
        finally:
            self._under_way = False
            if self._waiting:  # who began has its answer and goes on; the others' trips need somebody
                self._under_way = True
                self._driver = asyncio.get_running_loop().create_task(self._trips())

    async def _trip(self, calls: list[tuple[Sequence[str], Sequence[Argument], "asyncio.Future[Any]"]]) -> None:
        try:
            answers = await self._exchange(
                [("EVALSHA", self._script.sha, len(keys), *keys, *args) for keys, args, _ in calls]
            )
        except BaseException as error:
            failure = error if isinstance(error, Exception) else redis_errors.ConnectionError("the caller has gone")
            for _, _, future in calls:
                if not future.done():
                    future.set_result(failure)
            if not isinstance(error, Exception):
                raise
            return
        for (_, _, future), answer in zip(calls, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    async def _exchange(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        connection, self._connection = self._connection, None
        if connection is None:
            connection = await self._redis.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            answers = []
            for _ in commands:
                try:
                    answers.append(await connection.read_response())
                except redis_errors.ResponseError as error:
                    answers.append(error)
        except BaseException as error:
            await connection.disconnect(nowait=True)
            await self._redis.connection_pool.release(connection)
            if isinstance(error, OSError):
                raise redis_errors.ConnectionError(str(error)) from error
            raise
        self._connection = connection
        return answers
