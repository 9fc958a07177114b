"""Background work that belongs to the process: started anywhere, awaited or cancelled in one place."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog

_CANCEL_AGAIN_S: Final = 0.2
_AGAIN_S: Final = 1.0

log = structlog.get_logger(__name__)


class TaskOwner:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def start(self, work: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Run in the background; an exception that nobody awaits is logged, never lost."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        if self._closed:  # nothing new is begun any more
            task.cancel()
        return task

    def keep(self, work: Callable[[], Coroutine[Any, Any, Any]], *, name: str) -> asyncio.Task[Any]:
        """Run work that is never to end; when it fails all the same, say so and begin it again."""
        return self.start(keep_running(work, name=name), name=name)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task failed", task=task.get_name(), exc_info=error)

    async def close(self) -> None:
        """Cancel all and wait for them; what is started later is cancelled at once."""
        self._closed = True
        await end_tasks(*self._tasks)


async def keep_running(work: Callable[[], Coroutine[Any, Any, Any]], *, name: str) -> None:
    while True:
        try:
            await work()
        except Exception:
            log.exception("failed, and begun again", task=name)
        await asyncio.sleep(_AGAIN_S)


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel and wait until they are done: again and again, since before Python 3.12 a cancellation that meets the end
    of an `asyncio.wait_for` is swallowed.
    """
    left = {task for task in tasks if task is not asyncio.current_task()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN_S)
