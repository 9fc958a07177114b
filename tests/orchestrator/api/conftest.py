"""A real server with a few handlers of every kind, reached over TCP."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import aiohttp
import pytest_asyncio
from aiohttp import web
from pydantic import Field
from redis import exceptions as redis_errors

from orchestrator.access.keys import KeyStore
from orchestrator.access.rate_limit import RateLimiter
from orchestrator.access.scopes import Scope
from orchestrator.api.auth import public, require_scope, setup_auth
from orchestrator.api.body import ApiModel, QueryModel, json_response, query, read_body
from orchestrator.api.health import health_routes
from orchestrator.api.problems import setup_problems
from orchestrator.api.runner import ProblemAppRunner
from orchestrator.errors import RateLimited, RuntimeUnavailable, SessionNotFound

MAX_BYTES = 64 * 1024


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Inner(ApiModel):
    deep_name: str


class Item(ApiModel):
    project_name: Annotated[str, Field(min_length=1, max_length=100)]
    count: int = 0
    ratio: float = 0.0
    flag: bool = False
    colour: Colour = Colour.RED
    inner: Inner | None = None
    labels: Annotated[dict[str, str], Field(default_factory=dict)]
    tags: Annotated[list[str], Field(default_factory=list)]


class Options(ApiModel):
    force: bool = False


class Page(QueryModel):
    after_seq: Annotated[int, Field(ge=0)] | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    wait: Annotated[float, Field(ge=0, le=60)] = 0
    verbose: bool = False
    colour: Colour | None = None


@dataclass
class Server:
    """A running server and a client of it."""

    port: int
    client: aiohttp.ClientSession
    keys: KeyStore
    app: web.Application

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def call(self, method: str, path: str, **options) -> tuple[aiohttp.ClientResponse, dict]:
        async with self.client.request(method, self.url(path), **options) as answer:
            body = await answer.read()
        return answer, json.loads(body) if body else {}

    async def raw(self, *pieces: bytes) -> tuple[bytes, dict, dict]:
        """Send bytes on a connection of their own; status line, headers (lower case) and JSON of the answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.02)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            status, *lines = head.decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines if line)
            body = await asyncio.wait_for(reader.readexactly(int(headers["content-length"])), 5)
        finally:
            writer.close()
        return status.encode(), headers, json.loads(body)


def is_problem(answer: aiohttp.ClientResponse, document: dict, status: int, code: str) -> bool:
    """Whether this is the contract's error document; asserts each of its parts."""
    assert answer.status == status, document
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert document["status"] == status
    assert document["code"] == code, document
    assert document["type"] == f"urn:code-sessions:problem:{code}"
    assert document["title"]
    assert document["detail"]
    assert document["requestId"] == answer.headers["X-Request-Id"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    return True


@public
async def _items(request):
    return json_response(await read_body(request, Item))


@public
async def _options(request):
    return json_response(await read_body(request, Options, allow_empty=True))


@public
async def _page(request):
    page = query(request, Page)
    return json_response(page)


@public
async def _fail(request):
    failures = {
        "domain": SessionNotFound("There is no session cs_a.", session_id="cs_a"),
        "quota": RateLimited("10 sessions are running.", limit_name="sessions", limit=10, retry_after_s=7),
        "runtime": RuntimeUnavailable("The engine does not answer."),
        "redis": redis_errors.ConnectionError("Error 111 connecting to secret-host:6379"),
        "misconf": redis_errors.ResponseError("MISCONF cannot persist"),
        "wrongtype": redis_errors.ResponseError("WRONGTYPE Operation against a key"),
        "bug": KeyError("secret-of-ours"),
        "reset": ConnectionResetError("an engine hung up"),
        "timeout": TimeoutError(),
        "406": web.HTTPNotAcceptable(),
        "416": web.HTTPRequestRangeNotSatisfiable(),
        "426": web.HTTPUpgradeRequired(),
        "503": web.HTTPServiceUnavailable(),
        "html": web.HTTPBadRequest(text="<h1>no</h1>"),
        "redirect": web.HTTPFound("/elsewhere"),
    }
    if request.match_info["how"] == "nothing":
        return
    raise failures[request.match_info["how"]]


@public
async def _stream(request):
    answer = web.StreamResponse()
    await answer.prepare(request)
    await answer.write(b"begun")
    raise web.HTTPBadRequest if "http" in request.query else KeyError("after the headers")


async def _read(request):
    key = require_scope(request, Scope.READ)
    return json_response({"organizationId": key.organization_id})


async def _socket(request):
    require_scope(request, Scope.READ)
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    await socket.close()
    return socket


@pytest_asyncio.fixture
async def server(redis) -> AsyncIterator[Server]:
    keys = KeyStore(redis)
    app = web.Application(client_max_size=MAX_BYTES)
    setup_problems(app)
    setup_auth(app, keys, RateLimiter(redis, 5))
    app.add_routes(
        [
            web.post("/items", _items),
            web.post("/options", _options),
            web.get("/page", _page),
            web.get("/fail/{how}", _fail),
            web.get("/stream", _stream),
            web.get("/api/v1/read", _read),
            web.get("/api/v1/socket", _socket),
            *health_routes({"redis": redis.ping}),
        ]
    )
    runner = ProblemAppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession() as client:
        yield Server(port, client, keys, app)
    await runner.cleanup()
