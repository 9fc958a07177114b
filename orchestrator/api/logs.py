"""`/api/v1/deployments/{id}/logs` and `/api/v1/apps/{id}/logs`: read or followed like terminal output."""

import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

from aiohttp import web
from pydantic import Field

from orchestrator.access.scopes import Scope
from orchestrator.api.auth import require_scope
from orchestrator.api.body import QueryModel, json_response, query, timestamp
from orchestrator.api.event_stream import KEEP_ALIVE_S, EventStream, event
from orchestrator.api.keys import LOGS
from orchestrator.deployments.logs import LogPage
from orchestrator.errors import InvalidRequest

_LAST_EVENT_ID: Final = re.compile(r"[0-9]{1,18}(-end)?")
_STREAM_PAGE: Final = 1000


class LogQuery(QueryModel):
    after_seq: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=1, le=10_000)] = 1000
    wait: Annotated[float, Field(ge=0, le=60)] = 0


class StreamQuery(QueryModel):
    after_seq: Annotated[int, Field(ge=0)] = 0


Reader = Callable[[int, float], Awaitable[LogPage]]
"""What is after a seq, held for so many seconds while there is nothing."""


async def read_deployment_log(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.READ)
    asked = query(request, LogQuery)
    deployment_id = request.match_info["id"]
    found = await request.app[LOGS].of_deployment(
        caller.organization_id, deployment_id, after=asked.after_seq, limit=asked.limit, wait_s=asked.wait
    )
    return json_response({"deploymentId": deployment_id, **_log_object(found, with_source=False)})


async def read_app_log(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.READ)
    asked = query(request, LogQuery)
    app_id = request.match_info["id"]
    found = await request.app[LOGS].of_app(
        caller.organization_id, app_id, after=asked.after_seq, limit=asked.limit, wait_s=asked.wait
    )
    return json_response({"appId": app_id, **_log_object(found, with_source=True)})


async def stream_deployment_log(request: web.Request) -> web.StreamResponse:
    caller = require_scope(request, Scope.READ)

    async def read(after: int, wait_s: float) -> LogPage:
        return await request.app[LOGS].of_deployment(
            caller.organization_id, request.match_info["id"], after=after, limit=_STREAM_PAGE, wait_s=wait_s
        )

    return await _stream(request, read, with_source=False)


async def stream_app_log(request: web.Request) -> web.StreamResponse:
    caller = require_scope(request, Scope.READ)

    async def read(after: int, wait_s: float) -> LogPage:
        return await request.app[LOGS].of_app(
            caller.organization_id, request.match_info["id"], after=after, limit=_STREAM_PAGE, wait_s=wait_s
        )

    return await _stream(request, read, with_source=True)


async def _stream(request: web.Request, read: Reader, *, with_source: bool) -> web.StreamResponse:
    after = query(request, StreamQuery).after_seq
    given = request.headers.get("Last-Event-ID", "")
    if given and not _LAST_EVENT_ID.fullmatch(given):
        raise InvalidRequest("Last-Event-ID: is not the id of an event of this stream")
    after = int(given.partition("-")[0]) if given else after
    first = await read(after, 0)  # what does not exist is an error, not a stream
    if first.ended and given.endswith("-end"):
        return web.Response(status=204)  # the one answer after which an EventSource does not connect again
    stream = EventStream(request)
    return await stream.run(_pump(stream, read, first, with_source=with_source))


async def _pump(stream: EventStream, read: Reader, found: LogPage, *, with_source: bool) -> None:
    while True:
        after = found.after
        if found.truncated:
            first_seq = found.page.chunks[0].seq if found.page.chunks else found.page.first_seq
            await stream.send(event({"afterSeq": after, "firstSeq": first_seq}, name="truncated"))
        for chunk in _chunk_objects(found, with_source=with_source):
            await stream.send(event(chunk, name="output", event_id=str(chunk["seq"])))
        if found.page.chunks or found.truncated:
            after = found.last_seq
        elif found.ended:
            await stream.send(event({"status": found.ended}, name="end", event_id=f"{after}-end"))
            return
        else:
            await stream.keep_alive()
        found = await read(after, KEEP_ALIVE_S)


def _chunk_objects(found: LogPage, *, with_source: bool) -> list[dict[str, Any]]:
    return [
        {"seq": chunk.seq, "text": chunk.text, "createdAt": timestamp(chunk.time_ms)}
        | ({"deploymentId": chunk.source} if with_source else {})
        for chunk in found.page.chunks
    ]


def _log_object(found: LogPage, *, with_source: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "chunks": _chunk_objects(found, with_source=with_source),
        "lastSeq": found.last_seq,
        "firstSeq": found.page.first_seq,
        "hasMore": found.has_more,
    }
    return body | {"truncated": True} if found.truncated else body


def add_routes(router: web.UrlDispatcher) -> None:
    router.add_get("/api/v1/deployments/{id}/logs", read_deployment_log)
    router.add_get("/api/v1/deployments/{id}/logs/stream", stream_deployment_log, allow_head=False)
    router.add_get("/api/v1/apps/{id}/logs", read_app_log)
    router.add_get("/api/v1/apps/{id}/logs/stream", stream_app_log, allow_head=False)
