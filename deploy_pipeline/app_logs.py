"""What releases write, copied into their application's log. Any number may copy at once: each piece arrives once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

import structlog
from redis.exceptions import RedisError

from deploy_pipeline.builders.base import Release, Runtime
from deploy_pipeline.errors import DeployFailed, EngineUnavailable
from deploy_pipeline.logs import CHUNK_BYTES, Log, LogStore, in_chunks
from deploy_pipeline.tasks import end_task

_PIECE_BYTES: Final = 8 * CHUNK_BYTES
_PIECES_AT_ONCE: Final = 16  # then others have their turn: a flood is copied at 2 MiB a round
_FOLLOW_S: Final = 0.5

_log = structlog.get_logger(__name__)


class AppLogs:
    def __init__(self, store: LogStore, runtime: Runtime) -> None:
        self._store, self._runtime = store, runtime

    async def copy(self, release: Release) -> None:
        """Copy what is new. A store or an engine out of reach is no error: the next call copies it."""
        log = Log(release.app_id)
        try:
            for _ in range(_PIECES_AT_ONCE):
                at = await self._store.position(log, release.deployment_id)
                piece = await self._runtime.read_log(release, at, max_bytes=_PIECE_BYTES)
                if piece.position == at:
                    return
                chunks = in_chunks(piece.data)
                if piece.skipped:
                    chunks.insert(0, b"[output is missing here: the application writes faster than its log is kept]\n")
                await self._store.append(log, chunks, source=release.deployment_id, at=at, then=piece.position)
        except (RedisError, OSError, EngineUnavailable, DeployFailed) as error:
            _log.debug("deploy.app_log_not_copied", deployment=release.deployment_id, error=str(error))

    async def follow(self, release: Release) -> None:
        """Copy until cancelled."""
        while True:
            await self.copy(release)
            await asyncio.sleep(_FOLLOW_S)

    @contextlib.asynccontextmanager
    async def following(self, release: Release) -> AsyncIterator[None]:
        """Copy meanwhile, and what is left at the end."""
        task = asyncio.create_task(self.follow(release))
        try:
            yield
        finally:
            await end_task(task)
            await self.copy(release)
