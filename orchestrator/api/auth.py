"""Who calls: the key of each request, its scopes and its rate.

Every route needs a key unless its handler is marked `@public`: who forgets is refused, not let in. Unknown paths and
wrong methods are 404 and 405 also without a key: the routes are no secret (the OpenAPI document lists them), and a
client with a wrong URL should learn that first.
"""

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from aiohttp import hdrs, web

from orchestrator.access.keys import ApiKey, KeyStore
from orchestrator.access.rate_limit import RateLimit, RateLimiter
from orchestrator.access.scopes import Scope
from orchestrator.errors import InsufficientScope, InvalidRequest, Unauthenticated

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
AnyHandler = TypeVar("AnyHandler", bound=Callable[..., Awaitable[web.StreamResponse]])

KEYS: Final = web.AppKey("keys", KeyStore)
RATE_LIMITER: Final = web.AppKey("rate_limiter", RateLimiter)
API_KEY_HEADER: Final = "X-API-Key"
_CALLER: Final = web.RequestKey("caller", ApiKey)
_RATE: Final = web.RequestKey("rate", RateLimit)
_PUBLIC: Final = "__code_sessions_public__"


def setup_auth(app: web.Application, keys: KeyStore, limiter: RateLimiter) -> None:
    """Install the middleware, inside of those there are. Call it after `setup_problems`."""
    app[KEYS], app[RATE_LIMITER] = keys, limiter
    app.middlewares.append(auth_middleware)
    app.on_response_prepare.append(_add_rate_headers)


def public(handler: AnyHandler) -> AnyHandler:
    """Mark a handler that needs no key, or that checks its callers itself (the sidecars' link)."""
    setattr(handler, _PUBLIC, True)
    return handler


@web.middleware
async def auth_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Authenticate and count the request before its handler runs.

    Raises:
        Unauthenticated, InvalidRequest: see `authenticate`.
        RateLimited: the key's requests of this minute are used up.
    """
    match = request.match_info
    if match.http_exception is None and not getattr(match.handler, _PUBLIC, False):
        await authenticate(request)
    return await handler(request)


async def authenticate(request: web.Request) -> ApiKey:
    """The key of this request, which is counted against its rate. For public handlers that want to know their caller.

    Raises:
        Unauthenticated: no key, or one that opens nothing.
        InvalidRequest: several keys that differ.
        RateLimited: the key's requests of this minute are used up.
    """
    key = await request.app[KEYS].authenticate(_secret(request))
    act_as(request, key)
    rate = await request.app[RATE_LIMITER].hit(key)
    if rate is not None:
        request[_RATE] = rate
        if not rate.allowed:
            raise rate.exceeded()
    return key


def act_as(request: web.Request, key: ApiKey) -> None:
    """From here on the request is this key's."""
    request[_CALLER] = key


def caller(request: web.Request) -> ApiKey:
    """The key of a request that was authenticated."""
    key: ApiKey | None = request.get(_CALLER)
    assert key is not None, "a public handler has no caller"
    return key


def require_scope(request: web.Request, scope: Scope) -> ApiKey:
    """The caller's key, which has this scope.

    Raises:
        InsufficientScope: it has not; the detail and `facts["required_scope"]` name it.
    """
    key = caller(request)
    if scope not in key.scopes:
        raise InsufficientScope(f"This call needs the scope {scope.value}.", required_scope=scope.value)
    return key


def _secret(request: web.Request) -> str:
    given = list(request.headers.getall(API_KEY_HEADER, []))
    other_scheme = False
    for value in request.headers.getall(hdrs.AUTHORIZATION, []):
        scheme, _, token = value.strip().partition(" ")
        if scheme.lower() == "bearer":
            given.append(token.strip())
        else:
            other_scheme = True
    if not given:
        hint = " (Authorization is understood with Bearer only)" if other_scheme else ""
        raise Unauthenticated(f"Send an API key as {API_KEY_HEADER} or as Authorization: Bearer{hint}.")
    if len(set(given)) > 1:
        # RFC 6750 3.1: more than one way to authenticate is an invalid request. Whoever merges headers would
        # otherwise act as somebody else without noticing.
        raise InvalidRequest(f"{API_KEY_HEADER} and Authorization: the request carries API keys that differ.")
    return str(given[0])


async def _add_rate_headers(request: web.Request, answer: web.StreamResponse) -> None:
    rate = request.get(_RATE)
    if rate is not None:
        answer.headers["RateLimit-Limit"] = str(rate.limit)
        answer.headers["RateLimit-Remaining"] = str(rate.remaining)
        answer.headers["RateLimit-Reset"] = str(rate.reset_s)
