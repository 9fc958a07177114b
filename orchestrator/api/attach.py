"""`GET /pty/{id}`: live attach over a WebSocket."""

from typing import Annotated, Final

from aiohttp import web
from pydantic import Field

from orchestrator.access.scopes import Scope
from orchestrator.api.attach_frames import SUBPROTOCOL
from orchestrator.api.attachment import Attachment
from orchestrator.api.auth import public, require_scope
from orchestrator.api.body import QueryModel, query
from orchestrator.api.keys import REGISTRY, TERMINALS
from orchestrator.api.tickets import allowed_origin, authenticate_or_redeem
from orchestrator.errors import InvalidRequest, UpgradeRequired
from orchestrator.sessions.following import Follower
from sidecar.protocol import MAX_INPUT_BYTES

_TAIL_BYTES: Final = 64 * 1024
_MESSAGE_BYTES_MAX: Final = MAX_INPUT_BYTES + 64 * 1024
_GOODBYE_S: Final = 5.0


class AttachQuery(QueryModel):
    after_seq: Annotated[int, Field(ge=0)] | None = None
    tail_bytes: Annotated[int, Field(ge=0, le=2**40)] | None = None
    ticket: str = ""


@public
async def attach(request: web.Request) -> web.StreamResponse:
    asked = query(request, AttachQuery)
    if asked.after_seq is not None and asked.tail_bytes is not None:
        raise InvalidRequest("tailBytes: give it or afterSeq, not both")
    allowed_origin(request)
    # Compressing would cost more time than it saves bytes, for keystrokes above all.
    socket = web.WebSocketResponse(
        protocols=(SUBPROTOCOL,),
        autoping=False,
        compress=False,
        max_msg_size=_MESSAGE_BYTES_MAX,
        timeout=_GOODBYE_S,
    )
    ready = socket.can_prepare(request)
    if not ready.ok:
        raise UpgradeRequired("A WebSocket is served here; the request asks for something else.")
    await authenticate_or_redeem(request)
    caller = require_scope(request, Scope.READ)
    session = await request.app[REGISTRY].get(caller.organization_id, request.match_info["id"])
    follower = Follower(
        request.app[TERMINALS],
        request.app[REGISTRY],
        session,
        after=asked.after_seq or 0,
        early=True,
        marks=bool(ready.protocol),
    )
    if asked.after_seq is None:
        await follower.start_at_tail(_TAIL_BYTES if asked.tail_bytes is None else asked.tail_bytes)
    terminal = await request.app[TERMINALS].state(session)
    await socket.prepare(request)
    await Attachment(request, socket, caller, follower).run(terminal)
    return socket


def add_routes(router: web.UrlDispatcher) -> None:
    router.add_get("/pty/{id}", attach, allow_head=False)
