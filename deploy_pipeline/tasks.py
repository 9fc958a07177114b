"""Ending tasks, where a cancellation may be swallowed on the way, as `asyncio.wait_for` may before Python 3.12."""

import asyncio
from typing import Any, Final

_AGAIN_S: Final = 0.2


async def end_task(task: "asyncio.Task[Any]", *, again_s: float = _AGAIN_S) -> None:
    """Cancel until it has ended; how it ended is not asked. `again_s`: longer than what it cleans up at its end."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=again_s)
    if not task.cancelled():
        task.exception()  # looked at, or asyncio complains


def is_cancelled() -> bool:
    """Whether this task was cancelled and something below swallowed it. A task group cancels its tasks only once."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
