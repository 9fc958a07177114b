"""What a build may reach: a real proxy, real connections, and addresses that are never to be reached."""

import asyncio
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from deploy_pipeline.builders import egress
from deploy_pipeline.builders.egress import EgressProxy, is_public, own_addresses


@asynccontextmanager
async def registry():
    """A server on loopback; its port. It answers with what it was asked."""

    async def answer(request):
        return web.Response(text=f"{request.method} {request.path_qs} {request.headers.get('Proxy-Authorization')}")

    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def ask(proxy, url):
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(timeout=timeout) as http, http.get(url, proxy=proxy) as answer:
        return answer.status, await answer.text()


async def tunnel(proxy, target):
    """The first line of the answer to CONNECT, and the connection."""
    host, port = proxy.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    return (await reader.readline()).decode().strip(), reader, writer


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.17.0.1", "192.168.1.1", "169.254.169.254",
        "100.100.100.200",
        "224.0.0.1", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "fe80::1%eth0",
        "fd00:ec2::254", "fc00::1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "ff02::1", "::7f00:1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public_is_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "151.101.0.223", "2606:4700::6810:84e5", "::ffff:1.1.1.1"])
def test_an_address_of_the_internet_is_public(address):
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"])
async def test_this_machine_cannot_be_reached_however_it_is_spelt(monkeypatch, host):
    said = []
    async with registry() as port, EgressProxy(say=said.append).listening("127.0.0.1") as proxy:
        monkeypatch.setattr(egress, "_PORTS", frozenset({port}))
        status, _, writer = await tunnel(proxy, f"{host}:{port}")
        writer.close()
        assert status == "HTTP/1.1 403 Forbidden"
        assert (await ask(proxy, f"http://{host}:{port}/x"))[0] == 403
    assert said
    assert all("public addresses only" in line or "no such host" in line for line in said)


async def test_a_service_on_this_machines_own_public_address_cannot_be_reached():
    addresses = {address for address in own_addresses() if "." in address and is_public(address)}
    async with EgressProxy().listening("127.0.0.1") as proxy:
        for address in addresses:
            assert (await tunnel(proxy, f"{address}:443"))[0] == "HTTP/1.1 403 Forbidden"
    assert "127.0.0.1" in own_addresses()


async def test_other_ports_than_the_webs_are_refused():
    async with EgressProxy().listening("127.0.0.1") as proxy:
        assert "ports 80 and 443 only" in (await ask(proxy, "http://1.1.1.1:6379/"))[1]


async def test_what_the_operator_allows_is_reached_as_a_tunnel_and_as_a_plain_proxy():
    async with registry() as port:
        allowed = frozenset({f"localhost:{port}"})
        async with EgressProxy(allowed).listening("127.0.0.1") as proxy:
            assert await ask(proxy, f"http://localhost:{port}/simple/?a=b") == (200, "GET /simple/?a=b None")
            status, reader, writer = await tunnel(proxy, f"localhost:{port}")
            assert status == "HTTP/1.1 200 Connection established"
            writer.write(b"GET /through HTTP/1.0\r\n\r\n")
            assert b"GET /through" in await reader.read()
            writer.close()
            assert (await ask(proxy, f"http://127.0.0.1:{port}/"))[0] == 403


@pytest.mark.parametrize(
    "head", [b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET ftp://x/ HTTP/1.1\r\n\r\n", b"\xff \xff \xff\r\n\r\n"]
)
async def test_what_is_no_request_to_a_proxy_is_refused(head):
    async with EgressProxy().listening("127.0.0.1") as proxy:
        host, port = proxy.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head)
        assert (await reader.readline()).startswith(b"HTTP/1.1 403")
        writer.close()


async def test_open_connections_end_with_the_build():
    async with registry() as port:
        async with EgressProxy(frozenset({"localhost"})).listening("127.0.0.1") as proxy:
            _, reader, writer = await tunnel(proxy, f"localhost:{port}")
        async with asyncio.timeout(5):
            await reader.read()
        writer.close()
