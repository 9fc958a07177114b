"""The gateway: an HTTP server of its own origin that leads each application's host name to what runs there.

Applications are untrusted, and so are their visitors: hop-by-hop headers end here, bodies stream both ways without
being kept, and a folder is never left, neither through a path nor through a link.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, MultiMapping
from redis.exceptions import RedisError
from yarl import URL

from deploy_pipeline.gateway_pages import page, serve_static
from deploy_pipeline.routing import CHANGED, HttpTarget, Route, Routes, StaticTarget, StoppedTarget
from deploy_pipeline.tasks import end_task, is_cancelled

if TYPE_CHECKING:
    from redis.asyncio import Redis

_CACHE_S: Final = 1.0  # how long a lookup is trusted: a swapped-out release has to live on for longer than this
_CACHE_ENTRIES: Final = 10_000
_CHANNEL_S: Final = 2.0  # less than the client's socket timeout
_CONNECT_S: Final = 5.0
_SILENCE_S: Final = 120.0  # without a piece of the request or the beginning of the answer
# Below what servers usually keep idle connections for (gunicorn: 2 s, uvicorn and Node: 5 s): a request that is not to
# be repeated must not meet a connection in the moment in which it is being closed.
_IDLE_S: Final = 1.0
_NOT_FOR_PROXIES: Final = frozenset({"CONNECT", "TRACE"})
# RFC 6455 7.4.1: said of a connection, never on it.
_NOT_ON_THE_WIRE: Final = frozenset({1004, 1005, 1006, 1015})
ASK_PATH: Final = "/.code-sessions/tls-ask"
_PIECE_BYTES: Final = 64 * 1024
_MESSAGE_BYTES: Final = 16 * 1024 * 1024  # one WebSocket message
# RFC 9110 7.6.1, and what belongs to the connection by custom
_HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_FORWARDED: Final = frozenset({"forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip"})
_WEBSOCKET: Final = frozenset(
    {"sec-websocket-key", "sec-websocket-version", "sec-websocket-extensions", "sec-websocket-protocol"}
)


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    app_url_template: str = ""  # with "{app}" where the application's name goes
    # Who may say where a request came from, in X-Forwarded-*: a proxy of the operator's in front of the gateway.
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()


def build_gateway(redis: "Redis", config: GatewayConfig | None = None) -> web.Application:
    """An aiohttp application that serves every application in the route table, by the first label of `Host`."""
    app = web.Application(client_max_size=0, handler_args={"auto_decompress": False})
    gateway = Gateway(redis, config or GatewayConfig())
    app.router.add_get(ASK_PATH, gateway.ask)
    app.router.add_route("*", "/{path:.*}", gateway.handle)
    app.cleanup_ctx.append(gateway.client)
    app.cleanup_ctx.append(gateway.news)
    return app


class Gateway:
    """Looks up, and proxies or serves. `session` is there while the application runs."""

    session: aiohttp.ClientSession

    def __init__(self, redis: "Redis", config: GatewayConfig) -> None:
        self._redis, self._routes, self._config = redis, Routes(redis), config
        self._cache: dict[str, tuple[float, Route | None]] = {}

    async def client(self, _app: web.Application) -> AsyncIterator[None]:
        """The connections to the applications, open while the gateway runs."""
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=5, keepalive_timeout=_IDLE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        ) as session:
            self.session = session
            yield

    async def news(self, _app: web.Application) -> AsyncIterator[None]:
        """Routes that change are looked up again at once, while the gateway runs and the store can be reached."""
        listening = asyncio.create_task(self._listen())
        yield
        await end_task(listening)

    async def _listen(self) -> None:
        while not is_cancelled():
            with contextlib.suppress(RedisError, OSError):  # lookups are not trusted for long anyway
                async with self._redis.pubsub() as channel:
                    await channel.subscribe(CHANGED)
                    while not is_cancelled():
                        message = await channel.get_message(ignore_subscribe_messages=True, timeout=_CHANNEL_S)
                        if message is not None:
                            self._cache.pop(str(message["data"], "utf-8"), None)
            await asyncio.sleep(_CACHE_S)

    async def ask(self, request: web.Request) -> web.StreamResponse:
        """For a TLS proxy that gets certificates on demand: 200 when `?domain=` is an application's host name."""
        domain = request.query.get("domain", "").lower().rstrip(".")
        host = urlsplit(self._config.app_url_template.replace("{app}", "app-name")).hostname or ""
        name, _, parent = domain.partition(".")
        known = bool(name) and f".{parent}" == host.removeprefix("app-name")
        try:
            route = await self._route(name) if known else None
        except (RedisError, OSError):
            return web.Response(status=503)
        return web.Response(status=200 if route is not None else 404)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        name = request.host.partition(":")[0].partition(".")[0].lower()
        if request.method in _NOT_FOR_PROXIES:
            return page(request, 405, "Not allowed", "This method is not for applications.")
        try:
            route = await self._route(name)
        except (RedisError, OSError):
            return page(request, 503, "Not available right now", "The gateway cannot look up where this leads.")
        if route is None:
            return page(request, 404, "No application here", "Nothing is deployed under this name.")
        if isinstance(route.target, StoppedTarget):
            return page(request, 503, "Stopped", "This application was stopped by its owner.")
        if isinstance(route.target, StaticTarget):
            return await asyncio.to_thread(serve_static, request, Path(route.target.root))
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._websocket(request, route.target)
        return await self._proxy(request, name, route.target)

    async def _route(self, name: str) -> Route | None:
        now = time.monotonic()
        known = self._cache.get(name)
        if known is not None and now - known[0] < _CACHE_S:
            return known[1]
        route = await self._routes.get(name)
        if len(self._cache) >= _CACHE_ENTRIES:
            self._cache.clear()  # host names are the visitors' choice: bounded, whatever they send
        self._cache[name] = (now, route)
        return route

    async def _proxy(self, request: web.Request, name: str, target: HttpTarget) -> web.StreamResponse:
        try:
            try:
                upstream = await self._send(request, target)
            except aiohttp.ClientConnectorError:
                # Nothing was sent yet. A release that was started again a moment ago listens elsewhere.
                moved = await self._moved(name, target)
                if moved is None:
                    raise
                upstream = await self._send(request, moved)
        except TimeoutError:
            return page(request, 504, "No answer", "The application did not answer in time.")
        except aiohttp.ClientConnectorError:
            return page(request, 503, "Not running", "The application does not accept connections right now.")
        except aiohttp.ClientError:
            return page(request, 502, "Bad answer", "The application closed the connection without a valid answer.")
        async with upstream:
            return await _pass_on(request, upstream)

    async def _send(self, request: web.Request, target: HttpTarget) -> aiohttp.ClientResponse:
        headers = self._request_headers(request)
        if request.content_length is not None:
            headers["Content-Length"] = str(request.content_length)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_SILENCE_S) as silence:

            async def body() -> AsyncIterator[bytes]:
                async for piece in request.content.iter_chunked(_PIECE_BYTES):
                    silence.reschedule(loop.time() + _SILENCE_S)
                    yield piece

            return await self.session.request(
                request.method,
                _url(request, target),
                headers=headers,
                data=body() if request.body_exists else None,
                allow_redirects=False,
            )

    async def _moved(self, name: str, target: HttpTarget) -> HttpTarget | None:
        self._cache.pop(name, None)
        try:
            route = await self._route(name)
        except (RedisError, OSError):
            return None
        found = route.target if route is not None else None
        return found if isinstance(found, HttpTarget) and found != target else None

    async def _websocket(self, request: web.Request, target: HttpTarget) -> web.StreamResponse:
        protocols = [part.strip() for part in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if part]
        headers = self._request_headers(request, also_without=_WEBSOCKET)
        try:
            async with asyncio.timeout(_SILENCE_S):
                upstream = await self.session.ws_connect(
                    _url(request, target),
                    headers=headers,
                    protocols=protocols,
                    max_msg_size=_MESSAGE_BYTES,
                    autoping=False,
                )
        except aiohttp.WSServerHandshakeError as error:
            status = error.status if error.status >= HTTPStatus.BAD_REQUEST else HTTPStatus.BAD_GATEWAY
            return page(request, status, "No WebSocket", "The application refused the WebSocket.")
        except (aiohttp.ClientError, TimeoutError):
            return page(request, 502, "No WebSocket", "The application did not accept the WebSocket.")
        async with upstream:
            chosen = [upstream.protocol] if upstream.protocol else []
            visitor = web.WebSocketResponse(protocols=chosen, max_msg_size=_MESSAGE_BYTES, autoping=False)
            await visitor.prepare(request)
            await _join(visitor, upstream)
            return visitor

    def _request_headers(self, request: web.Request, also_without: frozenset[str] = frozenset()) -> CIMultiDict[str]:
        left_out = _HOP_BY_HOP | _FORWARDED | {"content-length", "expect"} | also_without
        headers = _without(request.headers, left_out | _named_by_connection(request.headers))
        peer, told = request.remote or "", request.headers
        trusted = self._trusts(peer)
        earlier = told.getall("X-Forwarded-For", []) if trusted else []
        proto = told.get("X-Forwarded-Proto", "").lower() if trusted else ""
        headers["X-Forwarded-For"] = ", ".join([*earlier, peer])
        headers["X-Forwarded-Host"] = request.host
        headers["X-Forwarded-Proto"] = proto if proto in {"http", "https"} else request.scheme
        return headers

    def _trusts(self, peer: str) -> bool:
        if not self._config.trusted_proxies:
            return False
        try:
            address = ip_address(peer)
        except ValueError:
            return False
        return any(address in network for network in self._config.trusted_proxies)


async def _join(visitor: web.WebSocketResponse, upstream: "aiohttp.ClientWebSocketResponse") -> None:
    """Pass messages both ways until one side ends; then end the other one with the same code."""
    directions = [
        asyncio.create_task(_pump(visitor, upstream)),
        asyncio.create_task(_pump(upstream, visitor)),
    ]
    try:
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for direction in directions:
            direction.cancel()
        await asyncio.gather(*directions, return_exceptions=True)
    await visitor.close(code=_on_the_wire(upstream.close_code))
    await upstream.close(code=_on_the_wire(visitor.close_code))


def _on_the_wire(code: int | None) -> int:
    """A side that was cut off, as by the end of an old release, has no code of its own."""
    return aiohttp.WSCloseCode.GOING_AWAY if code is None or code in _NOT_ON_THE_WIRE else code


async def _pump(
    source: "web.WebSocketResponse | aiohttp.ClientWebSocketResponse",
    sink: "web.WebSocketResponse | aiohttp.ClientWebSocketResponse",
) -> None:
    async for message in source:
        if message.type is aiohttp.WSMsgType.TEXT:
            await sink.send_str(message.data)
        elif message.type is aiohttp.WSMsgType.BINARY:
            await sink.send_bytes(message.data)
        elif message.type is aiohttp.WSMsgType.PING:
            await sink.ping(message.data)
        elif message.type is aiohttp.WSMsgType.PONG:
            await sink.pong(message.data)


async def _pass_on(request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
    response.headers.clear()
    response.headers.extend(_without(upstream.headers, _HOP_BY_HOP | _named_by_connection(upstream.headers)))
    if "Content-Type" not in upstream.headers:
        response.headers["Content-Type"] = "application/octet-stream"
    await response.prepare(request)
    try:
        if request.method != "HEAD":
            async for piece in upstream.content.iter_any():
                await response.write(piece)
        await response.write_eof()
    except (aiohttp.ClientError, TimeoutError):
        # The status is sent already: an honest end is to cut the connection, so that nobody takes it for complete.
        if request.transport is not None:
            request.transport.abort()
    except ConnectionError:
        pass  # the visitor left; closing `upstream` tells the application
    return response


def _url(request: web.Request, target: HttpTarget) -> URL:
    """The path and query exactly as they came."""
    path = request.raw_path if request.raw_path.startswith("/") else request.rel_url.raw_path_qs
    host = f"[{target.host}]" if ":" in target.host else target.host
    return URL(f"http://{host}:{target.port}{path}", encoded=True)


def _without(headers: MultiMapping[str], names: frozenset[str]) -> CIMultiDict[str]:
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in names)


def _named_by_connection(headers: MultiMapping[str]) -> frozenset[str]:
    """What the `Connection` header names is for this hop only (RFC 9110 7.6.1)."""
    named = headers.getall("Connection", [])
    return frozenset(part.strip().lower() for value in named for part in value.split(","))
