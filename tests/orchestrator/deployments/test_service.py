import asyncio
import contextlib

import pytest
from redis.exceptions import ConnectionError as StoreConnectionError

from orchestrator.deployments import service
from orchestrator.deployments.service import Deployments


class OddQueue:
    """Fails in every way, once each, and then does nothing."""

    def __init__(self):
        self.errors = [KeyError("state"), ValueError("odd"), StoreConnectionError("away")]
        self.worked = asyncio.Event()

    async def sweep(self):
        await self.take()

    async def take(self, *_args, **_options):
        if self.errors:
            raise self.errors.pop()
        self.worked.set()
        await asyncio.sleep(3600)


@pytest.mark.parametrize("loop", ["sweep_forever", "archive_forever"])
async def test_one_odd_record_does_not_end_the_work_on_all_others(monkeypatch, loop):
    monkeypatch.setattr(service, "SWEEP_INTERVAL_S", 0.01)
    monkeypatch.setattr(service, "_PAUSE_S", 0.01)
    queue = OddQueue()
    working = asyncio.create_task(getattr(Deployments(None, None, queue, None, consumer="test"), loop)())
    try:
        await asyncio.wait_for(queue.worked.wait(), 2)
    finally:
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await working
