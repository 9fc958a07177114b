"""A small WebSocket client (RFC 6455) for the link: Unix sockets, ws:// and wss://.

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
from collections import deque
from collections.abc import Callable
from typing import Final, NoReturn, Self, cast
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
_HEAD_MAX_BYTES: Final = 64 * 1024


class HandshakeRefused(Exception):
    """The server answered the handshake with another status than 101."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the control plane answered {status}")
        self.status = status


class WebSocket(asyncio.Protocol):
    """One connection. A protocol and not a pair of streams: a message costs a third of the time that way."""

    def __init__(self) -> None:
        self.heard_at_s = time.monotonic()  # when the last bytes came
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._head: asyncio.Future[bytes] | None = asyncio.get_running_loop().create_future()
        self._message, self._kind = bytearray(), _BINARY  # what has come of the message in parts
        self._messages: deque[str | bytes] = deque()  # for `receive`
        self._arrived = asyncio.Event()
        self._take: Callable[[str | bytes], None] | None = None
        self._error: Exception | None = None
        self._lost = asyncio.Event()

    @classmethod
    async def connect(cls, url: str, headers: dict[str, str]) -> Self:
        """`url`: `unix:///path/of.sock`, `ws://host:port/link` or `wss://…`.

        Raises:
            OSError: nothing listens there, or TLS failed.
            HandshakeRefused: it does, but will not have us.
            ProtocolError: it does not speak WebSocket.
        """
        parts, loop = urlsplit(url), asyncio.get_running_loop()
        if parts.scheme == "unix":
            host, target = "localhost", "/link"
            _, socket = await loop.create_unix_connection(cls, parts.path)
        else:
            secure = parts.scheme == "wss"
            port = parts.port or (443 if secure else 80)
            host, target = f"{parts.hostname}:{port}", parts.path or "/link"
            context = tls.create_default_context() if secure else None
            _, socket = await loop.create_connection(cls, parts.hostname or "", port, ssl=context)
        try:
            await socket.shake_hands(host, target, headers)
        except BaseException:
            socket.abort()
            raise
        return socket

    async def shake_hands(self, host: str, target: str, headers: dict[str, str]) -> None:
        """
        Raises:
            HandshakeRefused, ProtocolError: as `connect`.
        """
        assert self._transport is not None
        assert self._head is not None
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
        self._transport.write("\r\n".join([*lines, "", ""]).encode())
        try:
            head = await self._head
        except EOFError as error:
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

    # Receiving

    async def receive(self) -> str | bytes:
        """The next whole message; pings are answered on the way.

        Raises:
            EOFError: the connection ended.
            ProtocolError: it sent something else than WebSocket frames, or more than MAX_MESSAGE_BYTES.
        """
        while not self._messages:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        return self._messages.popleft()

    async def receive_all(self, take: Callable[[str | bytes], None]) -> NoReturn:
        """Give every message to `take` as it arrives, until the connection ends.

        Raises:
            EOFError, ProtocolError: as `receive`; and whatever `take` raises, which ends the connection.
        """
        while self._messages:
            take(self._messages.popleft())
        self._take = take
        if self._error is None:
            await self._lost.wait()
        assert self._error is not None
        raise self._error

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(EOFError(f"the link broke: {exc}" if exc else "the link was cut"))
        self._lost.set()

    def data_received(self, data: bytes) -> None:
        self.heard_at_s = time.monotonic()
        if self._error is not None:
            return
        self._buffer += data
        try:
            if self._head is not None:
                self._receive_head(self._head)
            while self._head is None and self._receive_frame():
                pass
        except Exception as error:  # noqa: BLE001 - told to who receives
            self._end(error)
            self.abort()

    def _end(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        if self._head is not None and not self._head.done():
            self._head.set_exception(self._error)
        self._arrived.set()

    def _receive_head(self, head: "asyncio.Future[bytes]") -> None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _HEAD_MAX_BYTES:
                raise ProtocolError("the answer to the WebSocket handshake is too long")
            return
        if not head.done():
            head.set_result(bytes(self._buffer[:end]))
        del self._buffer[: end + 4]
        self._head = None

    def _receive_frame(self) -> bool:
        """Take the next frame out of the buffer; False when it is not all there."""
        buffer = self._buffer
        if len(buffer) < 2:  # noqa: PLR2004 - the shortest frame
            return False
        first, length, start = buffer[0], buffer[1], 2
        if first & 0x70 or length & _MASKED:
            raise ProtocolError("a WebSocket frame with reserved bits, or masked by a server")
        if length >= _LENGTH_16:
            start = 4 if length == _LENGTH_16 else 10
            if len(buffer) < start:
                return False
            length = int.from_bytes(buffer[2:start], "big")
        if length > MAX_MESSAGE_BYTES or (first & 0x08 and length > _CONTROL_MAX_BYTES):
            raise ProtocolError("a WebSocket frame is too long")
        if len(buffer) < start + length:
            return False
        payload = bytes(buffer[start : start + length])
        del buffer[: start + length]
        self._receive_payload(first, payload)
        return True

    def _receive_payload(self, first: int, payload: bytes) -> None:
        opcode = first & 0x0F
        if opcode == _CLOSE:
            raise EOFError("the control plane closed the link")
        if opcode == _PING:
            self._write_frame(_PONG, payload)
        elif opcode in {_TEXT, _BINARY, _CONTINUATION}:
            self._kind = opcode or self._kind
            if len(self._message) + len(payload) > MAX_MESSAGE_BYTES:
                raise ProtocolError("a WebSocket message is too long")
            if not first & _FINAL:
                self._message += payload
                return
            if self._message:
                payload = bytes(self._message + payload)
                self._message.clear()
            self._receive_message(payload)
        elif opcode != _PONG:
            raise ProtocolError(f"unknown WebSocket opcode {opcode}")

    def _receive_message(self, payload: bytes) -> None:
        try:
            message = payload.decode() if self._kind == _TEXT else payload
        except UnicodeDecodeError:
            raise ProtocolError("a WebSocket text message is not UTF-8") from None
        if self._take is not None:
            self._take(message)
        else:
            self._messages.append(message)
            self._arrived.set()

    # Sending

    def _write_frame(self, opcode: int, payload: bytes) -> None:
        length = len(payload)
        if length < _LENGTH_16:
            header = bytes((_FINAL | opcode, _MASKED | length))
        elif length < 1 << 16:
            header = struct.pack("!BBH", _FINAL | opcode, _MASKED | _LENGTH_16, length)
        else:
            header = struct.pack("!BBQ", _FINAL | opcode, _MASKED | _LENGTH_64, length)
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.write(b"".join((header, _NO_MASK, payload)))

    def send_text(self, message: str) -> None:
        """Buffered. Nothing happens on a connection that is gone: `receive` tells of that."""
        self._write_frame(_TEXT, message.encode())

    def send_binary(self, message: bytes) -> None:
        self._write_frame(_BINARY, message)

    def ping(self) -> None:
        self._write_frame(_PING, b"")

    async def close(self) -> None:
        """Say goodbye (code 1000) and close; what was sent before still goes out."""
        assert self._transport is not None
        self._write_frame(_CLOSE, struct.pack("!H", 1000))
        self._transport.close()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._lost.wait()
        except TimeoutError:
            self.abort()

    def abort(self) -> None:
        assert self._transport is not None
        self._transport.abort()
