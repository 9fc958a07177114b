"""Ten redeployments under constant load: no visitor notices any of them."""

import asyncio
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager

import aiohttp
import pytest
from conftest import Pipeline
from test_worker_killed import worker_to_kill

from deploy_pipeline.jobs import DeploymentState
from deploy_pipeline.worker import WorkerConfig

REDEPLOYMENTS = 10
KEEP_ALIVE_CLIENTS, FRESH_CLIENTS, SOCKET_CLIENTS = 6, 2, 4
GATEWAY = """
import sys
from aiohttp import web
from redis.asyncio import Redis
from deploy_pipeline.gateway import build_gateway
web.run_app(build_gateway(Redis(unix_socket_path=sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]), print=None)
"""
# HTTP with keep-alive and echoing WebSockets, of the standard library alone.
APPLICATION = """
import asyncio, base64, hashlib, os
VERSION = b"NUMBER"
async def echo(reader, writer, key):
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    writer.write(b"HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\n"
                 b"Sec-WebSocket-Accept: " + accept + b"\\r\\n\\r\\n")
    while True:
        first, length = await reader.readexactly(2)
        mask = await reader.readexactly(4)
        data = bytes(b ^ mask[i % 4] for i, b in enumerate(await reader.readexactly(length & 127)))
        writer.write(bytes([first, len(data)]) + data)
        if first & 15 == 8:
            return
async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\\r\\n")[1:] if b": " in line)
            if fields.get(b"upgrade") == b"websocket":
                at = head.lower().index(b"sec-websocket-key: ") + 19
                await echo(reader, writer, head[at:].split(b"\\r\\n")[0])
                return
            body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
            answer = VERSION + b" %d" % len(body)
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(answer) + answer)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()
async def main():
    await (await asyncio.start_server(serve, os.environ["HOST"], int(os.environ["PORT"]))).serve_forever()
asyncio.run(main())
"""


class Load:
    """What the visitors saw."""

    def __init__(self, origin, host):
        self.origin, self.headers = origin, {"Host": host}
        self.stop = asyncio.Event()
        self.versions, self.failures, self.echoes = Counter(), [], 0

    async def request(self, client, number):
        body = b"x" * 5000 if number % 3 == 0 else None
        method = "POST" if body else "GET"
        try:
            async with client.request(method, self.origin, headers=self.headers, data=body) as answer:
                text = await answer.text()
                version, _, size = text.partition(" ")
                if answer.status == 200 and size == str(len(body or b"")):
                    self.versions[version] += 1
                else:
                    self.failures.append((method, answer.status, text[:200]))
        except (aiohttp.ClientError, TimeoutError) as error:
            self.failures.append((method, repr(error)))

    async def visit(self, *, force_close):
        connector = aiohttp.TCPConnector(force_close=force_close)
        timeout = aiohttp.ClientTimeout(total=20)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:
            number = 0
            while not self.stop.is_set():
                number += 1
                await self.request(client, number)
                await asyncio.sleep(0.005)

    async def talk(self):
        async with aiohttp.ClientSession() as client:
            while not self.stop.is_set():
                try:
                    async with client.ws_connect(self.origin, headers=self.headers) as socket:
                        for number in range(20):
                            await socket.send_str(f"hello {number}")
                            assert await socket.receive_str(timeout=20) == f"hello {number}"
                            self.echoes += 1
                            await asyncio.sleep(0.02)
                except (aiohttp.ClientError, TimeoutError, TypeError, AssertionError) as error:
                    self.failures.append(("websocket", repr(error)))


@asynccontextmanager
async def gateway_process(socket, port):
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", GATEWAY, str(socket), str(port))
    try:
        async with asyncio.timeout(20):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.05)
                else:
                    writer.close()
                    break
        yield
    finally:
        process.kill()
        await process.wait()


@pytest.mark.timeout(300)
async def test_ten_redeployments_under_constant_load_fail_no_request(queue, valkey_socket, tmp_path, unused_tcp_port):
    config = WorkerConfig("local", tmp_path, "http://{app}.localhost/", drain_s=8)  # more than a conversation takes
    pipeline = Pipeline(queue, config, None)
    async with (
        worker_to_kill(config, valkey_socket),
        gateway_process(valkey_socket, unused_tcp_port),
    ):
        first = await pipeline.deploy({"main.py": APPLICATION.replace("NUMBER", "0")})
        assert (first.state, first.reason) == (DeploymentState.RUNNING, "")
        app = await queue.find_app(first.app_id)
        load = Load(f"http://127.0.0.1:{unused_tcp_port}/", f"{app.name}.localhost")
        began = time.monotonic()
        async with asyncio.TaskGroup() as visitors:
            for place in range(KEEP_ALIVE_CLIENTS + FRESH_CLIENTS):
                visitors.create_task(load.visit(force_close=place >= KEEP_ALIVE_CLIENTS))
            for _ in range(SOCKET_CLIENTS):
                visitors.create_task(load.talk())
            for number in range(1, REDEPLOYMENTS + 1):
                done = await pipeline.deploy({"main.py": APPLICATION.replace("NUMBER", str(number))})
                assert (done.state, done.reason) == (DeploymentState.RUNNING, "")
                await asyncio.sleep(2)  # beyond the end of the release before
            load.stop.set()
        seconds = time.monotonic() - began
    total = load.versions.total()
    print(f"{total} requests, {load.echoes} echoes, {total / seconds:.0f} requests a second for {seconds:.0f} s")
    assert load.failures == []
    assert set(load.versions) == {str(number) for number in range(REDEPLOYMENTS + 1)}, "every release had visitors"
    assert total / seconds > 100
    assert load.echoes > 100
