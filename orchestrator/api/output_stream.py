"""`GET /api/v1/code-sessions/{id}/output/stream`: output as Server-Sent Events."""

import re
from typing import Annotated, Any, Final, Literal

from aiohttp import hdrs, web
from pydantic import Field

from orchestrator.access.scopes import Scope
from orchestrator.api.auth import public, require_scope
from orchestrator.api.body import QueryModel, query
from orchestrator.api.event_stream import KEEP_ALIVE_S, EventStream, event
from orchestrator.api.keys import REGISTRY, SETTINGS, TERMINALS
from orchestrator.api.terminal import chunk_object
from orchestrator.api.tickets import authenticate_or_redeem
from orchestrator.errors import InvalidRequest
from orchestrator.models import Session
from orchestrator.sessions.following import Follower
from orchestrator.sessions.terminals import Output

_LAST_EVENT_ID: Final = re.compile(r"([0-9]{1,18})(-end)?")


class StreamQuery(QueryModel):
    after_seq: Annotated[int, Field(ge=0)] = 0
    encoding: Literal["utf-8", "base64"] = "utf-8"
    ticket: str = ""


@public
async def stream_output(request: web.Request) -> web.StreamResponse:
    asked = query(request, StreamQuery)
    after, had_end = _resume_after(request, asked.after_seq)
    await authenticate_or_redeem(request)
    caller = require_scope(request, Scope.READ)
    session = await request.app[REGISTRY].get(caller.organization_id, request.match_info["id"])
    if had_end and session.status.ended:
        return web.Response(status=204)  # the one answer after which an EventSource does not connect again
    follower = Follower(request.app[TERMINALS], request.app[REGISTRY], session, after=after)
    stream = EventStream(request, _cors_headers(request))
    return await stream.run(_pump(stream, follower, base64_data=asked.encoding == "base64"))


def _resume_after(request: web.Request, after_seq: int) -> tuple[int, bool]:
    """Where to go on, and whether the client has seen the `end` event. What the browser says of itself wins."""
    given = request.headers.get("Last-Event-ID", "")
    if not given:
        return after_seq, False
    found = _LAST_EVENT_ID.fullmatch(given)
    if found is None:
        raise InvalidRequest("Last-Event-ID: is not the id of an event of this stream")
    return int(found[1]), bool(found[2])


def _cors_headers(request: web.Request) -> dict[str, str]:
    """An EventSource of another origin may connect anyway; whether its page may read is what these say."""
    origin = request.headers.get(hdrs.ORIGIN)
    allowed = origin is not None and origin in request.app[SETTINGS].origins
    return {hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: origin, hdrs.VARY: hdrs.ORIGIN} if allowed and origin else {}


async def _pump(stream: EventStream, follower: Follower, *, base64_data: bool) -> None:
    async for output in follower.pages(KEEP_ALIVE_S):
        if output.page.records or output.truncated:
            await stream.send(_events(output, base64_data=base64_data))
        else:
            await stream.keep_alive()
    await stream.send(event(_end_of(follower.session), name="end", event_id=f"{follower.after}-end"))


def _events(output: Output, *, base64_data: bool) -> bytes:
    parts = []
    if output.truncated:
        parts.append(event({"afterSeq": output.after, "firstSeq": output.first_seq}, name="truncated"))
    for record in output.page.records:
        chunk = chunk_object(record, base64_data=base64_data)
        parts.append(event(chunk, name=chunk.get("type", "output"), event_id=str(record.seq)))
    return b"".join(parts)


def _end_of(session: Session) -> dict[str, Any]:
    end = {"sessionId": session.id, "status": session.status}
    return end | {"statusReason": session.status_reason} if session.status_reason else end


def add_routes(router: web.UrlDispatcher) -> None:
    router.add_get("/api/v1/code-sessions/{id}/output/stream", stream_output, allow_head=False)
