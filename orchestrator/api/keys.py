"""What handlers find in the application, by typed keys; the composition root puts it there."""

from aiohttp import web

from orchestrator.deployments.apps import Apps
from orchestrator.deployments.logs import Logs
from orchestrator.deployments.previews import Previews
from orchestrator.deployments.service import Deployments
from orchestrator.sessions.lifecycle import SessionLifecycle
from orchestrator.sessions.registry import SessionRegistry
from orchestrator.sessions.terminals import Terminals
from orchestrator.settings import Settings

SETTINGS = web.AppKey("settings", Settings)
REGISTRY = web.AppKey("registry", SessionRegistry)
LIFECYCLE = web.AppKey("lifecycle", SessionLifecycle)
TERMINALS = web.AppKey("terminals", Terminals)
APPS = web.AppKey("apps", Apps)
LOGS = web.AppKey("logs", Logs)
DEPLOYMENTS = web.AppKey("deployments", Deployments)
PREVIEWS = web.AppKey("previews", Previews)
