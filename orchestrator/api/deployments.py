"""`/deploy`, `/api/v1/deployments`, and those of an application."""

import hashlib
from typing import Any

from aiohttp import web

from deploy_pipeline.jobs import SETTLED, Deployment, public_status
from orchestrator.access.scopes import Scope
from orchestrator.api.auth import require_scope
from orchestrator.api.body import ApiModel, idempotency_key, json_response, read_body, timestamp
from orchestrator.api.keys import DEPLOYMENTS
from orchestrator.deployments.service import Request


class DeployRequest(ApiModel):
    """No options yet: an empty body or `{}`."""


class NoOptions(ApiModel):
    """An empty body or `{}`."""


def deployment_object(deployment: Deployment) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": deployment.id,
        "appId": deployment.app_id,
        "sessionId": deployment.session_id,
        "status": public_status(deployment.state),
        "state": deployment.state,
        "createdAt": timestamp(deployment.created_at),
        "updatedAt": timestamp(deployment.updated_at),
        "times": {state: timestamp(at_ms) for state, at_ms in deployment.times.items()},
    }
    optional = {
        "reason": deployment.reason,
        "logTail": deployment.log_tail,
        "kind": deployment.kind,
        "url": deployment.url,
        "archiveSha256": deployment.archive_sha256,
        "archiveBytes": deployment.archive_bytes,
        "supersededBy": deployment.superseded_by,
        "rollbackOf": deployment.rollback_of,
        "settingsVersion": deployment.settings_version,
    }
    if deployment.cancel_requested and deployment.state not in SETTLED:
        body["cancelRequested"] = True
    return body | {name: value for name, value in optional.items() if value}


async def deploy(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.DEPLOY)
    body = await read_body(request, DeployRequest, allow_empty=True)
    session_id = request.match_info["id"]
    key = idempotency_key(request)
    deployment = await request.app[DEPLOYMENTS].submit(
        caller.organization_id,
        session_id,
        user_id=caller.user_id,
        request=Request(key=_hash(f"{caller.id}\n{key}") if key else "", body_hash=_hash(body.model_dump_json())),
    )
    return json_response(
        {
            "sessionId": session_id,
            "appId": deployment.app_id,
            "deploymentId": deployment.id,
            "status": "deploying",
        }
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


async def cancel_deployment(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.DEPLOY)
    await read_body(request, NoOptions, allow_empty=True)
    deployment = await request.app[DEPLOYMENTS].cancel(caller.organization_id, request.match_info["id"])
    return json_response(deployment_object(deployment), status=200 if deployment.state in SETTLED else 202)


async def list_deployments(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.READ)
    found = await request.app[DEPLOYMENTS].deployments(caller.organization_id, request.match_info["id"])
    return json_response({"deployments": [deployment_object(deployment) for deployment in found]})


async def show_deployment(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.READ)
    deployment = await request.app[DEPLOYMENTS].get(caller.organization_id, request.match_info["id"])
    return json_response(deployment_object(deployment))


def add_routes(router: web.UrlDispatcher) -> None:
    router.add_post("/api/v1/code-sessions/{id}/deploy", deploy)
    router.add_get("/api/v1/apps/{id}/deployments", list_deployments)
    router.add_get("/api/v1/deployments/{id}", show_deployment)
    router.add_post("/api/v1/deployments/{id}/cancel", cancel_deployment)
