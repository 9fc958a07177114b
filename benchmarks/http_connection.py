"""A blocking HTTP/1.1 client on one keep-alive connection: as little as possible between the product and the clock.

`send` and `receive` are apart, so that a poll can be held while something else is done.
"""

import json
import re
import socket

_READ_BYTES = 256 * 1024


class Connection:
    def __init__(self, port, key, *, timeout_s=60):
        self._socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._headers = f"Host: 127.0.0.1:{port}\r\nX-API-Key: {key}\r\n"

    def send(self, method, path, body=None):
        head = f"{method} /api/v1/{path} HTTP/1.1\r\n{self._headers}"
        data = b"" if body is None else json.dumps(body).encode()
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        self._socket.sendall(head.encode() + b"\r\n" + data)

    def receive(self):
        """The next answer's JSON; an error's as an exception."""
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._some()
        head, rest = data[:end], data[end + 4 :]
        status = int(head[9:12])
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        body = bytearray(int(length[1]) if length else 0)
        body[: len(rest)] = rest
        view, at = memoryview(body), len(rest)
        while at < len(body):
            taken = self._socket.recv_into(view[at:])
            if not taken:
                raise ConnectionError("the answer is cut short")
            at += taken
        if status >= 400:
            raise RuntimeError(f"{status}: {bytes(body)!r}")
        return json.loads(body) if body else None

    def _some(self):
        data = self._socket.recv(_READ_BYTES)
        if not data:
            raise ConnectionError("the server closed the connection")
        return data

    def call(self, method, path, body=None):
        self.send(method, path, body)
        return self.receive()

    def close(self):
        self._socket.close()
