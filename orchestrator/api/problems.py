"""Every failure as `application/problem+json` (RFC 9457), rendered in this one place.

Three ways lead here: the middleware, for what handlers and the router raise; `ProblemAppRunner` in `api.runner`, for
what aiohttp raises outside of middlewares (a refused `Expect` header); and its request handler, for what the HTTP
parser refuses before there is a request.
"""

import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Final

import structlog
from aiohttp import hdrs, web
from redis.exceptions import RedisError

from orchestrator.errors import InsufficientScope, OrchestratorError, Unauthenticated, Unavailable
from orchestrator.store.connection import is_unavailable, store_unavailable

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CONTENT_TYPE: Final = "application/problem+json"
TYPE_PREFIX: Final = "urn:code-sessions:problem:"
REQUEST_ID: Final = "X-Request-Id"
_REQUEST_ID_KEY: Final = web.RequestKey("request_id", str)
_STARTED_KEY: Final = web.RequestKey("answer_started", bool)
_SANE_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")
_REALM: Final = 'Bearer realm="code-sessions"'
# The status phrases of some codes changed between Python versions (3.13 renamed 413, 416, 422), these must not.
_STABLE: Final = {
    400: ("invalid-request", "The request is not valid"),
    404: ("not-found", "No such thing"),
    405: ("method-not-allowed", "The method is not allowed here"),
    413: ("payload-too-large", "The request body is too large"),
    414: ("uri-too-long", "The URL is too long"),
    415: ("unsupported-media-type", "The request body is not JSON"),
    416: ("range-not-satisfiable", "The range cannot be satisfied"),
    422: ("unprocessable-content", "The request cannot be processed"),
    500: ("internal-error", "Something went wrong on our side"),
    503: ("unavailable", "Temporarily unavailable"),
}
# Of an HTTPException's headers, those about its plain-text body.
_BODY_HEADERS: Final = {"content-type", "content-length", "content-encoding", "transfer-encoding"}

_log = structlog.get_logger(__name__)


def request_id(request: web.BaseRequest) -> str:
    """The id of this request in answers and logs: the caller's `X-Request-Id` when it is sane, else one of ours."""
    known = request.get(_REQUEST_ID_KEY)
    if known is None:
        given = request.headers.get(REQUEST_ID, "")
        known = given if _SANE_REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        request[_REQUEST_ID_KEY] = known
    return known


def problem_response(
    request: web.BaseRequest,
    *,
    status: int,
    code: str,
    title: str,
    detail: str,
    members: Mapping[str, object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """A problem document. `members` in snake_case become camelCase ones; the standard ones win."""
    document = {_camel(name): value for name, value in (members or {}).items()}
    document |= {
        "type": TYPE_PREFIX + code,
        "title": title,
        "status": status,
        "detail": detail,
        "code": code,
        "requestId": request_id(request),
    }
    # Text of the caller's may stand in the detail, lone surrogates too, which no UTF-8 can carry.
    body = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    answer = web.Response(status=status, body=body, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE, **(headers or {})})
    _add_common_headers(request, answer)
    return answer


def error_response(request: web.BaseRequest, error: OrchestratorError) -> web.Response:
    """A domain error's problem document with the headers that its kind wants."""
    headers: dict[str, str] = {}
    if isinstance(error, Unauthenticated):
        headers[hdrs.WWW_AUTHENTICATE] = _REALM
    elif isinstance(error, InsufficientScope):
        scope = error.facts.get("required_scope", "")
        headers[hdrs.WWW_AUTHENTICATE] = f'{_REALM}, error="insufficient_scope", scope="{scope}"'
    retry_after_s = error.facts.get("retry_after_s")
    if retry_after_s is None and isinstance(error, Unavailable):
        retry_after_s = error.retry_after_s
    if retry_after_s is not None:
        headers[hdrs.RETRY_AFTER] = str(retry_after_s)
    return problem_response(
        request,
        status=error.status,
        code=error.code,
        title=error.title,
        detail=error.detail,
        members=error.facts,
        headers=headers,
    )


def http_error_response(request: web.BaseRequest, error: web.HTTPException) -> web.Response:
    """The problem document for one of aiohttp's own errors. Its headers (`Allow`) are kept."""
    detail = _http_detail(request, error)
    code, title = _code_and_title(error.status)
    kept = {str(name): value for name, value in error.headers.items() if name.lower() not in _BODY_HEADERS}
    return problem_response(request, status=error.status, code=code, title=title, detail=detail, headers=kept)


def unexpected_response(request: web.BaseRequest, error: BaseException | None) -> web.Response:
    """500 for what nobody foresaw: the log has the traceback, the caller an id to ask about."""
    _log.error(
        "unexpected error", request_id=request_id(request), method=request.method, path=request.path, exc_info=error
    )
    detail = "The request failed for a reason that is not the caller's. Its requestId stands in the server's log."
    code, title = _STABLE[500]
    return problem_response(request, status=500, code=code, title=title, detail=detail)


@web.middleware
async def problem_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost middleware. Cancellation, redirects and a client that has gone pass through."""
    structlog.contextvars.bind_contextvars(request_id=request_id(request))
    return await answer_or_problem(request, handler)


async def answer_or_problem(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Run `handler`; what it raises becomes a problem document, as long as no answer has begun.

    Once it has, only breaking the connection off tells the client that the answer is not whole.
    """
    try:
        answer = await handler(request)
        if not isinstance(answer, web.StreamResponse):
            raise TypeError(f"a handler gave {type(answer).__name__} instead of a response")  # noqa: TRY301
    except web.HTTPException as error:
        if error.status < HTTPStatus.BAD_REQUEST:
            raise
        if request.get(_STARTED_KEY):
            raise ConnectionResetError("the answer had begun") from error
        return http_error_response(request, error)
    except Exception as error:
        if client_has_gone(request) and isinstance(error, ConnectionError):
            raise
        if request.get(_STARTED_KEY):
            _log.error("answer broken off", path=request.path, exc_info=not _is_expected(error))
            raise
        return _problem_of(request, error)
    return answer


def _problem_of(request: web.Request, error: Exception) -> web.Response:
    if isinstance(error, OrchestratorError):
        return error_response(request, error)
    if isinstance(error, RedisError) and is_unavailable(error):
        _log.warning("store unavailable", path=request.path, reason=str(error))
        return error_response(request, store_unavailable(error))
    return unexpected_response(request, error)


def _is_expected(error: Exception) -> bool:
    return isinstance(error, OrchestratorError) or is_unavailable(error)


def client_has_gone(request: web.BaseRequest) -> bool:
    """Whether nobody is there any more to answer to."""
    return request.transport is None or request.transport.is_closing()


async def prepare_answer(request: web.Request, answer: web.StreamResponse) -> None:
    """For `app.on_response_prepare`: the headers of every answer, streams and WebSockets included."""
    _add_common_headers(request, answer)
    request[_STARTED_KEY] = True


def setup_problems(app: web.Application) -> None:
    """Install the middleware, outermost of those there are, and the headers of every answer."""
    app.middlewares.insert(0, problem_middleware)
    app.on_response_prepare.append(prepare_answer)


def _add_common_headers(request: web.BaseRequest, answer: web.StreamResponse) -> None:
    answer.headers[REQUEST_ID] = request_id(request)
    answer.headers.setdefault("X-Content-Type-Options", "nosniff")
    answer.headers.setdefault(hdrs.CACHE_CONTROL, "no-store")


def _http_detail(request: web.BaseRequest, error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPMethodNotAllowed):
        return f"{request.method} is not allowed here; {error.headers.get(hdrs.ALLOW, 'nothing')} is."
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        # The class keeps both numbers only in its text.
        return error.text or error.reason
    if error.status == HTTPStatus.NOT_FOUND:
        return f"There is nothing at {request.path}."
    return error.text if error.text and "<" not in error.text else error.reason


def _code_and_title(status: int) -> tuple[str, str]:
    if status in _STABLE:
        return _STABLE[status]
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = f"Error {status}"
    return phrase.lower().replace(" ", "-").replace("'", ""), phrase


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(part.capitalize() for part in others)
