"""A real Caddy (Debian's package `caddy`) with docs/Caddyfile in front of the gateway."""

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
from ipaddress import ip_network
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from deploy_pipeline.gateway import GatewayConfig, build_gateway
from deploy_pipeline.routing import HttpTarget, Route, Routes

CADDYFILE = Path(__file__).parents[2] / "docs/Caddyfile"
NAME = "site-1.apps.example.com"

pytestmark = pytest.mark.skipif(shutil.which("caddy") is None, reason="caddy is not installed")


@pytest.fixture
async def gateway_port(redis):
    """The gateway with one application, which shows what it is told and echoes over WebSockets."""

    async def application(request):
        if request.path == "/ws":
            echo = web.WebSocketResponse()
            await echo.prepare(request)
            async for message in echo:
                await echo.send_str("echo " + message.data)
            return echo
        told = [request.host, request.headers["X-Forwarded-Proto"], request.headers["X-Forwarded-For"]]
        return web.json_response([*told, len(await request.read())])

    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", application)
    config = GatewayConfig("https://{app}.apps.example.com/", (ip_network("127.0.0.1"),))
    async with TestServer(app) as upstream, TestServer(build_gateway(redis, config)) as gateway:
        target = HttpTarget(host="127.0.0.1", port=upstream.port)
        await Routes(redis).set("site-1", Route(app_id="app_1", deployment_id="dep_1", target=target), token=1)
        yield gateway.port


@pytest.fixture
async def https_port(gateway_port, tmp_path, unused_tcp_port_factory):
    http_port, https_port = unused_tcp_port_factory(), unused_tcp_port_factory()
    environment = os.environ | {
        "GATEWAY": f"http://127.0.0.1:{gateway_port}",
        "HTTP_PORT": str(http_port),
        "HTTPS_PORT": str(https_port),
        "GLOBAL_OPTIONS": "local_certs\nadmin off\nskip_install_trust",  # no authority of the real world
        "HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
    }
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(CADDYFILE)]
    with (tmp_path / "log").open("wb") as log:
        caddy = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        async with asyncio.timeout(20):
            while True:
                assert caddy.poll() is None, (tmp_path / "log").read_text()
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", https_port)) == 0:
                        break
                await asyncio.sleep(0.05)
        yield https_port
    finally:
        caddy.terminate()
        await asyncio.to_thread(caddy.wait)


def session(name):
    """A client for which this name is here, and which takes Caddy's own authority."""
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE

    class Here(aiohttp.abc.AbstractResolver):
        async def resolve(self, host, port=0, family=socket.AF_INET):
            return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": family, "proto": 0, "flags": 0}]

        async def close(self):
            pass

    return aiohttp.ClientSession(
        f"https://{name}", connector=aiohttp.TCPConnector(resolver=Here(), ssl=unchecked), trust_env=False
    )


async def test_an_application_is_reached_by_https_with_a_certificate_on_demand(https_port):
    async with session(f"{NAME}:{https_port}") as client:
        async with client.post("/", data=b"x" * 3_000_000) as answer:
            host, proto, told, size = await answer.json()
        assert (answer.status, proto, size) == (200, "https", 3_000_000)
        assert host.partition(":")[0] == NAME
        assert told == "127.0.0.1, 127.0.0.1", "the visitor, then Caddy"
        async with client.ws_connect("/ws") as echo:
            await echo.send_str("hi")
            assert await echo.receive_str() == "echo hi"


@pytest.mark.parametrize("name", ["site-2.apps.example.com", "site-1.example.org"])
async def test_no_certificate_is_made_for_another_name(https_port, name):
    async with session(f"{name}:{https_port}") as client:
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.get("/")
