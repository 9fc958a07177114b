"""`GET /deploy/preview`: what a deployment would take and do."""

from typing import Any

from aiohttp import web

from deploy_pipeline.preview import Preview
from orchestrator.access.scopes import Scope
from orchestrator.api.auth import require_scope
from orchestrator.api.body import json_response
from orchestrator.api.keys import PREVIEWS


def preview_object(session_id: str, found: Preview) -> dict[str, Any]:
    facts = found.facts
    body: dict[str, Any] = {
        "sessionId": session_id,
        "deployable": found.plan is not None,
        "fileCount": facts.files,
        "totalBytes": facts.bytes,
        "files": [{"path": path, "bytes": size} for path, size in facts.listed],
        "filesOmitted": max(0, facts.files - len(facts.listed)),
        "ignoreFile": facts.ignore_file or None,
        "leftOutCount": facts.left_out,
        "leftOutReasons": facts.left_out_reasons,
        "leftOut": [item.model_dump(exclude_defaults=True) for item in facts.left_out_list],
        "warnings": found.warnings,
    }
    if found.plan is None:
        return body | {"reason": found.problem}
    plan = found.plan
    return body | {
        "kind": plan.kind,
        "build": found.build_lines,
        "start": found.start_line or None,
        "roots": list(plan.roots),
        "port": plan.port,
        "healthPath": plan.health_path,
        "env": plan.env,
    }


async def show_preview(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.READ)
    session_id = request.match_info["id"]
    found = await request.app[PREVIEWS].of_session(caller.organization_id, session_id)
    return json_response(preview_object(session_id, found))


def add_routes(router: web.UrlDispatcher) -> None:
    router.add_get("/api/v1/code-sessions/{id}/deploy/preview", show_preview)
