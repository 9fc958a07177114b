"""How output reaches those who watch, and what they can do to the terminal besides typing: real serve, real shells."""

import asyncio
import contextlib
import hashlib
import json
import re
import socket
import time

import aiohttp
import psutil
import pytest

from tests.end_to_end.conftest import on_both_runtimes
from tests.end_to_end.harness import ADMIN_KEY, Serve

V1 = "code-sessions.v1"


class Events:
    """A client of Server-Sent Events that parses what the standard says, and reconnects when asked to."""

    def __init__(self, client, session, *, last_id="", headers=None):
        self.url = f"{client.origin}/api/v1/{session.path}/output/stream"
        self.headers = {"X-API-Key": ADMIN_KEY} if headers is None else headers
        self.last_id, self.seen, self.status, self.answer_headers = last_id, [], 0, {}

    @property
    def text(self):
        return "".join(data["text"] for name, data in self.seen if name == "output")

    async def read(self, query="", until=lambda _: False):
        """One connection, until it ends or `until` says so."""
        resume = {"Last-Event-ID": self.last_id} if self.last_id else {}
        async with (
            aiohttp.ClientSession(read_bufsize=2**24) as http,
            http.get(self.url + query, headers=self.headers | resume) as answer,
        ):
            self.status, self.answer_headers = answer.status, answer.headers
            fields = {}
            async for line in answer.content:
                name, _, value = line.decode().rstrip("\n").partition(":")
                if name:
                    fields[name] = value.removeprefix(" ")
                elif not line.strip():
                    self.last_id = fields.get("id", self.last_id)
                    if "data" in fields:
                        self.seen.append((fields.get("event", "message"), json.loads(fields["data"])))
                    fields = {}
                    if until(self):
                        return self
        return self


class Attached:
    """A WebSocket client."""

    def __init__(self, socket):
        self.socket, self.bytes, self.frames = socket, bytearray(), []

    async def receive(self):
        """The next message, taken in; False when the socket was closed."""
        message = await self.socket.receive()
        if message.type is aiohttp.WSMsgType.BINARY:
            self.bytes += message.data
        elif message.type is aiohttp.WSMsgType.TEXT:
            self.frames.append(json.loads(message.data))
        else:
            return False
        return True

    async def until(self, done, timeout_s=30):
        async with asyncio.timeout(timeout_s):
            while not done(self):
                assert await self.receive(), (self.socket.close_code, self.bytes[-500:], self.frames[-5:])
        return self

    async def until_closed(self, timeout_s=30):
        async with asyncio.timeout(timeout_s):
            while await self.receive():
                pass
        return self.socket.close_code

    def of(self, kind):
        return [frame for frame in self.frames if frame["type"] == kind]


@contextlib.asynccontextmanager
async def attached(client, session, query="", *, key=ADMIN_KEY, protocols=(), **options):
    headers = options.pop("headers", {}) | ({"X-API-Key": key} if key else {})
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(
            f"{client.origin}/pty/{session.id}{query}", headers=headers, protocols=protocols, max_msg_size=0, **options
        ) as found,
    ):
        yield Attached(found)


async def refusal(client, session, query="", **options):
    """The status with which an attach is refused before the upgrade."""
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with attached(client, session, query, **options):
            pass
    return refused.value.status


async def key_with(serve, *scopes, organization=None):
    """A new key's secret, beside the operator's unless it is to have an organization of its own."""
    listed = await command(serve, "keys", "list", "--json")
    own = next(key["organizationId"] for key in listed if key["operator"])
    beside = ["--organization", own] if organization is None else []
    made = await command(serve, "keys", "create", "--name", "test", *beside, "--json", *_scopes(scopes))
    return made["secret"]


def _scopes(scopes):
    return [part for scope in scopes for part in ("--scope", f"code-sessions:{scope}")]


async def command(serve, *arguments):
    process = await asyncio.create_subprocess_exec(
        serve.command[0], *arguments, env=serve.settings, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(output)


async def test_a_resize_reaches_the_program_and_stands_in_the_log_when_it_is_answered(client):
    session = await client.create("sized")
    await session.run("true")
    answer = await client.call("POST", f"{session.path}/resize", {"cols": 132, "rows": 43})
    assert answer.status == 200, answer
    assert answer.json["sessionId"] == session.id
    assert answer.json["terminal"] == {"state": "running", "cols": 132, "rows": 43}
    output = await client.call("GET", f"{session.path}/output")
    resizes = [chunk for chunk in output.json["chunks"] if chunk.get("type") == "resize"]
    assert [(chunk["cols"], chunk["rows"]) for chunk in resizes] == [(132, 43)]
    again = await client.call("POST", f"{session.path}/resize", {"cols": 132, "rows": 43})
    assert again.json == answer.json
    text, _ = await session.run("stty size")
    assert "43 132" in text
    await session.delete()
    ended = await client.call("POST", f"{session.path}/resize", {"cols": 80, "rows": 24})
    assert (ended.status, ended.json["code"]) == (409, "session-ended")


@on_both_runtimes("shared_serve")
async def test_a_signal_reaches_the_foreground_program_and_not_the_shell(client):
    session = await client.create("signalled")
    await session.run("true")
    for name, number in (("SIGINT", 2), ("SIGTERM", 15), ("SIGKILL", 9)):
        await session.send("sh -c 'echo sleeping-now; exec sleep 1000'\n")
        await session.until(r"sleeping-now\r\n")
        answer = await client.call("POST", f"{session.path}/signal", {"signal": name})
        assert (answer.status, answer.json) == (200, {"sent": True})
        await session.send("echo ended-with=$?\n")
        assert (await session.until(r"ended-with=\d+")).endswith(f"ended-with={128 + number}")
    await session.delete()


@pytest.mark.parametrize(
    ("call", "body", "field"),
    [
        ("resize", {"cols": 0, "rows": 24}, "cols"),
        ("resize", {"cols": 80, "rows": 1001}, "rows"),
        ("resize", {"cols": 80}, "rows"),
        ("resize", {"cols": "80", "rows": 24}, "cols"),
        ("signal", {"signal": "SIGSTOP"}, "signal"),
        ("signal", {"signal": 2}, "signal"),
        ("signal", {}, "signal"),
    ],
)
async def test_a_size_or_signal_that_cannot_be_is_refused_by_the_name_of_its_field(client, call, body, field):
    session = await client.create("refusing")
    answer = await client.call("POST", f"{session.path}/{call}", body)
    assert (answer.status, answer.json["code"]) == (400, "invalid-request")
    assert answer.json["errors"][0]["field"] == field
    await session.delete()


# Server-Sent Events


async def test_the_stream_gives_the_chunks_of_output_with_their_seqs_and_ends_with_the_session(client):
    session = await client.create("followed")
    await session.run("echo once")
    events = Events(client, session)
    following = asyncio.create_task(events.read())
    await session.run("printf '\\342\\202\\254uro\\n'")
    await session.delete()
    async with asyncio.timeout(20):
        await following
    assert events.answer_headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert events.answer_headers["X-Accel-Buffering"] == "no"
    assert events.answer_headers["Cache-Control"] == "no-store"
    output = await client.call("GET", f"{session.path}/output")
    *chunks, (last, end) = events.seen
    assert [data for _, data in chunks] == output.json["chunks"]
    assert [name for name, _ in chunks] == [chunk.get("type", "output") for chunk in output.json["chunks"]]
    assert (last, end["status"]) == ("end", "completed")
    assert "€uro" in events.text

    # A new client is told of the end, too; one that has seen it and connects again is told not to.
    seq = output.json["lastSeq"]
    again = await Events(client, session).read(f"?afterSeq={seq}")
    assert [name for name, _ in again.seen] == ["end"]
    assert (await Events(client, session, last_id=str(seq)).read()).seen == again.seen
    assert events.last_id == f"{seq}-end"
    assert (await Events(client, session, last_id=events.last_id).read()).status == 204


async def test_the_streams_last_event_id_wins_over_after_seq_and_base64_gives_exact_bytes(client):
    session = await client.create("resumed")
    await session.run("echo one")
    await session.delete()
    chunks = (await client.call("GET", f"{session.path}/output?encoding=base64")).json["chunks"]
    events = await Events(client, session, last_id="2").read("?afterSeq=1&encoding=base64")
    assert [data for name, data in events.seen if name != "end"] == chunks[2:]
    assert (await Events(client, session, last_id="two").read()).status == 400
    assert (await Events(client, session, headers={}).read()).status == 401


async def test_a_stream_that_reconnects_across_kills_of_serve_reads_every_line_once(serve):
    async with serve.client() as client:
        session = await client.create("flood")
        await session.run("stty -echo; PS1=; bind 'set enable-bracketed-paste off'")
        await session.send("seq 1 200000 | while mapfile -n 5000 -t a && ((${#a[@]})); do printf '%s\\n' \"${a[@]}\"; ")
        await session.send("sleep 0.05; done; echo all-''done\n")
        events = Events(client, session)

        async def follow():
            while "all-done" not in events.text[-2000:]:
                with contextlib.suppress(aiohttp.ClientError):
                    await events.read(until=lambda events: "all-done" in events.text[-2000:])
                await asyncio.sleep(0.05)

        following = asyncio.create_task(follow())
        for _ in range(3):
            await asyncio.sleep(0.7)
            serve.restart()
        async with asyncio.timeout(90):
            await following
    numbers = re.findall(r"^(\d+)\r?$", events.text, re.MULTILINE)
    assert numbers == [str(number) for number in range(1, 200_001)]
    seqs = [data["seq"] for _, data in events.seen]
    assert seqs == list(range(1, len(seqs) + 1))


# Tickets


async def test_a_ticket_opens_its_session_once_also_when_many_try_at_the_same_time(client):
    session, other = await client.create("ticketed"), await client.create("other")
    answer = await client.call("POST", f"{session.path}/tickets")
    assert answer.status == 201, answer
    assert answer.json["sessionId"] == session.id
    query = f"?ticket={answer.json['ticket']}"

    async def attempt():
        try:
            async with attached(client, session, query, key=None):
                return 101
        except aiohttp.WSServerHandshakeError as refused:
            return refused.status

    statuses = await asyncio.gather(*(attempt() for _ in range(20)))
    assert sorted(statuses) == [101] + [401] * 19

    elsewhere = (await client.call("POST", f"{session.path}/tickets")).json["ticket"]
    assert await refusal(client, other, f"?ticket={elsewhere}", key=None) == 401
    assert await refusal(client, session, f"?ticket={elsewhere}", key=None) == 401
    assert await refusal(client, session, f"?ticket={elsewhere}") == 400  # and a key
    streamed = (await client.call("POST", f"{session.path}/tickets")).json["ticket"]
    await session.delete()
    events = await Events(client, session, headers={}).read(f"?ticket={streamed}")
    assert events.seen[-1][0] == "end"
    await other.delete()


# The WebSocket


async def test_a_plain_socket_gives_bytes_and_takes_keystrokes_as_xterms_addon_does(client):
    session = await client.create("plain")
    await session.run("echo before")
    async with attached(client, session) as terminal:
        await terminal.until(lambda terminal: b"before" in terminal.bytes)
        await terminal.socket.send_str("echo six-$((2*3))\r")
        await terminal.socket.send_bytes(b"echo seven-$((3+4))\r")
        await terminal.until(lambda terminal: b"six-6" in terminal.bytes and b"seven-7" in terminal.bytes)
        await terminal.socket.send_str("exit 3\r")
        assert await terminal.until_closed() == 1000
        assert terminal.frames == []
    page = await client.call("GET", f"{session.path}/output?encoding=utf-8")
    assert terminal.bytes.decode() == "".join(chunk["text"] for chunk in page.json["chunks"])
    async with attached(client, session, "?tailBytes=0") as terminal:
        assert await terminal.until_closed(5) == 1000
        assert terminal.bytes == b""
    await session.delete()


async def test_the_subprotocol_marks_seqs_acknowledges_inputs_and_resumes_where_it_was_cut(client):
    session = await client.create("marked")
    await session.run("stty -echo; PS1=")
    async with attached(client, session, "?afterSeq=0", protocols=[V1]) as terminal:
        await terminal.socket.send_str(json.dumps({"type": "input", "id": "a", "text": "n=$((n+1)); echo count-$n\n"}))
        await terminal.until(lambda terminal: terminal.of("ack") and b"count-1" in terminal.bytes)
        # A mark says where the bytes before it end.
        await terminal.until(lambda terminal: terminal.of("seq")[-1]["offset"] == len(terminal.bytes))
        assert terminal.of("ack") == [{"type": "ack", "id": "a", "bytes": 26}]
        hello = terminal.frames[0]
        assert hello | {"cols": 80, "rows": 24} == hello
        assert (hello["type"], hello["sessionId"], hello["seq"]) == ("hello", session.id, 0)
        assert (hello["status"], hello["state"], hello["writable"]) == ("running", "running", True)
        assert terminal.of("start")[0]["seq"] == 1
        mark = terminal.of("seq")[-1]
    seen = terminal.bytes
    async with attached(client, session, f"?afterSeq={mark['seq']}", protocols=[V1]) as terminal:
        # The same id again is acknowledged, and not written twice.
        await terminal.socket.send_str(json.dumps({"type": "input", "id": "a", "text": "n=$((n+1)); echo count-$n\n"}))
        await terminal.until(lambda terminal: terminal.of("ack"))
        await terminal.socket.send_str(json.dumps({"type": "resize", "id": "r", "cols": 100, "rows": 30}))
        await terminal.until(lambda terminal: len(terminal.of("ack")) == 2 and terminal.of("resize"))
        await terminal.socket.send_str(json.dumps({"type": "input", "text": "echo total-$n; sleep 1000\n"}))
        await terminal.until(lambda terminal: b"total-1" in terminal.bytes)
        await asyncio.sleep(0.2)  # the sleep has to be there to be interrupted
        await terminal.socket.send_str(json.dumps({"type": "signal", "signal": "SIGINT"}))
        await terminal.socket.send_bytes(b"echo ended-$?; exit 5\n")
        await terminal.until(lambda terminal: terminal.of("exit"))
        assert b"ended-130" in terminal.bytes
        assert terminal.of("exit")[0]["exitCode"] == 5
        await client.call("DELETE", session.path)
        assert await terminal.until_closed() == 1000
        assert terminal.of("status") == [{"type": "status", "status": "completed"}]
    chunks = (await client.call("GET", f"{session.path}/output")).json["chunks"]
    assert (seen + terminal.bytes).decode() == "".join(chunk["text"] for chunk in chunks)


async def test_frames_that_are_none_are_answered_by_an_error_that_names_them_and_harm_nothing(client):
    session = await client.create("wrong")
    await session.run("true")
    async with attached(client, session, "?tailBytes=0", protocols=[V1]) as terminal:
        for frame in (
            "{",
            "[]",
            '{"type":"fly"}',
            '{"type":"input","id":"x","text":1}',
            '{"type":"signal","signal":"SIGSTOP"}',
        ):
            await terminal.socket.send_str(frame)
        await terminal.socket.send_str('{"type":"resize","id":"y","cols":0,"rows":1}')
        await terminal.until(lambda terminal: len(terminal.of("error")) == 6)
        assert {error["code"] for error in terminal.of("error")} == {"invalid-request"}
        assert [error.get("id") for error in terminal.of("error")] == [None, None, None, "x", None, "y"]
        assert [error["detail"].split(":")[0] for error in terminal.of("error")][3:] == ["text", "signal", "cols"]
        await terminal.socket.send_bytes(b"echo still-$((1+1))\n")
        await terminal.until(lambda terminal: b"still-2" in terminal.bytes)
    await session.delete()


async def test_who_may_attach_is_decided_before_the_upgrade(shared_serve, client):
    session = await client.create("guarded")
    await session.run("true")
    assert await refusal(client, session, key=None) == 401
    assert await refusal(client, session, key="wrong") == 401
    assert await refusal(client, session, headers={"Origin": "https://evil.example"}) == 403
    assert await refusal(client, session, "?afterSeq=1&tailBytes=2") == 400
    stranger = await key_with(shared_serve, "read", "write", organization="own")
    assert await refusal(client, session, key=stranger) == 404
    assert await refusal(client, session, key=await key_with(shared_serve, "write")) == 403
    async with attached(client, session, headers={"Origin": client.origin}) as terminal:
        await terminal.until(lambda terminal: terminal.bytes)
    plain = await client.call("GET", f"/pty/{session.id}")
    assert (plain.status, plain.json["code"]) == (426, "upgrade-required")
    await session.delete()


async def test_a_key_that_may_only_read_watches_and_is_told_that_it_cannot_type(shared_serve, client):
    session = await client.create("watched")
    await session.run("true")
    reader = await key_with(shared_serve, "read")
    async with attached(client, session, key=reader) as terminal:
        await terminal.until(lambda terminal: terminal.bytes)
        await terminal.socket.send_str("echo typed\r")
        assert await terminal.until_closed() == 4403
    async with attached(client, session, key=reader, protocols=[V1]) as terminal:
        await terminal.socket.send_bytes(b"echo typed\r")
        await terminal.socket.send_str('{"type":"resize","id":"r","cols":10,"rows":10}')
        await terminal.until(lambda terminal: len(terminal.of("error")) == 2)
        assert terminal.of("hello")[0]["writable"] is False
        assert [error["code"] for error in terminal.of("error")] == ["insufficient-scope"] * 2
        await session.run("echo $((40+2))-end")
        await terminal.until(lambda terminal: b"42-end" in terminal.bytes)
    assert b"typed" not in terminal.bytes
    await session.delete()


async def test_an_attachment_ends_soon_after_its_key_was_revoked_and_answers_pings_until_then(shared_serve, client):
    session = await client.create("revoked")
    await session.run("true")
    made = await command(shared_serve, "keys", "list", "--json")
    secret = await key_with(shared_serve, "read")
    known = {key["id"] for key in made}
    [new] = [key["id"] for key in await command(shared_serve, "keys", "list", "--json") if key["id"] not in known]
    async with attached(client, session, key=secret) as terminal:
        await terminal.until(lambda terminal: terminal.bytes)
        process = await asyncio.create_subprocess_exec(
            shared_serve.command[0], "keys", "revoke", new, env=shared_serve.settings, stdout=asyncio.subprocess.DEVNULL
        )
        assert await process.wait() == 0
        assert await terminal.until_closed(60) == 4401
    await session.delete()


async def test_keystrokes_sent_without_waiting_arrive_whole_and_in_order(client):
    session = await client.create("typist")
    await session.run("stty -echo -icanon; PS1=")
    await session.send("head -c 60000 | md5sum; echo read-''all\n")
    expected = "".join(f"{number:05d}." for number in range(10_000))
    async with attached(client, session, "?tailBytes=0") as terminal:
        for start in range(0, 60_000, 6):
            await terminal.socket.send_str(expected[start : start + 6])
        await terminal.until(lambda terminal: b"read-all" in terminal.bytes)
    assert hashlib.md5(expected.encode()).hexdigest().encode() in terminal.bytes
    await session.delete()


async def test_the_tail_is_what_a_new_client_gets_of_a_long_log(client):
    session = await client.create("tail")
    await session.run("seq 1 100000 | tr '\\n' ' '")
    whole = "".join(chunk["text"] for chunk in await _all_chunks(client, session)).encode()
    for tail_bytes in (1, 1000, 65536, 2**30):
        least = min(tail_bytes, len(whole))
        async with attached(client, session, f"?tailBytes={tail_bytes}", protocols=[V1]) as terminal:
            await terminal.until(lambda terminal, least=least: len(terminal.bytes) >= least)
            assert whole.endswith(terminal.bytes)
            assert len(terminal.bytes) <= tail_bytes + 65536
    await session.delete()


async def _all_chunks(client, session):
    chunks, after = [], 0
    while page := (await client.call("GET", f"{session.path}/output?afterSeq={after}")).json["chunks"]:
        chunks += page
        after = page[-1]["seq"]
    return chunks


async def test_a_client_that_reads_nothing_is_closed_and_nobody_else_notices(serve):
    async with serve.client() as client:
        session = await client.create("flooded")
        await session.run("stty -echo; PS1=")
        raw = socket.create_connection(("127.0.0.1", serve.port))
        request = (
            f"GET /pty/{session.id} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            f"X-API-Key: {ADMIN_KEY}\r\n\r\n"
        )
        raw.sendall(request.encode())
        async with attached(client, session, "?tailBytes=0") as fast:
            await session.send("head -c 48000000 /dev/zero | tr '\\0' x; echo all-''done\n")
            await fast.until(lambda fast: b"all-done" in fast.bytes[-100:], timeout_s=120)
            assert fast.bytes.count(b"x") == 48_000_000
            deadline = time.monotonic() + 40
            while _is_connected(raw, serve):
                assert time.monotonic() < deadline, serve.new_log()
                await asyncio.sleep(0.2)
            raw.close()
            await fast.socket.send_str("echo still-$((20+3))\n")
            await fast.until(lambda fast: b"still-23" in fast.bytes[-100:])


async def test_a_client_that_falls_further_and_further_behind_is_told_where_to_resume(serve):
    async with serve.client() as client:
        session = await client.create("behind")
        await session.run("stty -echo; PS1=; bind 'set enable-bracketed-paste off'")
        async with attached(client, session, "?tailBytes=0", protocols=[V1]) as slow:
            await session.send("while :; do head -c 1000000 /dev/zero | tr '\\0' x; done\n")
            # Slowly until it must have been given up, and then fast enough to see the goodbye.
            give_up = time.monotonic() + 9.5
            while await slow.receive():
                if time.monotonic() < give_up:
                    await asyncio.sleep(0.2)
        # 1006: on a busy machine even the goodbye may come too late, and then the connection is cut.
        assert slow.socket.close_code in {1013, 1006}
        after = slow.of("seq")[-1]["seq"]
        await session.delete()
        # Nothing is missing between what it has and what comes after the seq that it has.
        async with attached(client, session, f"?afterSeq={after}", protocols=[V1]) as again:
            await again.until(lambda again: again.of("seq") or again.of("truncated"))


def _is_connected(raw, serve):
    """Whether serve still has its end of the connection."""
    port = raw.getsockname()[1]
    return any(
        connection.raddr and connection.raddr.port == port and connection.status == "ESTABLISHED"
        for connection in psutil.Process(serve.process.pid).net_connections("tcp")
    )


async def test_a_stop_of_serve_tells_attached_clients_to_go_elsewhere_and_does_not_wait_for_them(serve):
    async with serve.client() as client:
        session = await client.create("stopping")
        await session.run("true")
        events = Events(client, session)
        following = asyncio.create_task(events.read())
        async with attached(client, session) as terminal, attached(client, session, protocols=[V1]) as marked:
            await terminal.until(lambda terminal: terminal.bytes)
            closing = [asyncio.create_task(one.until_closed()) for one in (terminal, marked)]
            began = time.monotonic()
            await asyncio.to_thread(serve.stop)
            assert time.monotonic() - began < 4
            assert await asyncio.gather(*closing) == [1001, 1001]
        await following
        assert events.seen


# Recordings


async def test_a_recording_replays_the_bytes_the_sizes_and_the_exit_and_reads_as_plain_text(client):
    session = await client.create("Recorded")
    await session.run("stty -echo; PS1=; bind 'set enable-bracketed-paste off'")
    await client.call("POST", f"{session.path}/resize", {"cols": 90, "rows": 20})
    await session.run("printf '10%%\\r20%%\\r\\033[Kdone \\033[1;31mred\\033[0m \\342\\202\\254\\n'")
    await session.send("exit 3\n")
    await session.until_state("exited")
    cast = await client.call("GET", f"{session.path}/recording")
    assert cast.headers["Content-Type"] == "application/x-asciicast"
    assert cast.headers["Content-Disposition"] == f'attachment; filename="{session.id}.cast"'
    header, *events = [json.loads(line) for line in cast.raw.decode().splitlines()]
    chunks = await _all_chunks(client, session)
    assert (header["version"], header["title"]) == (3, "Recorded")
    assert header["term"] | {"cols": 80, "rows": 24} == header["term"]
    assert "".join(data for _, code, data in events if code == "o") == "".join(chunk["text"] for chunk in chunks)
    assert [event[1:] for event in events if event[1] != "o"] == [["r", "90x20"], ["x", "3"]]
    text = await client.call("GET", f"{session.path}/recording?download=txt")
    assert text.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert "\ndone red €\n" in text.raw.decode()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]|10%|20%", text.raw.decode().partition("end")[2])
    assert (await client.call("GET", f"{session.path}/recording?download=gif")).status == 400
    await session.delete()


async def test_a_recording_of_a_live_session_is_what_there_is_now(client):
    session = await client.create("live")
    empty = await client.call("GET", f"{session.path}/recording")
    assert json.loads(empty.raw.decode().splitlines()[0])["version"] == 3
    await session.run("(while :; do echo tick; done) &")
    async with asyncio.timeout(20):
        text = await client.call("GET", f"{session.path}/recording?download=txt")
    assert b"tick" in text.raw
    await session.delete()


async def test_who_comes_after_the_log_was_trimmed_is_told_what_is_missing(tmp_path):
    serve = Serve(tmp_path / "data", CODE_SESSIONS_OUTPUT_RETENTION_BYTES="65536").start()
    try:
        async with serve.client() as client:
            session = await client.create("trimmed")
            await session.run("head -c 2000000 /dev/zero | tr '\\0' x")
            first_seq = (await client.call("GET", f"{session.path}/output")).json["firstSeq"]
            assert first_seq > 2
            async with attached(client, session, "?afterSeq=1", protocols=[V1]) as terminal:
                await terminal.until(lambda terminal: terminal.of("seq"))
            assert terminal.of("truncated") == [{"type": "truncated", "afterSeq": 1, "firstSeq": first_seq}]
            events = await Events(client, session).read("?afterSeq=1", until=lambda events: len(events.seen) > 1)
            assert events.seen[0] == ("truncated", {"afterSeq": 1, "firstSeq": first_seq})
            assert events.seen[1][1]["seq"] == first_seq
            cast = (await client.call("GET", f"{session.path}/recording")).raw.decode()
            assert f"# output before seq {first_seq} was trimmed" in cast.splitlines()
            await session.delete()
    finally:
        serve.stop()
        serve.remove_all()
