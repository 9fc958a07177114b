"""`/api/v1/apps`: list, show, stop, start, restart, roll back, set the environment, remove."""

import re
from typing import Annotated, Any, Final

from aiohttp import web
from pydantic import Field, StringConstraints, field_validator

from deploy_pipeline.jobs import SETTLED, App, Deployment, Desired, kept_ids, public_status
from deploy_pipeline.orders import Verb
from orchestrator.access.scopes import Scope
from orchestrator.api.auth import require_scope
from orchestrator.api.body import ApiModel, json_response, read_body, timestamp
from orchestrator.api.deployments import NoOptions, deployment_object
from orchestrator.api.keys import APPS, DEPLOYMENTS

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_RESERVED: Final = frozenset({"PORT", "HOST", "CODE_SESSIONS_RELEASE"})
_VALUE_BYTES: Final = 32 * 1024
_ALL_BYTES: Final = 256 * 1024


class RollbackRequest(ApiModel):
    deployment_id: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = None


class EnvRequest(ApiModel):
    env: Annotated[dict[str, str], Field(max_length=200)]

    @field_validator("env")
    @classmethod
    def _can_be_an_environment(cls, value: dict[str, str]) -> dict[str, str]:
        # Neither names nor values are repeated in a message: either may be the secret.
        if any(not _NAME.fullmatch(name) for name in value):
            raise ValueError("names are letters, digits and underscores, and do not begin with a digit")
        if _RESERVED & value.keys():
            raise ValueError(f"{', '.join(sorted(_RESERVED))} are set by the platform")
        if any("\0" in text or len(text.encode()) > _VALUE_BYTES for text in value.values()):
            raise ValueError(f"values have at most {_VALUE_BYTES} bytes and no NUL")
        if sum(len(name) + len(text.encode()) for name, text in value.items()) > _ALL_BYTES:
            raise ValueError(f"all together have at most {_ALL_BYTES} bytes")
        return value


def app_object(app: App, newest: Deployment | None) -> dict[str, Any]:
    """`url` is there as soon as a release has served."""
    body: dict[str, Any] = {
        "id": app.id,
        "sessionId": app.session_id,
        "organizationId": app.organization_id,
        "name": app.name,
        "status": _status(app, newest),
        "createdAt": timestamp(app.created_at),
        "updatedAt": timestamp(app.updated_at),
        "currentDeploymentId": app.current_deployment_id or None,
        "keptDeploymentIds": kept_ids(app),
        "settingsVersion": app.settings_version,
        "restarts": app.restarts,
        "url": app.url or None,
    }
    if app.health_reason:
        body["statusReason"] = app.health_reason
    if newest is not None:
        body["deployment"] = deployment_object(newest)
    return body


def _status(app: App, newest: Deployment | None) -> str:
    if app.desired is Desired.REMOVED:
        return "removing"
    if newest is None or newest.state not in SETTLED:
        return "deploying"
    if app.current_deployment_id:
        return app.health
    return public_status(newest.state)


async def list_apps(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.READ)
    apps = await request.app[DEPLOYMENTS].apps(caller.organization_id)
    return json_response({"apps": [app_object(app, newest) for app, newest in apps]})


async def show_app(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.READ)
    app, newest = await request.app[DEPLOYMENTS].get_app(caller.organization_id, request.match_info["id"])
    names = await request.app[APPS].env_names(app)
    return json_response(app_object(app, newest) | {"envNames": names})


async def stop_app(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.DEPLOY)
    return await _order(request, caller.organization_id, Verb.STOP)


async def start_app(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.DEPLOY)
    return await _order(request, caller.organization_id, Verb.START)


async def restart_app(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.DEPLOY)
    return await _order(request, caller.organization_id, Verb.RESTART)


async def _order(request: web.Request, organization_id: str, verb: Verb) -> web.Response:
    """200 when it is so, 202 when it becomes so later."""
    await read_body(request, NoOptions, allow_empty=True)
    app_id = request.match_info["id"]
    done = await request.app[APPS].order(organization_id, app_id, verb)
    app, newest = await request.app[DEPLOYMENTS].get_app(organization_id, app_id)
    return json_response(app_object(app, newest), status=200 if done else 202)


async def roll_back_app(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.DEPLOY)
    body = await read_body(request, RollbackRequest, allow_empty=True)
    deployment = await request.app[APPS].roll_back(
        caller.organization_id, request.match_info["id"], body.deployment_id or "", user_id=caller.user_id
    )
    return json_response(deployment_object(deployment), status=200 if deployment.state in SETTLED else 202)


async def put_app_env(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.DEPLOY)
    body = await read_body(request, EnvRequest)
    app_id = request.match_info["id"]
    version = await request.app[APPS].put_env(caller.organization_id, app_id, body.env)
    return json_response({"appId": app_id, "settingsVersion": version, "envNames": sorted(body.env)})


async def remove_app(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.DEPLOY)
    removed = await request.app[APPS].remove(caller.organization_id, request.match_info["id"])
    return web.Response(status=204 if removed else 202)


def add_routes(router: web.UrlDispatcher) -> None:
    router.add_get("/api/v1/apps", list_apps)
    router.add_get("/api/v1/apps/{id}", show_app)
    router.add_delete("/api/v1/apps/{id}", remove_app)
    router.add_post("/api/v1/apps/{id}/stop", stop_app)
    router.add_post("/api/v1/apps/{id}/start", start_app)
    router.add_post("/api/v1/apps/{id}/restart", restart_app)
    router.add_post("/api/v1/apps/{id}/rollback", roll_back_app)
    router.add_put("/api/v1/apps/{id}/env", put_app_env)
