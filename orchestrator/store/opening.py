"""The store that the settings name, for commands that need it for a moment."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from redis.exceptions import RedisError

from orchestrator.settings import Settings
from orchestrator.store.connection import StoreClient, connect
from orchestrator.store.embedded import EmbeddedValkey
from orchestrator.store.folders import FolderInUse

_CHANGING_SERVE_WAIT_S: Final = 10.0
_POLL_S: Final = 0.05


@asynccontextmanager
async def open_store(settings: Settings, *, role: str) -> AsyncIterator[StoreClient]:
    """A client for the Redis URL, else for the running `serve`'s store, else for one started for this moment.

    Raises:
        SettingsError: the URL is wrong, the folder cannot be used, or the store does not start.
    """
    if not settings.embedded_store:
        async with connect(settings.redis_url) as client:
            yield client
        return
    store = EmbeddedValkey(settings.data_dir.absolute(), settings.run_dir.absolute(), role=role)
    async with connect(store.socket_path) as client:
        started = await _start_or_find(store, client)
        try:
            yield client
        finally:
            if started:
                await store.stop()


async def _start_or_find(store: EmbeddedValkey, client: StoreClient) -> bool:
    """True: `store` was started. False: a `serve` has the folder and its store answers.

    A `serve` that has just taken the folder, or was just killed, is given time to become one or the other.
    """
    deadline_s = time.monotonic() + _CHANGING_SERVE_WAIT_S
    while True:
        try:
            await store.start()
        except FolderInUse:
            with contextlib.suppress(RedisError):
                await client.ping()
                return False
            if time.monotonic() >= deadline_s:
                raise
        else:
            return True
        await asyncio.sleep(_POLL_S)
