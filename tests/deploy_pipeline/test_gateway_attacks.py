"""What hostile or clumsy visitors and applications send, byte for byte."""

import asyncio
from contextlib import asynccontextmanager
from ipaddress import ip_network

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from deploy_pipeline import gateway as gateway_module
from deploy_pipeline.gateway import ASK_PATH, GatewayConfig, build_gateway
from deploy_pipeline.routing import HttpTarget, Route, Routes, StoppedTarget

HOST = {"Host": "site-1.localhost:8080"}


async def route_to(redis, target, token=1):
    return await Routes(redis).set("site-1", Route(app_id="app_1", deployment_id="dep_1", target=target), token=token)


class Upstream:
    """An application that keeps every byte it gets, and answers each request that it can make out."""

    def __init__(self):
        self.received, self.requests = b"", []

    async def serve(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.received += head
                self.requests.append(head.split(b"\r\n")[0])
                lowered = head.lower()
                if b"transfer-encoding: chunked" in lowered:
                    while (size := int((await reader.readline()).strip() or b"0", 16)) > 0:
                        self.received += await reader.readexactly(size + 2)
                    await reader.readline()
                elif b"content-length:" in lowered:
                    length = int(lowered.split(b"content-length:")[1].split(b"\r\n")[0])
                    self.received += await reader.readexactly(length)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def upstream(redis):
    seen = Upstream()
    async with await asyncio.start_server(seen.serve, "127.0.0.1", 0) as server:
        await route_to(redis, HttpTarget(host="127.0.0.1", port=server.sockets[0].getsockname()[1]))
        yield seen


async def raw(gateway, data):
    """Send bytes as they are; what comes back until the gateway closes, or has nothing more to say."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(data)
    answer = b""
    try:
        async with asyncio.timeout(1.5):
            while piece := await reader.read(65536):
                answer += piece
    except (TimeoutError, ConnectionError):
        pass
    writer.close()
    return answer


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: site-1.x\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 6\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 6",
        b"Content-Length: 0\r\nContent-Length: 43",
        b"Content-Length: 43, 0",
        b"Content-Length: +43",
        b"Content-Length: 0x2b",
        b"Content-Length: -1",
        b"Content-Length : 43",
        b"Content-Length: 43\r\nContent-Length: 43\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding:\x0bchunked",
        b"Transfer-Encoding: \x00chunked",
        b" Transfer-Encoding: chunked",
        b"X: y\r\n Transfer-Encoding: chunked",
        b"X: y\nTransfer-Encoding: chunked",
        b"Host: other.x",
        b"Bad Name: x",
        b"X: a\rb",
    ],
    ids=repr,
)
async def test_a_request_whose_end_is_not_clear_is_refused_and_nothing_of_it_arrives_as_another_one(
    gateway, upstream, head
):
    answer = await raw(gateway, b"POST / HTTP/1.1\r\nHost: site-1.x\r\n" + head + b"\r\n\r\n0\r\n\r\n" + SMUGGLED)
    assert b"/smuggled" not in b" ".join(upstream.requests) or answer.count(b"HTTP/1.1 200") == 2, (
        "the application saw a request that the gateway did not"
    )
    assert len(upstream.requests) <= answer.count(b"HTTP/1.1 "), "it saw more requests than were answered"
    for line in upstream.received.lower().split(b"\r\n"):
        assert line not in {b"transfer-encoding: xchunked", b"transfer-encoding: identity", b"bad name: x"}


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 6\r\nTransfer-Encoding: chunked",
        b"Content-Length: 0\r\nContent-Length: 43",
        b"Content-Length: +43",
        b"Content-Length : 43",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding : chunked",
        b"Host: other.x",
    ],
    ids=repr,
)
async def test_what_two_servers_would_read_differently_never_reaches_an_application(gateway, upstream, head):
    answer = await raw(gateway, b"POST / HTTP/1.1\r\nHost: site-1.x\r\n" + head + b"\r\n\r\n0\r\n\r\n" + SMUGGLED)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400")), answer[:200]
    assert upstream.requests == []


async def test_a_connection_takes_one_request_after_another_and_each_is_framed_anew(gateway, upstream):
    chunked = (
        b"POST /2 HTTP/1.1\r\nHost: site-1.x\r\nTransfer-Encoding: chunked\r\n\r\n3;ext=1\r\nabc\r\n0\r\nT: x\r\n\r\n"
    )
    sized = b"POST /1 HTTP/1.1\r\nHost: site-1.x\r\nContent-Length: 3\r\n\r\nabc"
    last = b"GET /3 HTTP/1.1\r\nHost: site-1.x\r\nConnection: close\r\n\r\n"
    answer = await raw(gateway, sized + chunked + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert upstream.requests == [b"POST /1 HTTP/1.1", b"POST /2 HTTP/1.1", b"GET /3 HTTP/1.1"]
    assert b"ext=1" not in upstream.received


@pytest.mark.parametrize("method", ["CONNECT site-1.x:80", "TRACE /"])
async def test_methods_of_proxies_are_not_passed_on(gateway, upstream, method):
    answer = await raw(gateway, f"{method} HTTP/1.1\r\nHost: site-1.x\r\nConnection: close\r\n\r\n".encode())
    assert answer.split(b" ")[1] in {b"400", b"404", b"405"}
    assert upstream.requests == []


async def test_hop_by_hop_headers_end_at_the_gateway_and_a_visitor_cannot_take_away_its_own(gateway, upstream):
    sent = HOST | {
        "Connection": "X-Forwarded-For, X-Hop, close",
        "X-Hop": "1",
        "TE": "trailers",
        "Proxy-Authorization": "x",
        "Upgrade": "h2c",
        "Forwarded": "for=6.6.6.6",
        "X-Real-IP": "6.6.6.6",
    }
    async with gateway.get("/", headers=sent) as answer:
        assert answer.status == 200
    lowered = upstream.received.lower()
    for name in (b"x-hop", b"\r\nte:", b"proxy-authorization", b"upgrade", b"6.6.6.6"):
        assert name not in lowered
    assert b"x-forwarded-for: 127.0.0.1\r\n" in lowered


async def test_only_a_trusted_proxy_is_believed_where_a_request_came_from(redis, upstream):
    trusting = GatewayConfig(trusted_proxies=(ip_network("127.0.0.0/8"),))
    told = HOST | {"X-Forwarded-For": "6.6.6.6, 7.7.7.7", "X-Forwarded-Proto": "https"}
    async with TestClient(TestServer(build_gateway(redis, trusting))) as client:
        await (await client.get("/", headers=told)).read()
        await (await client.get("/", headers=told | {"X-Forwarded-Proto": "evil"})).read()
    first, second, _ = upstream.received.lower().split(b"\r\n\r\n")
    assert b"x-forwarded-for: 6.6.6.6, 7.7.7.7, 127.0.0.1" in first
    assert b"x-forwarded-proto: https" in first
    assert b"x-forwarded-proto: http\r\n" in second + b"\r\n"


async def test_an_application_that_does_not_answer_gets_a_504_page_and_a_slow_upload_does_not(
    redis, gateway, monkeypatch
):
    monkeypatch.setattr(gateway_module, "_SILENCE_S", 1.0)
    went_on = asyncio.Event()

    async def application(request):
        if request.path == "/silent":
            await went_on.wait()
        return web.Response(text=str(len(await request.read())))

    async def slowly():
        for _ in range(8):
            yield b"x" * 1000
            await asyncio.sleep(0.3)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", application)
    async with TestServer(app) as server:
        await route_to(redis, HttpTarget(host="127.0.0.1", port=server.port))
        async with gateway.get("/silent", headers=HOST) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (504, "2")
        async with gateway.post("/slow", headers=HOST, data=slowly()) as answer:
            assert (answer.status, await answer.text()) == (200, "8000")
        went_on.set()


async def test_a_visitor_who_leaves_in_the_middle_of_an_upload_does_no_harm(gateway, upstream):
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(b"POST / HTTP/1.1\r\nHost: site-1.x\r\nContent-Length: 1000000\r\n\r\nhalf")
    await asyncio.sleep(0.2)
    writer.transport.abort()
    async with gateway.get("/after", headers=HOST) as answer:
        assert answer.status == 200


@asynccontextmanager
async def websockets(redis, handler):
    app = web.Application()
    app.router.add_get("/ws", handler)
    async with TestServer(app) as server:
        await route_to(redis, HttpTarget(host="127.0.0.1", port=server.port))
        yield server


async def test_an_application_that_is_cut_off_ends_a_websocket_with_a_code_that_says_so(redis, gateway):
    async def cut(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        request.transport.abort()
        return socket

    async with websockets(redis, cut), gateway.ws_connect("/ws", headers=HOST) as socket:
        await socket.send_str("die")
        message = await socket.receive(timeout=5)
        assert (message.type, socket.close_code) == (aiohttp.WSMsgType.CLOSE, 1001)


@pytest.mark.parametrize(("status", "shown"), [(401, 401), (200, 502), (302, 502)])
async def test_an_application_that_refuses_a_websocket_is_not_made_to_look_as_if_it_agreed(
    redis, gateway, status, shown
):
    async def refuse(request):
        return web.Response(status=status)

    async with websockets(redis, refuse):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await gateway.ws_connect("/ws", headers=HOST)
        assert refused.value.status == shown


async def test_a_stopped_application_has_a_page_and_a_route_that_changes_is_followed_at_once(gateway, redis, upstream):
    async with gateway.get("/", headers=HOST) as answer:
        assert answer.status == 200
    await Routes(redis).move("site-1", Route(app_id="app_1", deployment_id="dep_1", target=StoppedTarget()))
    async with asyncio.timeout(0.5):  # less than what a lookup is trusted for
        while (answer := await gateway.get("/", headers=HOST)).status == 200:
            await asyncio.sleep(0.01)
    assert answer.status == 503
    assert "stopped by its owner" in await answer.text()


async def test_a_request_to_a_place_that_was_left_a_moment_ago_is_led_to_the_new_one(
    redis, gateway, upstream, unused_tcp_port, monkeypatch
):
    monkeypatch.setattr(gateway_module, "_CACHE_S", 60)
    here = (await Routes(redis).get("site-1")).target
    await redis.hset(
        "deploy:{routes}",
        "site-1",
        Route(
            app_id="app_1", deployment_id="dep_1", target=HttpTarget(host="127.0.0.1", port=unused_tcp_port)
        ).model_dump_json(),
    )
    async with gateway.get("/", headers=HOST) as answer:
        assert answer.status == 503
    await redis.hset(
        "deploy:{routes}", "site-1", Route(app_id="app_1", deployment_id="dep_1", target=here).model_dump_json()
    )
    async with gateway.get("/", headers=HOST) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    ("domain", "status"),
    [
        ("site-1.apps.example.com", 200),
        ("SITE-1.apps.example.com.", 200),
        ("site-2.apps.example.com", 404),
        ("site-1.example.com", 404),
        ("site-1.apps.example.com.evil.org", 404),
        ("a.site-1.apps.example.com", 404),
        (".apps.example.com", 404),
        ("apps.example.com", 404),
        ("", 404),
    ],
)
async def test_certificates_are_only_asked_for_names_that_lead_to_an_application(redis, upstream, domain, status):
    config = GatewayConfig(app_url_template="https://{app}.apps.example.com/")
    async with TestClient(TestServer(build_gateway(redis, config))) as client:
        async with client.get(ASK_PATH, params={"domain": domain}) as answer:
            assert answer.status == status
        async with client.get(ASK_PATH) as answer:
            assert answer.status == 404
