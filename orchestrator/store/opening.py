"""The store that the settings name, for commands that need it for a moment."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from redis.exceptions import RedisError

from orchestrator.settings import Settings
from orchestrator.store.connection import StoreClient, connect
from orchestrator.store.embedded import EmbeddedValkey
from orchestrator.store.folders import FolderInUse

_STARTING_SERVE_WAIT_S: Final = 10.0
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
    try:
        await store.start()
    except FolderInUse:
        async with connect(store.socket_path) as client:
            await _answering(client)
            yield client
        return
    try:
        async with connect(store.socket_path) as client:
            yield client
    finally:
        await store.stop()


async def _answering(client: StoreClient) -> None:
    """Wait for a `serve` that has just taken the folder to have its store up."""
    deadline_s = time.monotonic() + _STARTING_SERVE_WAIT_S
    while True:
        try:
            await client.ping()
        except RedisError:
            if time.monotonic() >= deadline_s:
                raise
        else:
            return
        await asyncio.sleep(_POLL_S)
