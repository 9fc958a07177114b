"""`/api/v1/deployments/{id}/logs` and `/api/v1/apps/{id}/logs`: read like terminal output."""

from typing import Annotated, Any

from aiohttp import web
from pydantic import Field

from orchestrator.access.scopes import Scope
from orchestrator.api.auth import require_scope
from orchestrator.api.body import QueryModel, json_response, query, timestamp
from orchestrator.api.keys import LOGS
from orchestrator.deployments.logs import LogPage


class LogQuery(QueryModel):
    after_seq: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=1, le=10_000)] = 1000
    wait: Annotated[float, Field(ge=0, le=60)] = 0


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


def _log_object(found: LogPage, *, with_source: bool) -> dict[str, Any]:
    chunks: list[dict[str, Any]] = [
        {"seq": chunk.seq, "text": chunk.text, "createdAt": timestamp(chunk.time_ms)}
        | ({"deploymentId": chunk.source} if with_source else {})
        for chunk in found.page.chunks
    ]
    body: dict[str, Any] = {
        "chunks": chunks,
        "lastSeq": found.last_seq,
        "firstSeq": found.page.first_seq,
        "hasMore": found.has_more,
    }
    return body | {"truncated": True} if found.truncated else body


def add_routes(router: web.UrlDispatcher) -> None:
    router.add_get("/api/v1/deployments/{id}/logs", read_deployment_log)
    router.add_get("/api/v1/apps/{id}/logs", read_app_log)
