"""A blocking WebSocket client (RFC 6455): as little as possible between a server and the clock."""

import base64
import os
import socket
import struct

_TEXT, _BINARY, _CLOSE, _PING, _PONG = 1, 2, 8, 9, 10
_READ_BYTES = 256 * 1024


class Refused(Exception):
    """The server did not take the handshake; the message is its status line."""


class WebSocketConnection:
    def __init__(self, port, path, headers=(), *, timeout_s=60):
        self._socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [
            f"GET {path} HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key}",
            *headers,
        ]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode())
        head = b""
        while b"\r\n\r\n" not in head:
            piece = self._socket.recv(_READ_BYTES)
            if not piece:
                break
            head += piece
        status, _, _ = head.partition(b"\r\n")
        if b" 101 " not in status + b" ":
            self._socket.close()
            raise Refused(status.decode(errors="replace"))
        self._buffer = bytearray(head.partition(b"\r\n\r\n")[2])

    def _need(self, count):
        while len(self._buffer) < count:
            piece = self._socket.recv(_READ_BYTES)
            if not piece:
                raise ConnectionError("the server closed the connection")
            self._buffer += piece

    def receive(self):
        """The next message's bytes. Both servers send every message as one frame."""
        while True:
            self._need(2)
            kind, size, start = self._buffer[0] & 15, self._buffer[1], 2
            if size >= 126:
                start = 4 if size == 126 else 10
                self._need(start)
                size = int.from_bytes(self._buffer[2:start], "big")
            self._need(start + size)
            payload = bytes(self._buffer[start : start + size])
            del self._buffer[: start + size]
            if kind in {_TEXT, _BINARY}:
                return payload
            if kind == _CLOSE:
                raise ConnectionError(f"closed: {payload!r}")
            if kind == _PING:
                self._send(_PONG, payload)

    def send_text(self, text):
        self._send(_TEXT, text.encode())

    def _send(self, kind, payload):
        size = len(payload)
        length = bytes([0x80 | size]) if size < 126 else struct.pack("!BH", 0x80 | 126, size)
        # The mask is zero: both servers have to undo it all the same.
        self._socket.sendall(bytes([0x80 | kind]) + length + bytes(4) + payload)

    def close(self):
        self._socket.close()
