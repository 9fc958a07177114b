"""The gateway: an HTTP server of its own origin that leads each application's host name to what runs there.

Applications are untrusted, and so are their visitors: hop-by-hop headers end here, bodies stream both ways without
being kept, and a folder is never left, neither through a path nor through a link.
"""

import asyncio
import contextlib
import html
import mimetypes
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, MultiMapping
from redis.exceptions import RedisError
from yarl import URL

from deploy_pipeline.routing import CHANGED, HttpTarget, Route, Routes, StaticTarget, StoppedTarget
from deploy_pipeline.tasks import end_task, is_cancelled

if TYPE_CHECKING:
    from redis.asyncio import Redis

_CACHE_S: Final = 1.0  # how long a lookup is trusted: a swapped-out release has to live on for longer than this
_CACHE_ENTRIES: Final = 10_000
_CHANNEL_S: Final = 2.0  # less than the client's socket timeout
_CONNECT_S: Final = 5.0
_FIRST_BYTE_S: Final = 120.0
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


def build_gateway(redis: "Redis") -> web.Application:
    """An aiohttp application that serves every application in the route table, by the first label of `Host`."""
    app = web.Application(client_max_size=0, handler_args={"auto_decompress": False})
    gateway = Gateway(redis)
    app.router.add_route("*", "/{path:.*}", gateway.handle)
    app.cleanup_ctx.append(gateway.client)
    app.cleanup_ctx.append(gateway.news)
    return app


class Gateway:
    """Looks up, and proxies or serves. `session` is there while the application runs."""

    session: aiohttp.ClientSession

    def __init__(self, redis: "Redis") -> None:
        self._redis, self._routes = redis, Routes(redis)
        self._cache: dict[str, tuple[float, Route | None]] = {}

    async def client(self, _app: web.Application) -> AsyncIterator[None]:
        """The connections to the applications, open while the gateway runs."""
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=5),
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

    async def handle(self, request: web.Request) -> web.StreamResponse:
        name = request.host.partition(":")[0].partition(".")[0].lower()
        try:
            route = await self._route(name)
        except (RedisError, OSError):
            return _page(request, 503, "Not available right now", "The gateway cannot look up where this leads.")
        if route is None:
            return _page(request, 404, "No application here", "Nothing is deployed under this name.")
        if isinstance(route.target, StoppedTarget):
            return _page(request, 503, "Stopped", "This application was stopped by its owner.")
        if isinstance(route.target, StaticTarget):
            return await asyncio.to_thread(_static, request, Path(route.target.root))
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._websocket(request, route.target)
        return await self._proxy(request, route.target)

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

    async def _proxy(self, request: web.Request, target: HttpTarget) -> web.StreamResponse:
        body = request.content.iter_chunked(_PIECE_BYTES) if request.body_exists else None
        headers = _request_headers(request)
        if request.content_length is not None:
            headers["Content-Length"] = str(request.content_length)
        try:
            async with asyncio.timeout(_FIRST_BYTE_S):
                upstream = await self.session.request(
                    request.method, _url(request, target), headers=headers, data=body, allow_redirects=False
                )
        except TimeoutError:
            return _page(request, 504, "No answer", "The application did not answer in time.")
        except aiohttp.ClientConnectorError:
            return _page(request, 503, "Not running", "The application does not accept connections right now.")
        except aiohttp.ClientError:
            return _page(request, 502, "Bad answer", "The application closed the connection without a valid answer.")
        async with upstream:
            return await _pass_on(request, upstream)

    async def _websocket(self, request: web.Request, target: HttpTarget) -> web.StreamResponse:
        protocols = [part.strip() for part in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if part]
        headers = _request_headers(request, also_without=_WEBSOCKET)
        try:
            upstream = await self.session.ws_connect(
                _url(request, target), headers=headers, protocols=protocols, max_msg_size=_MESSAGE_BYTES, autoping=False
            )
        except aiohttp.WSServerHandshakeError as error:
            return _page(request, error.status or 502, "No WebSocket", "The application refused the WebSocket.")
        except (aiohttp.ClientError, TimeoutError):
            return _page(request, 502, "No WebSocket", "The application did not accept the WebSocket.")
        async with upstream:
            chosen = [upstream.protocol] if upstream.protocol else []
            visitor = web.WebSocketResponse(protocols=chosen, max_msg_size=_MESSAGE_BYTES, autoping=False)
            await visitor.prepare(request)
            await _join(visitor, upstream)
            return visitor


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
    await visitor.close(code=upstream.close_code or aiohttp.WSCloseCode.GOING_AWAY)
    await upstream.close(code=visitor.close_code or aiohttp.WSCloseCode.GOING_AWAY)


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


def _request_headers(request: web.Request, also_without: frozenset[str] = frozenset()) -> CIMultiDict[str]:
    left_out = _HOP_BY_HOP | _FORWARDED | {"content-length", "expect"} | also_without
    headers = _without(request.headers, left_out | _named_by_connection(request.headers))
    headers["X-Forwarded-For"] = request.remote or ""
    headers["X-Forwarded-Host"] = request.host
    headers["X-Forwarded-Proto"] = request.scheme
    return headers


def _without(headers: MultiMapping[str], names: frozenset[str]) -> CIMultiDict[str]:
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in names)


def _named_by_connection(headers: MultiMapping[str]) -> frozenset[str]:
    """What the `Connection` header names is for this hop only (RFC 9110 7.6.1)."""
    named = headers.getall("Connection", [])
    return frozenset(part.strip().lower() for value in named for part in value.split(","))


def _static(request: web.Request, root: Path) -> web.StreamResponse:
    if request.method not in {"GET", "HEAD"}:
        response = _page(request, 405, "Not allowed", "This is a static site: it can only be read.")
        response.headers["Allow"] = "GET, HEAD"
        return response
    path = unquote(request.raw_path.partition("?")[0])
    found = _inside(root, path)
    if found is not None and found.is_dir():
        if not path.endswith("/"):
            # One slash in front, whatever the path began with: "//host" would lead the visitor elsewhere.
            place = "/" + request.rel_url.raw_path.strip("/") + "/"
            return web.Response(status=308, headers={"Location": place})
        found = _inside(root, path + "index.html")
    if found is not None and found.is_file():
        return web.FileResponse(found, headers={"Cache-Control": "no-cache", **_text_type(found)})
    missing = _inside(root, "404.html")
    if missing is not None and missing.is_file():
        return web.Response(status=404, body=missing.read_bytes(), content_type="text/html", charset="utf-8")
    return _page(request, 404, "Not found", "This site has no such page.")


def _text_type(file: Path) -> dict[str, str]:
    """The type of a text with its charset, as Caddy gives it in containers: without one, browsers take a page that does
    not say its own for windows-1252. Other types are FileResponse's to find.
    """
    kind, encoding = mimetypes.guess_type(file.name)
    is_text = kind is not None and encoding is None and (kind.startswith("text/") or kind == "application/javascript")
    return {"Content-Type": f"{kind}; charset=utf-8"} if is_text else {}


def _inside(root: Path, path: str) -> Path | None:
    """The file or folder below `root`; None for dot files, for what is not there, and for what leads out."""
    parts = [part for part in path.split("/") if part]
    if any(part.startswith(".") or "\0" in part for part in parts):
        return None
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a name too long, a loop of links
        real = root.joinpath(*parts).resolve(strict=True)
        inside = real.relative_to(root.resolve())
        if not any(part.startswith(".") for part in inside.parts):
            return real
    return None


def _page(request: web.Request, status: int, title: str, text: str) -> web.Response:
    host = html.escape(request.host)
    body = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width"><body style="font:1rem/1.5 system-ui;margin:15vh auto;'
        f'max-width:36rem;padding:0 1rem"><h1>{title}</h1><p>{text}</p><p><small>{status} · {host}</small></p>'
    )
    headers = {"Cache-Control": "no-store"}
    if status in {502, 503, 504}:
        headers["Retry-After"] = "2"
    return web.Response(status=status, text=body, content_type="text/html", headers=headers)
