"""Everything a caller can be told, as domain errors that know nothing of the web.

OrchestratorError
  InvalidRequest            400 invalid-request
  Unauthenticated           401 unauthenticated
  InsufficientScope         403 insufficient-scope
  OriginNotAllowed          403 origin-not-allowed
  NotFound                  404 not-found
    SessionNotFound             session-not-found
    AppNotFound                 app-not-found
    DeploymentNotFound          deployment-not-found
    KeyNotFound                 key-not-found
  PayloadTooLarge           413 payload-too-large
  UnsupportedMediaType      415 unsupported-media-type
  Conflict                  409 conflict
    SessionEnded                session-ended
    TerminalExited              terminal-exited
    TerminalRunning             terminal-running
    TerminalNotReading          terminal-not-reading
    IdempotencyKeyReused        idempotency-key-reused
    DeploymentSettled           deployment-settled
    DeploymentInProgress        deployment-in-progress
    AppNotDeployed              app-not-deployed
    AppIsRemoved                app-is-removed
    AppNotStarted               app-not-started
    ReleaseNotKept              release-not-kept
    WorkspaceNotArchivable      workspace-not-archivable
  UpgradeRequired           426 upgrade-required
  RateLimited               429 rate-limited
  Unavailable               503 unavailable
    StoreUnavailable            store-unavailable
    RuntimeUnavailable          runtime-unavailable
    TerminalUnavailable         terminal-unavailable
    NotReady                    not-ready
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

Fact = str | int | bool | Sequence[Mapping[str, str | int | bool]]
"""What JSON can say of an error beyond its detail: a value, or a list of named values."""


class OrchestratorError(Exception):
    """Anything a caller can be told. `facts` become members of the problem document (RFC 9457)."""

    status: ClassVar[int]
    code: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, detail: str, **facts: Fact) -> None:
        super().__init__(detail)
        self.detail = detail
        self.facts = facts


class InvalidRequest(OrchestratorError):
    status, code, title = 400, "invalid-request", "The request is not valid"


class Unauthenticated(OrchestratorError):
    status, code, title = 401, "unauthenticated", "No valid API key"


class InsufficientScope(OrchestratorError):
    status, code, title = 403, "insufficient-scope", "The API key lacks a scope"


class OriginNotAllowed(OrchestratorError):
    status, code, title = 403, "origin-not-allowed", "The page's origin is not allowed"


class NotFound(OrchestratorError):
    status, code, title = 404, "not-found", "No such thing"


class SessionNotFound(NotFound):
    code, title = "session-not-found", "No such code session"


class AppNotFound(NotFound):
    code, title = "app-not-found", "No such application"


class DeploymentNotFound(NotFound):
    code, title = "deployment-not-found", "No such deployment"


class KeyNotFound(NotFound):
    code, title = "key-not-found", "No such API key"


class PayloadTooLarge(OrchestratorError):
    status, code, title = 413, "payload-too-large", "The request body is too large"


class UnsupportedMediaType(OrchestratorError):
    status, code, title = 415, "unsupported-media-type", "The request body is not JSON"


class Conflict(OrchestratorError):
    status, code, title = 409, "conflict", "The state does not allow it"


class SessionEnded(Conflict):
    code, title = "session-ended", "The code session has ended"


class TerminalExited(Conflict):
    code, title = "terminal-exited", "The terminal's shell has exited"


class TerminalRunning(Conflict):
    code, title = "terminal-running", "The terminal's shell is running"


class TerminalNotReading(Conflict):
    code, title = "terminal-not-reading", "The program in the terminal does not read its input"


class IdempotencyKeyReused(Conflict):
    code, title = "idempotency-key-reused", "The Idempotency-Key was used with another body"


class DeploymentSettled(Conflict):
    code, title = "deployment-settled", "The deployment has ended already"


class DeploymentInProgress(Conflict):
    code, title = "deployment-in-progress", "A deployment is in progress"


class AppNotDeployed(Conflict):
    code, title = "app-not-deployed", "The application has no release"


class AppIsRemoved(Conflict):
    code, title = "app-is-removed", "The application is being removed"


class AppNotStarted(Conflict):
    code, title = "app-not-started", "The application did not start"


class ReleaseNotKept(Conflict):
    code, title = "release-not-kept", "There is no such release to go back to"


class WorkspaceNotArchivable(Conflict):
    code, title = "workspace-not-archivable", "The workspace's files cannot be archived"


class UpgradeRequired(OrchestratorError):
    status, code, title = 426, "upgrade-required", "A WebSocket is served here"


class RateLimited(OrchestratorError):
    status, code, title = 429, "rate-limited", "Too many requests"


class Unavailable(OrchestratorError):
    """Something this answer needs is out of reach right now; `retry_after_s` says when to try again."""

    status, code, title = 503, "unavailable", "Temporarily unavailable"
    retry_after_s: ClassVar[int] = 2


class StoreUnavailable(Unavailable):
    code, title = "store-unavailable", "The store cannot be reached"


class RuntimeUnavailable(Unavailable):
    code, title = "runtime-unavailable", "The workspace runtime cannot be reached"


class TerminalUnavailable(Unavailable):
    code, title = "terminal-unavailable", "The workspace's terminal cannot be reached"


class NotReady(Unavailable):
    code, title = "not-ready", "Not ready to serve"
