"""The sidecar's end of the link, against a control plane that the test plays over a real Unix socket."""

import asyncio

import pytest
from aiohttp import web

from sidecar import link as link_module
from sidecar.link import Link, LinkConfig
from sidecar.output_log import OutputLog
from sidecar.protocol import decode_json, decode_records, encode_json


class FakeTerminal:
    """Takes nothing and has nothing: what is tested here is the link."""

    def room(self):
        pass


class ControlPlane:
    """Each connection is handed to the test: `socket, hello = await plane.linked()`."""

    def __init__(self, folder):
        self.path = folder / "link-a.sock"
        self.refuse_with = None
        self.connections = asyncio.Queue()
        self.release = asyncio.Event()

    async def __aenter__(self):
        app = web.Application()
        app.router.add_get("/link", self._handle)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.UnixSite(self.runner, str(self.path)).start()
        return self

    async def __aexit__(self, *_):
        self.release.set()
        await self.runner.cleanup()

    async def _handle(self, request):
        if self.refuse_with:
            return web.Response(status=self.refuse_with)
        assert request.headers["Authorization"] == "Bearer token"
        socket = web.WebSocketResponse(heartbeat=0.2, max_msg_size=0)
        await socket.prepare(request)
        hello = decode_json(await socket.receive_str())
        ended = asyncio.Event()
        await self.connections.put((socket, hello, ended))
        await ended.wait()
        return socket

    async def linked(self, resume_after):
        socket, hello, ended = await asyncio.wait_for(self.connections.get(), 5)
        await socket.send_str(encode_json({"t": "welcome", "v": 1, "resumeAfter": resume_after}))
        return socket, hello, ended


@pytest.fixture
async def plane(tmp_path):
    async with ControlPlane(tmp_path) as plane:
        yield plane


@pytest.fixture
async def link(tmp_path):
    log = OutputLog()
    link = Link(LinkConfig(f"unix://{tmp_path}", "cs_a", "ws_a", "token", "boot"), log, FakeTerminal(), lambda: None)
    link.log = log
    running = asyncio.create_task(link.run())
    yield link
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def _records(socket):
    message = await asyncio.wait_for(socket.receive_bytes(), 5)
    return [record.seq for record in decode_records(message)]


async def test_it_sends_from_where_the_store_stands_again_after_every_cut(plane, link):
    for _ in range(5):
        link.log.write(b"x")
        link.log.take_batch()
    link.log.resume(0)
    socket, hello, ended = await plane.linked(resume_after=0)
    assert (hello["firstSeq"], hello["lastSeq"], hello["sessionId"]) == (1, 5, "cs_a")
    assert await _records(socket) == [1, 2, 3, 4, 5]
    await socket.send_str(encode_json({"t": "ack", "seq": 3}))
    await asyncio.sleep(0.05)
    ended.set()  # cut, though the store has lost everything after the second
    socket, hello, ended = await plane.linked(resume_after=2)
    assert await _records(socket) == [3, 4, 5]
    await socket.send_str(encode_json({"t": "resume", "after": 1}))
    assert await _records(socket) == [2, 3, 4, 5]
    ended.set()


async def test_small_output_does_not_wait_and_a_flood_is_gathered_until_it_is_acknowledged(plane, link):
    socket, _, ended = await plane.linked(resume_after=0)
    await asyncio.sleep(0.05)
    for number in range(50):
        link.log.write(b"%02d" % number)
        link.pump()
    assert await _records(socket) == [1]
    assert await _records(socket) == [2]
    await socket.send_str(encode_json({"t": "ack", "seq": 1}))
    assert await _records(socket) == [3]  # all the rest, in one chunk
    ended.set()


async def test_an_idle_link_lives_on_heartbeats_alone(plane, link, monkeypatch):
    monkeypatch.setattr(link_module, "HEARTBEAT_S", 0.2)
    _, _, ended = await plane.linked(resume_after=0)
    await asyncio.sleep(1.5)
    assert plane.connections.empty(), "it dialled again though it heard pings"
    ended.set()


async def test_a_control_plane_that_says_nothing_any_more_is_given_up(plane, link, monkeypatch):
    monkeypatch.setattr(link_module, "HEARTBEAT_S", 0.1)
    socket, _, ended = await plane.linked(resume_after=0)
    socket._req.transport.pause_reading()  # half-open: neither our pings are read nor any are sent
    socket._cancel_heartbeat()
    _, hello, second = await plane.linked(resume_after=0)
    assert hello["boot"] == "boot"
    ended.set()
    second.set()


async def test_a_session_that_is_gone_ends_the_sidecar(plane, tmp_path):
    plane.refuse_with = 410
    link = Link(LinkConfig(f"unix://{tmp_path}", "cs_a", "ws_a", "token", "boot"), OutputLog(), FakeTerminal(), None)
    await asyncio.wait_for(link.run(), 5)
    assert link.shutdown_requested.is_set()


@pytest.mark.parametrize("status", [401, 500, 503])
async def test_any_other_refusal_is_tried_again(plane, link, status):
    plane.refuse_with = status
    await asyncio.sleep(0.3)
    plane.refuse_with = None
    _, _, ended = await plane.linked(resume_after=0)
    ended.set()


async def test_another_replica_of_the_folder_is_dialled_when_one_is_dead(tmp_path, link):
    (tmp_path / "link-dead.sock").touch()
    plane = ControlPlane(tmp_path)
    plane.path = tmp_path / "link-b.sock"
    async with plane:
        _, _, ended = await plane.linked(resume_after=0)
        ended.set()


@pytest.mark.parametrize("message", ["{", '{"t":"ack","seq":99}', '{"t":"ack"}', b"\x09", b"\x02"])
async def test_what_is_no_protocol_ends_the_link_and_another_one_is_made(plane, link, message):
    socket, _, ended = await plane.linked(resume_after=0)
    await (socket.send_str(message) if isinstance(message, str) else socket.send_bytes(message))
    _, _, second = await plane.linked(resume_after=0)
    ended.set()
    second.set()


async def test_an_operation_of_a_newer_control_plane_is_refused_and_the_link_goes_on(plane, link):
    socket, _, ended = await plane.linked(resume_after=0)
    await socket.send_str(encode_json({"t": "request", "id": 7, "op": "teleport", "args": {}}))
    answer = decode_json(await asyncio.wait_for(socket.receive_str(), 5))
    assert (answer["t"], answer["id"], answer["code"]) == ("error", 7, "unknown-operation")
    ended.set()
