"""The only way out of a build: an HTTP proxy that leads to public addresses and nowhere else.

A build's network has no route out of it. This proxy, in the worker, resolves names itself and connects to the address
that it has checked, so a name that changes its mind leads nowhere. What is not public is refused: this machine,
private networks, link-local addresses (with the metadata services of clouds), other containers. A registry on a private
address can be allowed by name.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

import psutil

_PORTS: Final = frozenset({80, 443})
_HEAD_BYTES: Final = 64 * 1024
_PIECE_BYTES: Final = 64 * 1024
_AT_ONCE: Final = 128
_HEAD_S: Final = 30.0
_CONNECT_S: Final = 15.0
_IDLE_S: Final = 120.0
# Not `is_global`: that also refuses the documentation networks, which some mirrors of registries live behind.
_REFUSED: Final = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/3",
        "::/96", "::1/128", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/32", "2002::/16", "fc00::/7",
        "fe80::/10", "fec0::/10", "ff00::/8",
    )
)  # fmt: skip


class _Refused(Exception):
    """The message is for the build's log."""


class EgressProxy:
    """Connections for one build. `allowed` has `host` or `host:port` of what may be reached whatever its address is."""

    def __init__(self, allowed: frozenset[str] = frozenset(), say: Callable[[str], None] = lambda _: None) -> None:
        self._allowed, self._say = allowed, say
        self._open = 0
        self._told: set[str] = set()

    @asynccontextmanager
    async def listening(self, host: str) -> AsyncIterator[str]:
        """Listen on this address meanwhile; the proxy's URL. All connections end with it.

        Raises:
            OSError: it is no address of this machine.
        """
        connections: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._serve(reader, writer))
            connections.add(task)
            task.add_done_callback(connections.discard)

        server = await asyncio.start_server(accept, host, 0, limit=_HEAD_BYTES)
        try:
            yield f"http://{host}:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in connections:
                task.cancel()
            if connections:
                await asyncio.wait(connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            async with asyncio.timeout(_HEAD_S):
                head = await reader.readuntil(b"\r\n\r\n")
            host, port, first = _request(head)
            upstream_reader, upstream = await self._connect(host, port)
            try:
                if first:
                    upstream.write(first)
                else:
                    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await _both_ways(reader, upstream, upstream_reader, writer)
            finally:
                upstream.close()
        except _Refused as refused:
            self._tell(str(refused))
            body = f"{refused}\n".encode()
            writer.write(
                b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await writer.drain()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass  # the build sees its connection end
        finally:
            self._open -= 1
            writer.close()

    def _tell(self, refused: str) -> None:
        if refused not in self._told and len(self._told) < _AT_ONCE:
            self._told.add(refused)
            self._say(f"[a connection was refused: {refused}]")

    async def _connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        is_allowed = host in self._allowed or f"{host}:{port}" in self._allowed
        if self._open > _AT_ONCE:
            raise _Refused("too many connections at once")
        if port not in _PORTS and not is_allowed:
            raise _Refused(f"{host}:{port}: builds reach ports 80 and 443 only")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            raise _Refused(f"{host}: there is no such host") from None
        addresses = [str(item[4][0]) for item in found]
        if not is_allowed:
            own = own_addresses()
            addresses = [address for address in addresses if is_public(address) and address not in own]
        for address in addresses:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CONNECT_S):
                    return await asyncio.open_connection(address, port, limit=_PIECE_BYTES)
        raise _Refused(f"{host}:{port}: {'it does not answer' if addresses else 'builds reach public addresses only'}")


def is_public(address: str) -> bool:
    """Whether it leads out into the internet, also as an IPv4 address in IPv6 clothes."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return not any(parsed.version == network.version and parsed in network for network in _REFUSED)


def own_addresses() -> set[str]:
    """All of this machine: a service on its public address is no more for builds than one on loopback."""
    return {item.address.partition("%")[0] for items in psutil.net_if_addrs().values() for item in items}


def _request(head: bytes) -> tuple[str, int, bytes]:
    """(host, port, what to send there first): nothing for CONNECT, the request for one that names a whole URL."""
    line, _, rest = head.partition(b"\r\n")
    try:
        method, target, _ = line.decode("ascii").split(" ")
        parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
        host, port = parts.hostname or "", parts.port or (443 if method == "CONNECT" else 80)
    except ValueError:
        raise _Refused("not a request to a proxy") from None
    if not host or (method != "CONNECT" and parts.scheme != "http"):
        raise _Refused("not a request to a proxy")
    if method == "CONNECT":
        return host, port, b""
    path = parts.path or "/"
    query = f"?{parts.query}" if parts.query else ""
    kept = [
        field
        for field in rest.split(b"\r\n")
        if field and not field.lower().startswith((b"connection:", b"proxy-", b"keep-alive:"))
    ]
    # One request for a connection, so that none to another host can follow on it.
    return (
        host,
        port,
        b"\r\n".join([f"{method} {path}{query} HTTP/1.1".encode(), *kept, b"Connection: close", b"", b""]),
    )


async def _both_ways(
    reader: asyncio.StreamReader,
    upstream: asyncio.StreamWriter,
    upstream_reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_copy(reader, upstream))
        group.create_task(_copy(upstream_reader, writer))


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while True:
            async with asyncio.timeout(_IDLE_S):
                piece = await source.read(_PIECE_BYTES)
            if not piece:
                break
            sink.write(piece)
            await sink.drain()
    except (OSError, TimeoutError):
        sink.transport.abort()
        return
    with contextlib.suppress(OSError, RuntimeError):
        sink.write_eof()
