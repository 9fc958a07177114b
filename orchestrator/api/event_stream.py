"""Server-Sent Events (WHATWG HTML, section 9.2): one writer for whatever is followed live."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, Final

from aiohttp import hdrs, web
from pydantic_core import to_json

from orchestrator.api.live import LIVE, ClientStalled, Pace
from orchestrator.tasks import end_tasks

KEEP_ALIVE_S: Final = 15.0
_RETRY_MS: Final = 1000


class EventStream:
    """An answer made of events. Make it, and return what `run` returns from the handler."""

    def __init__(self, request: web.Request, headers: Mapping[str, str] | None = None) -> None:
        self._request = request
        self.response = web.StreamResponse(
            headers={
                hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
                hdrs.CACHE_CONTROL: "no-store",
                "X-Accel-Buffering": "no",  # nginx would otherwise collect events before it passes them on
                **(headers or {}),
            }
        )

    async def begin(self) -> None:
        """Send the headers. From here on nothing but breaking off can tell the client of an error."""
        await self.response.prepare(self._request)
        self._pace = Pace(self._request)
        await self.send(f"retry: {_RETRY_MS}\n\n".encode())

    async def send(self, events: bytes) -> None:
        """Write what `event` made, any number of them at once.

        Raises:
            ClientStalled: the client takes nothing; the connection is aborted.
            ConnectionError: it has gone.
        """
        await self._pace.sent(self.response.write(events), len(events))

    async def keep_alive(self) -> None:
        """A comment: proxies see that the connection is in use, and we whether the client is there."""
        await self.send(b":\n\n")

    async def run(self, pump: Coroutine[Any, Any, None]) -> web.StreamResponse:
        """Begin, and let `pump` send until it returns, the client is gone or takes nothing, or the process stops."""
        live = self._request.app[LIVE]
        task: asyncio.Task[None] | None = None
        try:
            await self.begin()
            task = asyncio.create_task(pump)
            with live.kept(task.cancel):
                await task
        except ClientStalled:
            self._pace.abort()
        except asyncio.CancelledError:
            if not live.closing or task is None or not task.cancelled():
                raise
        finally:
            if task is None:
                pump.close()
            else:
                await end_tasks(task)
        return self.response


def event(data: Mapping[str, object], *, name: str, event_id: str = "") -> bytes:
    """One event with JSON as its data, which has no line breaks of its own."""
    identity = f"id: {event_id}\n" if event_id else ""
    return f"{identity}event: {name}\ndata: ".encode() + to_json(data) + b"\n\n"
