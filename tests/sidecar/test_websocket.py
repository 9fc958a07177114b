"""Our WebSocket client against aiohttp's server, and against servers that misbehave."""

import asyncio
import base64
import contextlib
import hashlib
import re

import pytest
from aiohttp import WSMsgType, web

from sidecar.protocol import MAX_MESSAGE_BYTES, ProtocolError
from sidecar.websocket import HandshakeRefused, WebSocket


@contextlib.asynccontextmanager
async def _aiohttp_server(path, handler):
    app = web.Application()
    app.router.add_get("/link", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    try:
        yield f"unix://{path}"
    finally:
        await runner.cleanup()


async def _echo(request):
    socket = web.WebSocketResponse(max_msg_size=0, heartbeat=0.05)
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            await socket.send_str(message.data)
        else:
            await socket.send_bytes(message.data)
    return socket


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 1_000_000, MAX_MESSAGE_BYTES])
async def test_messages_of_every_length_encoding_go_there_and_back(tmp_path, size):
    async with _aiohttp_server(tmp_path / "s", _echo) as url:
        socket = await WebSocket.connect(url, {})
        data = bytes(index % 251 for index in range(size))
        socket.send_binary(data)
        assert await socket.receive() == data
        socket.send_text("é" * (size // 4))
        assert await socket.receive() == "é" * (size // 4)
        await socket.close()


async def test_pings_are_answered_while_it_waits(tmp_path):
    async with _aiohttp_server(tmp_path / "s", _echo) as url:
        socket = await WebSocket.connect(url, {})
        receiving = asyncio.create_task(socket.receive())
        await asyncio.sleep(0.3)  # six heartbeats of the server, which closes after an unanswered one
        socket.send_text("still there")
        assert await asyncio.wait_for(receiving, 2) == "still there"
        await socket.close()


async def test_a_refusal_carries_the_status(tmp_path):
    async def gone(_request):
        return web.Response(status=410)

    async with _aiohttp_server(tmp_path / "s", gone) as url:
        with pytest.raises(HandshakeRefused) as refused:
            await WebSocket.connect(url, {})
    assert refused.value.status == 410


async def test_the_servers_goodbye_is_the_end(tmp_path):
    async def goodbye(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.close()
        return socket

    async with _aiohttp_server(tmp_path / "s", goodbye) as url:
        socket = await WebSocket.connect(url, {})
        with pytest.raises(EOFError):
            await socket.receive()
        socket.abort()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", ProtocolError),
        (b"SSH-2.0-OpenSSH\r\n\r\n", ProtocolError),
        (b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: wrong\r\n\r\n", ProtocolError),
        (b"HTTP/1.1 101 " + b"x" * 100_000, ProtocolError),
    ],
)
async def test_a_server_that_is_no_websocket_server_is_refused(tmp_path, answer, error):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_unix_server(serve, str(tmp_path / "s"))
    async with server:
        with pytest.raises(error):
            await WebSocket.connect(f"unix://{tmp_path / 's'}", {})


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (b"\x82\xff" + b"\xff" * 8, ProtocolError),  # masked, and longer than anything
        (b"\x82\x7f" + b"\x00" * 4 + b"\x7f" * 4, ProtocolError),  # a length over the limit
        (b"\xf2\x01a", ProtocolError),  # reserved bits
        (b"\x83\x01a", ProtocolError),  # an opcode that does not exist
        (b"\x89\x7e\x00\x80" + b"a" * 128, ProtocolError),  # a ping longer than control frames may be
        (b"\x81\x01\xff", ProtocolError),  # text that is not UTF-8
        (b"\x82\x05ab", EOFError),  # cut in the middle
    ],
)
async def test_broken_frames_end_the_connection_and_nothing_else(tmp_path, frames, error):
    async with _server_that_sends(tmp_path, frames) as url:
        socket = await WebSocket.connect(url, {})
        with pytest.raises(error):
            await socket.receive()
        socket.abort()


async def test_a_message_in_several_frames_and_many_pieces_is_put_together(tmp_path):
    frames = b"\x01\x02ab" + b"\x89\x00" + b"\x80\x01c" + b"\x82\x7e\x01\x00" + b"x" * 256
    async with _server_that_sends(tmp_path, *(frames[place : place + 1] for place in range(len(frames)))) as url:
        socket = await WebSocket.connect(url, {})
        assert await socket.receive() == "abc"
        assert await socket.receive() == b"x" * 256
        with pytest.raises(EOFError):
            await socket.receive()


async def test_messages_are_given_in_order_and_an_error_of_who_takes_them_ends_it(tmp_path):
    taken = []

    def take(message):
        taken.append(message)
        if message == "c":
            raise ProtocolError("enough")

    async with _server_that_sends(tmp_path, b"\x81\x01a\x81\x01b\x81\x01c\x81\x01d") as url:
        socket = await WebSocket.connect(url, {})
        assert await socket.receive() == "a"
        with pytest.raises(ProtocolError, match="enough"):
            await socket.receive_all(take)
    assert taken == ["b", "c"]


@contextlib.asynccontextmanager
async def _server_that_sends(tmp_path, *pieces):
    """Shakes hands as RFC 6455 has it, sends these bytes, and hangs up."""

    async def serve(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        key = re.search("Sec-WebSocket-Key: (.*)\r", head)[1] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        writer.write(f"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: {accept}\r\n\r\n".encode())
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_unix_server(serve, str(tmp_path / "s")):
        yield f"unix://{tmp_path / 's'}"
