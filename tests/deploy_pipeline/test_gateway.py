import asyncio

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from deploy_pipeline.gateway import build_gateway
from deploy_pipeline.routing import HttpTarget, Route, Routes, StaticTarget

GO = web.AppKey("go", asyncio.Event)
HOST = {"Host": "site-1.localhost:8080"}


async def route_to(redis, target, name="site-1", deployment_id="dep_1", token=1):
    return await Routes(redis).set(name, Route(app_id="app_1", deployment_id=deployment_id, target=target), token=token)


@pytest.fixture
async def application(redis):
    """An application behind the gateway that shows what it received."""

    async def show(request):
        body = await request.read()
        return web.json_response(
            {
                "method": request.method,
                "path": request.raw_path,
                "headers": {name.lower(): value for name, value in request.headers.items()},
                "bytes": len(body),
            },
            headers={"Keep-Alive": "timeout=5", "X-Own": "1"},
        )

    async def drip(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first")
        await request.app[GO].wait()
        await response.write(b" second")
        return response

    async def cut(request):
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"half")
        request.transport.abort()
        return response

    async def echo(request):
        socket = web.WebSocketResponse(protocols=["chat"])
        await socket.prepare(request)
        async for message in socket:
            if message.data == "bye":
                await socket.close(code=4001)
            elif message.type is aiohttp.WSMsgType.TEXT:
                await socket.send_str("echo " + message.data)
            else:
                await socket.send_bytes(message.data)
        return socket

    app = web.Application(client_max_size=1 << 30)
    app[GO] = asyncio.Event()
    app.router.add_get("/ws", echo)
    app.router.add_get("/drip", drip)
    app.router.add_get("/cut", cut)
    app.router.add_route("*", "/{path:.*}", show)
    async with TestServer(app) as server:
        await route_to(redis, HttpTarget(host="127.0.0.1", port=server.port))
        yield app


async def test_a_request_arrives_as_it_was_sent_with_where_it_came_from(gateway, application):
    sent = HOST | {"X-Forwarded-For": "6.6.6.6", "Connection": "keep-alive, X-Hop", "X-Hop": "1", "X-Mine": "ü"}
    async with gateway.request("PUT", "/a%2Fb/../c?x=%20y", headers=sent, data=b"x" * 3_000_000) as answer:
        seen = await answer.json()
    assert answer.status == 200
    assert (seen["method"], seen["bytes"]) == ("PUT", 3_000_000)
    assert seen["headers"]["host"] == "site-1.localhost:8080"
    assert seen["headers"]["x-forwarded-for"] == "127.0.0.1"
    assert seen["headers"]["x-forwarded-host"] == "site-1.localhost:8080"
    assert seen["headers"]["x-forwarded-proto"] == "http"
    assert "x-hop" not in seen["headers"]
    assert answer.headers["X-Own"] == "1"
    assert "Keep-Alive" not in answer.headers


async def test_the_path_and_query_are_passed_on_byte_for_byte(gateway, application):
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(b"GET /a%2Fb/../c//d?x=%20y&z HTTP/1.1\r\nHost: site-1.x\r\nConnection: close\r\n\r\n")
    answer = (await reader.read()).decode()
    writer.close()
    assert '"path": "/a%2Fb/../c//d?x=%20y&z"' in answer


async def test_a_chunked_body_is_streamed_up(gateway, application):
    async def pieces():
        for _ in range(10):
            yield b"x" * 100_000

    async with gateway.post("/", headers=HOST, data=pieces()) as answer:
        assert (await answer.json())["bytes"] == 1_000_000


async def test_an_answer_is_streamed_down_as_it_is_made(gateway, application):
    async with gateway.get("/drip", headers=HOST) as answer:
        assert await answer.content.readany() == b"first"
        application[GO].set()
        assert await answer.content.read() == b" second"


async def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(gateway, application):
    with pytest.raises(aiohttp.ClientPayloadError):
        async with gateway.get("/cut", headers=HOST) as answer:
            await answer.read()


async def test_head_has_the_length_and_no_body(gateway, application):
    async with gateway.head("/", headers=HOST) as answer:
        assert answer.status == 200
        assert int(answer.headers["Content-Length"]) > 0
        assert await answer.read() == b""


async def test_websockets_go_both_ways_with_their_protocol_and_close_code(gateway, application):
    async with gateway.ws_connect("/ws", headers=HOST, protocols=["chat"]) as socket:
        assert socket.protocol == "chat"
        await socket.send_str("hi")
        assert await socket.receive_str() == "echo hi"
        await socket.send_bytes(b"\0\xff")
        assert await socket.receive_bytes() == b"\0\xff"
        await socket.send_str("bye")
        assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
        assert socket.close_code == 4001


@pytest.mark.parametrize("host", ["nobody.localhost", "localhost", "127.0.0.1", "..", "<script>"])
async def test_an_unknown_host_gets_a_page_that_says_so(gateway, host):
    async with gateway.get("/", headers={"Host": host}) as answer:
        text = await answer.text()
    assert (answer.status, answer.content_type) == (404, "text/html")
    assert "<script>" not in text


async def test_an_application_that_is_not_there_gets_a_503_page(gateway, redis, unused_tcp_port):
    await route_to(redis, HttpTarget(host="127.0.0.1", port=unused_tcp_port))
    async with gateway.get("/", headers=HOST) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "2")


async def test_an_application_that_talks_nonsense_gets_a_502_page(gateway, redis):
    async def nonsense(_, writer):
        writer.write(b"nonsense\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(nonsense, "127.0.0.1", 0) as server:
        await route_to(redis, HttpTarget(host="127.0.0.1", port=server.sockets[0].getsockname()[1]))
        async with gateway.get("/", headers=HOST) as answer:
            assert answer.status == 502


async def test_a_store_out_of_reach_gets_a_503_page(tmp_path):
    from redis.asyncio import Redis

    nowhere = Redis(unix_socket_path=str(tmp_path / "none"))
    async with TestClient(TestServer(build_gateway(nowhere))) as client, client.get("/", headers=HOST) as answer:
        assert answer.status == 503


async def test_traffic_moves_within_a_second_and_never_back_to_a_stale_worker(gateway, redis, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text(name)
    one, two = (StaticTarget(root=str(tmp_path / name)) for name in ("one", "two"))
    assert await route_to(redis, one, token=1)
    assert await (await gateway.get("/", headers=HOST)).text() == "one"
    assert await route_to(redis, two, deployment_id="dep_2", token=2)
    assert not await route_to(redis, one, token=1)
    assert not await Routes(redis).move("site-1", Route(app_id="app_1", deployment_id="dep_1", target=one))
    await asyncio.sleep(1.05)
    assert await (await gateway.get("/", headers=HOST)).text() == "two"


@pytest.fixture
async def site(redis, tmp_path):
    root = tmp_path / "site"
    (root / "docs").mkdir(parents=True)
    (root / "index.html").write_text("<h1>Hi</h1>")
    (root / "docs/index.html").write_text("docs")
    (root / "a b.txt").write_text("0123456789")
    (root / ".env").write_text("SECRET")
    (root / ".git").mkdir()
    (root / ".git/config").write_text("SECRET")
    (tmp_path / "outside.txt").write_text("SECRET")
    (root / "out.txt").symlink_to(tmp_path / "outside.txt")
    (root / "out").symlink_to(tmp_path)
    (root / "visible").symlink_to(".env")
    await route_to(redis, StaticTarget(root=str(root)))
    return root


async def raw(gateway, path):
    """The path exactly as given, which no client library would send."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: site-1.localhost\r\nConnection: close\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    return answer


async def test_a_static_site_has_index_pages_types_etags_and_ranges(gateway, site):
    async with gateway.get("/", headers=HOST) as answer:
        assert (await answer.text(), answer.headers["Content-Type"]) == ("<h1>Hi</h1>", "text/html; charset=utf-8")
        etag = answer.headers["ETag"]
    async with gateway.get("/", headers=HOST | {"If-None-Match": etag}) as answer:
        assert answer.status == 304
    async with gateway.get("/a%20b.txt", headers=HOST | {"Range": "bytes=2-4"}) as answer:
        assert (answer.status, await answer.text()) == (206, "234")
    async with gateway.head("/a%20b.txt", headers=HOST) as answer:
        assert answer.headers["Content-Length"] == "10"
    async with gateway.get("/docs", headers=HOST, allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (308, "/docs/")
    async with gateway.post("/", headers=HOST) as answer:
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path",
    [
        "/../outside.txt",
        "/..%2foutside.txt",
        "/%2e%2e/outside.txt",
        "/docs/../../outside.txt",
        "//etc/passwd",
        "/out.txt",
        "/out/outside.txt",
        "/.env",
        "/%2eenv",
        "/visible",
        "/.git/config",
        "/docs/../.git/config",
        "/a%00b",
        "/" + "x" * 5000,
    ],
)
async def test_nothing_outside_a_static_site_and_none_of_its_dot_files_is_served(gateway, site, path):
    answer = await raw(gateway, path)
    assert answer.startswith("HTTP/1.1 404")
    assert "SECRET" not in answer
    assert "root:" not in answer


async def test_a_redirect_never_leaves_the_site(gateway, site):
    assert "\r\nLocation: /docs/\r\n" in await raw(gateway, "//docs")


async def test_a_sites_own_404_page_is_used(gateway, site):
    (site / "404.html").write_text("lost")
    async with gateway.get("/nowhere", headers=HOST) as answer:
        assert (answer.status, await answer.text()) == (404, "lost")


async def test_host_names_made_up_by_visitors_do_not_pile_up(gateway, monkeypatch):
    monkeypatch.setattr("deploy_pipeline.gateway._CACHE_ENTRIES", 5)
    for number in range(20):
        async with gateway.get("/", headers={"Host": f"h{number}.localhost"}) as answer:
            assert answer.status == 404
