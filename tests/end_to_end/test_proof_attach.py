"""Attached beside each other while 100 MB go by: one that reads, one that never reads, one that reads 1 KB a second."""

import asyncio
import base64
import json
import os
import time

import aiohttp
import psutil

from tests.end_to_end.faults import FaultProxy
from tests.end_to_end.flood import BEGIN, END, sha256, start_flood
from tests.end_to_end.harness import ADMIN_KEY, free_port
from tests.end_to_end.proof import keeping_all

SIZE_BYTES = 104_857_600
PROTOCOL = "code-sessions.v1"
CUT_OFF_S = 60  # a client that takes nothing is given up after half a minute


class Attached:
    """A client that attaches again where it was, and counts only what a `seq` mark has confirmed."""

    def __init__(self, port, session):
        self._url = f"ws://127.0.0.1:{port}/pty/{session.id}"
        self._pieces, self._after, self.size_bytes = [], 0, 0
        self.connections = 0

    async def until_end(self):
        timeout = aiohttp.ClientWSTimeout(ws_close=5)
        async with aiohttp.ClientSession(headers={"X-API-Key": ADMIN_KEY}) as http:
            while not self._pieces or END not in b"".join(self._pieces[-40:]):
                self.connections += 1
                url = f"{self._url}?afterSeq={self._after}"
                try:
                    async with http.ws_connect(url, protocols=[PROTOCOL], max_msg_size=0, timeout=timeout) as socket:
                        await self._read(socket)
                except aiohttp.ClientError:
                    await asyncio.sleep(0.2)
        whole = b"".join(self._pieces)
        return whole[whole.index(BEGIN) + len(BEGIN) : whole.index(END)]

    async def _read(self, socket):
        pending = bytearray()  # shown, and not marked as durable yet: it comes again after a cut
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                pending += message.data
                continue
            frame = json.loads(message.data)
            assert frame["type"] not in {"truncated", "gap", "error"}, frame
            if frame["type"] == "seq":
                assert frame["seq"] > self._after
                self._after = frame["seq"]
                confirmed = frame["offset"] - self.size_bytes
                assert 0 <= confirmed <= len(pending), "a mark is never ahead of what was sent"
                self._pieces.append(bytes(pending[:confirmed]))
                del pending[:confirmed]
                self.size_bytes = frame["offset"]
                if END in b"".join(self._pieces[-2:]):
                    return


async def never_reading(port, session):
    """Attached, with nobody who reads; seconds until the server has given it up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    lines = [
        f"GET /pty/{session.id}?afterSeq=0 HTTP/1.1",
        "Host: localhost",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        f"X-API-Key: {ADMIN_KEY}",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    assert b" 101 " in await reader.readline()
    began = time.monotonic()
    try:
        async with asyncio.timeout(CUT_OFF_S):
            while True:  # masked pongs of nobody who reads: a write fails once the server has cut the connection
                writer.write(b"\x8a\x80\x00\x00\x00\x00")
                await writer.drain()
                await asyncio.sleep(0.2)
    except ConnectionError:
        return time.monotonic() - began
    finally:
        writer.transport.abort()


async def given_up(serve, connection):
    """Return when the server has closed its end of it."""
    process = psutil.Process(serve.process.pid)
    async with asyncio.timeout(CUT_OFF_S):
        while any(peer.raddr and peer.raddr.port == connection.target_port for peer in process.net_connections("tcp")):
            await asyncio.sleep(0.2)


async def test_one_that_never_reads_and_one_that_reads_a_kilobyte_a_second_take_nothing_from_a_third(tmp_path):
    with keeping_all(tmp_path) as serve:
        crawl = True

        def crawling(connection):
            connection.down.rate_bytes_s = 1000 if crawl else None

        slow_port = free_port()
        async with (
            serve.client() as client,
            FaultProxy(("127.0.0.1", slow_port), ("127.0.0.1", serve.port), crawling) as proxy,
        ):
            session = await client.create("watched")
            fast, slow = Attached(serve.port, session), Attached(slow_port, session)
            flood = await start_flood(serve, session, SIZE_BYTES)
            async with asyncio.TaskGroup() as tasks:
                never = tasks.create_task(never_reading(serve.port, session))
                slowly = tasks.create_task(slow.until_end())
                assert sha256(await fast.until_end()) == flood.sha256
                assert slow.size_bytes < SIZE_BYTES // 100, "it was not slow"
                await given_up(serve, proxy.connections[0])
                crawl = False
                for connection in proxy.connections:
                    connection.down.rate_bytes_s = None
            assert slow.connections > 1
            assert never.result() < CUT_OFF_S
            assert sha256(slowly.result()) == flood.sha256, "resumed, it is to have missed nothing"
