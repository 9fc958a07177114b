"""A small WebSocket client (RFC 6455) for the link: Unix sockets, ws:// and wss://, over asyncio streams.

Ours because the sidecar runs in every workspace: importing aiohttp's client costs 14 MiB and 280 ms there, and the
`websockets` package 6 MiB and 80 ms (docs/decisions/0004-the-link.md).
"""

import asyncio
import base64
import hashlib
import os
import ssl as tls
import struct
import time
from typing import Final, Self
from urllib.parse import urlsplit

from sidecar.protocol import MAX_MESSAGE_BYTES, ProtocolError

_ACCEPT_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_FINAL: Final = 0x80
_MASKED: Final = 0x80
# Masks protect proxies from bytes that a web page chose (section 10.3). No web page has a hand in this connection, so
# the key is zero, which spares a pass over every byte of output.
_NO_MASK: Final = bytes(4)
_LENGTH_16, _LENGTH_64 = 126, 127
_CONTROL_MAX_BYTES: Final = 125
_CLOSE_S: Final = 2.0


class HandshakeRefused(Exception):
    """The server answered the handshake with another status than 101."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the control plane answered {status}")
        self.status = status


class WebSocket:
    """One connection. `receive` is for one task; `send_*` may be called by several."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.heard_at_s = time.monotonic()  # when the last frame came, a ping or a pong included

    @classmethod
    async def connect(cls, url: str, headers: dict[str, str]) -> Self:
        """`url`: `unix:///path/of.sock`, `ws://host:port/link` or `wss://…`.

        Raises:
            OSError: nothing listens there, or TLS failed.
            HandshakeRefused: it does, but will not have us.
            ProtocolError: it does not speak WebSocket.
        """
        parts = urlsplit(url)
        if parts.scheme == "unix":
            host, target = "localhost", "/link"
            reader, writer = await asyncio.open_unix_connection(parts.path)
        else:
            secure = parts.scheme == "wss"
            port = parts.port or (443 if secure else 80)
            host, target = f"{parts.hostname}:{port}", parts.path or "/link"
            context = tls.create_default_context() if secure else None
            reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context)
        socket = cls(reader, writer)
        try:
            await socket._shake_hands(host, target, headers)
        except BaseException:
            socket.abort()
            raise
        return socket

    async def _shake_hands(self, host: str, target: str, headers: dict[str, str]) -> None:
        key = base64.b64encode(os.urandom(16))
        lines = [
            f"GET {target} HTTP/1.1",
            f"Host: {host}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key.decode()}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        self._writer.write("\r\n".join([*lines, "", ""]).encode())
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise ProtocolError("no answer to the WebSocket handshake") from error
        status_line, *header_lines = head.decode("latin-1").split("\r\n")
        words = status_line.split(" ")
        if len(words) < 2 or not words[1].isdigit():  # noqa: PLR2004 - "HTTP/1.1 101"
            raise ProtocolError("the answer to the WebSocket handshake is not HTTP")
        if words[1] != "101":
            raise HandshakeRefused(int(words[1]))
        accept = base64.b64encode(hashlib.sha1(key + _ACCEPT_GUID, usedforsecurity=False).digest()).decode()
        answered = dict(line.lower().split(": ", 1) for line in header_lines if ": " in line)
        if answered.get("sec-websocket-accept") != accept.lower():
            raise ProtocolError("the WebSocket handshake's accept key is wrong")

    async def receive(self) -> str | bytes:
        """The next whole message; pings are answered on the way.

        Raises:
            EOFError: the connection ended.
            ProtocolError: it sent something else than WebSocket frames, or more than MAX_MESSAGE_BYTES.
        """
        message, kind = bytearray(), _BINARY
        while True:
            first, payload = await self._read_frame()
            opcode = first & 0x0F
            if opcode == _CLOSE:
                raise EOFError("the control plane closed the link")
            if opcode == _PING:
                self._write_frame(_PONG, payload)
                continue
            if opcode == _PONG:
                continue
            if opcode in {_TEXT, _BINARY}:
                kind = opcode
            elif opcode != _CONTINUATION:
                raise ProtocolError(f"unknown WebSocket opcode {opcode}")
            message += payload
            if len(message) > MAX_MESSAGE_BYTES:
                raise ProtocolError("a WebSocket message is too long")
            if first & _FINAL:
                try:
                    return message.decode() if kind == _TEXT else bytes(message)
                except UnicodeDecodeError:
                    raise ProtocolError("a WebSocket text message is not UTF-8") from None

    async def _read_frame(self) -> tuple[int, bytes]:
        try:
            first, second = await self._reader.readexactly(2)
            self.heard_at_s = time.monotonic()
            if first & 0x70 or second & _MASKED:
                raise ProtocolError("a WebSocket frame with reserved bits, or masked by a server")
            length = second
            if length == _LENGTH_16:
                (length,) = struct.unpack("!H", await self._reader.readexactly(2))
            elif length == _LENGTH_64:
                (length,) = struct.unpack("!Q", await self._reader.readexactly(8))
            if length > MAX_MESSAGE_BYTES or (first & 0x08 and length > _CONTROL_MAX_BYTES):
                raise ProtocolError("a WebSocket frame is too long")
            return first, await self._reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            raise EOFError("the link was cut") from error
        except OSError as error:
            raise EOFError(f"the link broke: {error}") from error

    def _write_frame(self, opcode: int, payload: bytes) -> None:
        length = len(payload)
        if length < _LENGTH_16:
            header = bytes((_FINAL | opcode, _MASKED | length))
        elif length < 1 << 16:
            header = struct.pack("!BBH", _FINAL | opcode, _MASKED | _LENGTH_16, length)
        else:
            header = struct.pack("!BBQ", _FINAL | opcode, _MASKED | _LENGTH_64, length)
        self._writer.writelines((header, _NO_MASK, payload))

    def send_text(self, message: str) -> None:
        """Buffered; see `drain`. Nothing happens on a connection that is gone: `receive` tells of that."""
        self._write_frame(_TEXT, message.encode())

    def send_binary(self, message: bytes) -> None:
        self._write_frame(_BINARY, message)

    def ping(self) -> None:
        self._write_frame(_PING, b"")

    async def drain(self) -> None:
        """Return once the connection takes more.

        Raises:
            OSError: it is gone.
        """
        await self._writer.drain()

    async def close(self) -> None:
        """Say goodbye (code 1000) and close; what was sent before still goes out."""
        self._write_frame(_CLOSE, struct.pack("!H", 1000))
        self._writer.close()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            self.abort()

    def abort(self) -> None:
        self._writer.transport.abort()
