"""`POST /api/v1/code-sessions/{id}/tickets`, and callers that show a ticket or come from a browser's page."""

from typing import Final

from aiohttp import hdrs, web

from orchestrator.access.keys import ApiKey
from orchestrator.access.scopes import Scope
from orchestrator.access.tickets import TicketStore
from orchestrator.api.auth import API_KEY_HEADER, act_as, authenticate, require_scope
from orchestrator.api.body import ApiModel, json_response, read_body, timestamp
from orchestrator.api.keys import REGISTRY, SETTINGS
from orchestrator.errors import InvalidRequest, OriginNotAllowed

TICKETS: Final = web.AppKey("tickets", TicketStore)


class TicketRequest(ApiModel):
    pass


async def issue_ticket(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.READ)
    await read_body(request, TicketRequest, allow_empty=True)
    session = await request.app[REGISTRY].get(caller.organization_id, request.match_info["id"])
    ticket = await request.app[TICKETS].issue(caller, session.id)
    body = {"ticket": ticket.text, "expiresAt": timestamp(ticket.expires_at_ms), "sessionId": session.id}
    return json_response(body, status=201)


async def authenticate_or_redeem(request: web.Request) -> ApiKey:
    """The caller of a public handler, by a key in a header or by a `ticket` for the session of the path.

    Raises:
        Unauthenticated, InvalidRequest, RateLimited: as `authenticate`.
    """
    text = request.query.get("ticket")
    if text is None:
        return await authenticate(request)
    if API_KEY_HEADER in request.headers or hdrs.AUTHORIZATION in request.headers:
        raise InvalidRequest("ticket: the request carries an API key as well; send one of the two.")
    key = await request.app[TICKETS].redeem(text, request.match_info["id"])
    act_as(request, key)
    return key


def allowed_origin(request: web.Request) -> str | None:
    """The origin of the page that asks; None when no browser says one.

    Raises:
        OriginNotAllowed: it is neither our own nor one of the settings'.
    """
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is not None and origin not in request.app[SETTINGS].origins:
        raise OriginNotAllowed(
            "The page's origin is not allowed to attach; CODE_SESSIONS_ALLOWED_ORIGINS names others."
        )
    return origin


def add_routes(router: web.UrlDispatcher) -> None:
    router.add_post("/api/v1/code-sessions/{id}/tickets", issue_ticket)
