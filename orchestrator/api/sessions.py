"""`/api/v1/code-sessions`: create, list, show, end."""

import unicodedata
from typing import Annotated, Any

from aiohttp import web
from pydantic import Field, StringConstraints, field_validator

from orchestrator.access.scopes import Scope
from orchestrator.api.auth import require_scope
from orchestrator.api.body import ApiModel, QueryModel, json_response, query, read_body, timestamp
from orchestrator.api.keys import LIFECYCLE, REGISTRY, SETTINGS, TERMINALS
from orchestrator.models import Session, SessionStatus, TerminalState
from sidecar.protocol import OutputPolicy


def _plain(value: str, *, allowed: str = "") -> str:
    if any(unicodedata.category(character) == "Cc" and character not in allowed for character in value):
        raise ValueError("control characters are not allowed")
    return value


class CreateRequest(ApiModel):
    project_name: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    project_description: Annotated[str, StringConstraints(max_length=2000)]

    output_policy: OutputPolicy = OutputPolicy.BLOCK

    @field_validator("project_name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be blank")
        return _plain(value)

    @field_validator("project_description")
    @classmethod
    def _is_text(cls, value: str) -> str:
        return _plain(value, allowed="\r\n\t")


class ListQuery(QueryModel):
    status: SessionStatus | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: Annotated[str, StringConstraints(max_length=200)] = ""


def session_object(session: Session, terminal: TerminalState | None, origin: str) -> dict[str, Any]:
    """The contract's code session object; `terminal` in the answers about one session."""
    body: dict[str, Any] = {
        "id": session.id,
        "projectName": session.project_name,
        "projectDescription": session.project_description,
        "status": session.status,
        "workspaceId": session.workspace_id,
        "ptyEndpoint": f"{origin}/pty/{session.id}",
        "outputPolicy": session.output_policy,
        "userId": session.user_id,
        "organizationId": session.organization_id,
        "createdAt": timestamp(session.created_at_ms),
        "updatedAt": timestamp(session.updated_at_ms),
    }
    if session.status_reason:
        body["statusReason"] = session.status_reason
    if terminal is not None:
        body["terminal"] = terminal_object(terminal)
    return body


def terminal_object(terminal: TerminalState) -> dict[str, Any]:
    return {**terminal.exit, "state": terminal.state, "cols": terminal.cols, "rows": terminal.rows}


async def create_session(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.WRITE)
    body = await read_body(request, CreateRequest)
    session = await request.app[LIFECYCLE].create(
        organization_id=caller.organization_id,
        user_id=caller.user_id,
        name=body.project_name,
        description=body.project_description,
        output_policy=body.output_policy,
    )
    answer = {"sessionId": session.id, "workspaceId": session.workspace_id, "status": session.status}
    return json_response(answer, status=201, headers={"Location": f"{request.path}/{session.id}"})


async def list_sessions(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.READ)
    asked = query(request, ListQuery)
    sessions, cursor = await request.app[REGISTRY].page(
        caller.organization_id, status=asked.status, limit=asked.limit, cursor=asked.cursor
    )
    origin = request.app[SETTINGS].origin
    return json_response(
        {"sessions": [session_object(session, None, origin) for session in sessions], "nextCursor": cursor}
    )


async def show_session(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.READ)
    session = await request.app[REGISTRY].get(caller.organization_id, request.match_info["id"])
    terminal = await request.app[TERMINALS].state(session)
    return json_response(session_object(session, terminal, request.app[SETTINGS].origin))


async def end_session(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.WRITE)
    await request.app[LIFECYCLE].end(caller.organization_id, request.match_info["id"])
    return web.Response(status=204)


def add_routes(router: web.UrlDispatcher) -> None:
    router.add_post("/api/v1/code-sessions", create_session)
    router.add_get("/api/v1/code-sessions", list_sessions)
    router.add_get("/api/v1/code-sessions/{id}", show_session)
    router.add_delete("/api/v1/code-sessions/{id}", end_session)
