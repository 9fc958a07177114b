"""A proxy that does to a connection what bad networks do: freeze, cut, swallow one direction, dribble, throttle."""

import asyncio
import contextlib
import re
import socket
import struct
import time
from pathlib import Path

_PIECE_BYTES = 64 * 1024
_LINGER_0 = struct.pack("ii", 1, 0)  # socket(7): closing sends RST and drops what is buffered


class Flow:
    """One direction of a connection. Whatever is set here holds from the next piece on."""

    def __init__(self, connection):
        self._connection = connection
        self._thawed = asyncio.Event()
        self._thawed.set()
        self.passed_bytes = 0
        self.swallow = False  # the sender goes on, the receiver gets nothing, not even the end
        self.delay_s = 0.0  # before each piece
        self.dribble = None  # a random.Random: pieces of 1 to 7 bytes
        self.rate_bytes_s = None
        self.cut_after_bytes = None  # so many more, then the whole connection is cut

    def freeze(self):
        self._thawed.clear()

    def thaw(self):
        self._thawed.set()

    async def run(self, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(_PIECE_BYTES):
                await self._pass_on(data, writer)
        await self._thawed.wait()
        if self.swallow:
            await asyncio.Event().wait()  # this end is not told; `cut` and its own end are all that is left
        writer.close()

    async def _pass_on(self, data, writer):
        for piece in self._pieces(data):
            await self._thawed.wait()
            if self.swallow:
                return
            rate_bytes_s = self.rate_bytes_s
            pause_s = self.delay_s + (len(piece) / rate_bytes_s if rate_bytes_s else 0)
            if pause_s:
                await asyncio.sleep(pause_s)
                await self._thawed.wait()
            left = self.cut_after_bytes
            if left is not None:
                self.cut_after_bytes = max(0, left - len(piece))
            writer.write(piece[:left])
            self.passed_bytes += len(piece)
            if left is not None and not self.cut_after_bytes:
                await asyncio.sleep(0)
                self._connection.cut()
                return
            await writer.drain()

    def _pieces(self, data):
        position = 0
        while position < len(data):
            size = len(data)
            if self.dribble:
                size = self.dribble.randint(1, 7)
            elif self.rate_bytes_s:
                size = max(1, int(self.rate_bytes_s) // 10)
            yield data[position : position + size]
            position += size


class Connection:
    """What came in and what was opened for it. `up` flows from who dialled, `down` to it."""

    def __init__(self, client, server):
        self._ends = (client, server)
        self.up, self.down = Flow(self), Flow(self)
        self.ended = asyncio.Event()
        self.head = b""  # the first bytes from who dialled: its HTTP request

    @property
    def session_id(self):
        found = re.search(rb"\r\nX-Session-Id: (\S+)\r\n", self.head)
        return found[1].decode() if found else None

    @property
    def target_port(self):
        """Our own port towards the target, by which that one knows this connection."""
        return self._ends[1][1].get_extra_info("sockname")[1]

    def freeze(self):
        """Nothing passes; both ends think that they are connected."""
        self.up.freeze()
        self.down.freeze()

    def thaw(self):
        self.up.thaw()
        self.down.thaw()

    def cut(self):
        """At once and for both ends; what was under way is gone. TCP ends get RST."""
        for _, writer in self._ends:
            sock = writer.get_extra_info("socket")
            if sock.family != socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
            writer.transport.abort()

    async def run(self):
        (client_reader, client_writer), (server_reader, server_writer) = self._ends
        flows = [
            asyncio.create_task(self.up.run(_Remembering(client_reader, self), server_writer)),
            asyncio.create_task(self.down.run(server_reader, client_writer)),
        ]
        try:
            # A side that ended lets the other finish; one that swallows is kept until both ends have gone.
            await asyncio.gather(*flows)
        finally:
            for flow in flows:
                flow.cancel()
            await asyncio.gather(*flows, return_exceptions=True)
            self.cut()


class _Remembering:
    """A reader whose first bytes tell whose connection it is."""

    def __init__(self, reader, connection):
        self._reader, self._connection = reader, connection

    async def read(self, count):
        data = await self._reader.read(count)
        if b"\r\n\r\n" not in self._connection.head:
            self._connection.head += data
        return data


class FaultProxy:
    """Listens on an address and forwards each connection to another. Addresses: a socket's Path, or (host, port).

    `on_connection(connection)` is called before anything passes, so that it may set faults from the first byte on.
    """

    def __init__(self, listen, target, on_connection=lambda connection: None):
        self._listen, self._target, self._on_connection = listen, target, on_connection
        self._tasks = set()
        self.connections = []  # the open ones, oldest first

    async def __aenter__(self):
        if isinstance(self._listen, Path):
            self._server = await asyncio.start_unix_server(self._accept, str(self._listen))
        else:
            self._server = await asyncio.start_server(self._accept, *self._listen)
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            if isinstance(self._target, Path):
                server = await asyncio.open_unix_connection(str(self._target))
            else:
                server = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        connection = Connection((reader, writer), server)
        self.connections.append(connection)
        try:
            self._on_connection(connection)
            await connection.run()
        except asyncio.CancelledError:
            pass  # the proxy ends, and asyncio's server would log a cancelled handler as an error
        finally:
            self.connections.remove(connection)
            connection.ended.set()

    def of_session(self, session_id):
        """The session's newest link, None when it has none."""
        return next((link for link in reversed(self.connections) if link.session_id == session_id), None)

    async def link_of(self, session_id, timeout_s=60):
        """The same, as soon as there is one that carried something both ways."""
        deadline = time.monotonic() + timeout_s
        while not ((link := self.of_session(session_id)) and link.up.passed_bytes and link.down.passed_bytes):
            assert time.monotonic() < deadline, "no link comes up"
            await asyncio.sleep(0.02)
        return link


@contextlib.asynccontextmanager
async def before_the_link(link_dir):
    """Take the place of a control plane's link socket: what dials from now on goes through the proxy."""
    (real,) = link_dir.glob("link-*.sock")
    hidden = real.with_suffix(".real")
    real.rename(hidden)
    async with FaultProxy(real, hidden) as proxy:
        yield proxy
