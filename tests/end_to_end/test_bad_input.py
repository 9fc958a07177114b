"""Bad input for every call: the contract's status and problem document, and the system works on afterwards."""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from yarl import URL

from orchestrator.store.connection import connect
from tests.end_to_end.harness import Answer, Serve, SessionClient

READ, WRITE, DEPLOY = "code-sessions:read", "code-sessions:write", "code-sessions:deploy"
MIB = 1024 * 1024
JSON = {"Content-Type": "application/json"}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the API; `{…}` in the path is the kind of id that it takes, `body` what it accepts."""

    method: str
    path: str
    scope: str
    body: dict | None = None

    def __str__(self):
        return f"{self.method}-{self.path}"

    @property
    def takes_id(self):
        return "{" in self.path

    @property
    def takes_body(self):
        return self.method == "POST"


CREATE = Call("POST", "code-sessions", WRITE, {"projectName": "bad-input", "projectDescription": ""})
LIST = Call("GET", "code-sessions", READ)
SHOW = Call("GET", "code-sessions/{session}", READ)
INPUT = Call("POST", "code-sessions/{session}/input", WRITE, {"text": ""})
OUTPUT = Call("GET", "code-sessions/{session}/output", READ)
START = Call("POST", "code-sessions/{session}/terminal", WRITE, {"cols": 80, "rows": 24})
TERMINAL = Call("GET", "code-sessions/{session}/terminal", READ)
DEPLOYMENT = Call("POST", "code-sessions/{session}/deploy", DEPLOY, {})
DELETE = Call("DELETE", "code-sessions/{session}", WRITE)
APPS = Call("GET", "apps", READ)
APP = Call("GET", "apps/{app}", READ)
APP_DEPLOYMENTS = Call("GET", "apps/{app}/deployments", READ)
SHOW_DEPLOYMENT = Call("GET", "deployments/{deployment}", READ)
CALLS = [
    CREATE, LIST, SHOW, INPUT, OUTPUT, START, TERMINAL, DEPLOYMENT, DELETE, APPS, APP, APP_DEPLOYMENTS, SHOW_DEPLOYMENT,
]  # fmt: skip
WITH_ID = [call for call in CALLS if call.takes_id]
WITH_BODY = [call for call in CALLS if call.takes_body]
each_call = pytest.mark.parametrize("call", CALLS, ids=str)
each_call_with_id = pytest.mark.parametrize("call", WITH_ID, ids=str)
each_call_with_body = pytest.mark.parametrize("call", WITH_BODY, ids=str)


def check_problem(answer, status, code=None, *, naming=()):
    """An RFC 9457 document with what the contract wants in it; `naming`: what its detail must name."""
    assert answer.status == status, answer
    assert answer.headers["Content-Type"].startswith("application/problem+json"), answer
    problem = answer.json
    assert problem["status"] == status
    assert code is None or problem["code"] == code, answer
    for member in ("type", "title", "detail", "code"):
        assert isinstance(problem[member], str), answer
        assert problem[member], answer
    assert "Traceback" not in answer.raw.decode()
    assert not re.search(r'File "|<html|pydantic|redis', answer.raw.decode(), re.IGNORECASE)
    for name in (naming,) if isinstance(naming, str) else naming:
        assert name in problem["detail"], answer
    if status == 401:
        assert "WWW-Authenticate" in answer.headers
    if status in {429, 503}:
        assert int(answer.headers["Retry-After"]) >= 0
    return problem


async def send(client, call, ids, *, headers=None, data=None, body=None, query=""):
    """The call as it stands in the table, or with another body; the path goes out exactly as it is here."""
    url = f"{client.origin}/api/v1/{call.path.format(**ids)}{query}"
    if data is None and call.takes_body:
        data, headers = json.dumps(call.body if body is None else body).encode(), JSON | (headers or {})
    return await raw(client, call.method, url, headers=headers, data=data)


async def raw(client, method, url, *, headers=None, data=None):
    timeout = aiohttp.ClientTimeout(total=30)
    async with client._http.request(
        method, URL(url, encoded=True), data=data, headers=headers, timeout=timeout, skip_auto_headers=["Content-Type"]
    ) as response:
        return Answer(response.status, response.headers, await response.read())


def keys_command(serve, *arguments):
    command = [str(Path(sys.executable).with_name("code-sessions")), "keys", *arguments, "--json"]
    environment = {**os.environ, "CODE_SESSIONS_DATA_DIR": str(serve.data_dir)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def make_key(serve, *scopes, organization=None):
    arguments = [part for scope in scopes for part in ("--scope", scope)]
    if organization:
        arguments += ["--organization", organization]
    return keys_command(serve, "create", "--name", "test", *arguments)


async def expire(serve, key):
    async with connect(serve.data_dir / "run" / "store.sock") as store:
        await store.hset(f"cs:{{keys}}:key:{key['id']}", "expires_at", "1")


@pytest.fixture(scope="module")
def world(shared_serve):
    """What the tests of this module share: a session in each state, an application, and keys of all kinds."""
    return asyncio.run(_make_world(shared_serve))


async def _make_world(serve):
    async with serve.client() as client:
        session, ended, failed = [await client.create(name) for name in ("shared", "ended", "failed")]
        shown = await failed.until_status("running")
        await ended.run("echo kept")
        await session.run("stty -echo; PS1=; bind 'set enable-bracketed-paste off'; echo '<p>hi' > index.html")
        organization = shown["organizationId"]

        def key(*scopes, **options):
            return asyncio.to_thread(make_key, serve, *scopes, **options)

        every = {READ, WRITE, DEPLOY}
        *without, stranger, revoked, expired = await asyncio.gather(
            *(key(*(every - {scope}), "api-keys:admin", organization=organization) for scope in (READ, WRITE, DEPLOY)),
            key(READ, WRITE, DEPLOY, "api-keys:admin"),
            key(*every, organization=organization),
            key(*every, organization=organization),
        )
        keys_command(serve, "revoke", revoked["id"])
        await expire(serve, expired)
        await ended.delete()
        next(p for p in serve.processes() if failed.id in p.environ().get("CODE_SESSIONS_SESSION_ID", "")).kill()
        await failed.until_status("failed")
        deployment = await session.deploy()
        assert deployment["status"] == "running", deployment
    return SimpleNamespace(
        ids={"session": session.id, "app": deployment["appId"], "deployment": deployment["id"]},
        ended=ended.id,
        failed=failed.id,
        without=dict(zip((READ, WRITE, DEPLOY), (key["secret"] for key in without), strict=True)),
        stranger=stranger["secret"],
        revoked=revoked["secret"],
        expired=expired["secret"],
    )


@pytest.fixture
async def session(client, world):
    """The shared session, which still works after the test."""
    session = SessionClient(client, world.ids["session"])
    session.after = (await client.call("GET", f"{session.path}/output?afterSeq=999999999")).json["lastSeq"]
    session.seqs = [session.after]  # a marker of its own in each test
    yield session
    text, status = await session.run("echo still''-works", 10)
    assert status == 0
    assert "still-works" in text
    assert (await session.show())["status"] == "running"


@pytest.fixture(autouse=True)
def no_complaint(shared_serve):
    """Nothing of what a caller sends is an error of ours."""
    before = len(shared_serve.new_log())
    yield
    log = shared_serve.new_log()[before:]
    assert "Traceback" not in log, log
    assert "unexpected error" not in log, log


# Who calls


@each_call
async def test_a_call_without_a_good_key_is_refused(shared_serve, world, call, session):
    good = session.client.key
    keys = ["", "x", "kéy", good[:-1], good + "x", "cs_" + "a" * 60, "x" * 5000, world.revoked, world.expired]
    async with shared_serve.client(None) as nobody:
        check_problem(await send(nobody, call, world.ids), 401, "unauthenticated")
        for key in keys:
            for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
                check_problem(await send(nobody, call, world.ids, headers=headers), 401, "unauthenticated")
        for value in ("Basic dXNlcjpwYXNz", "Bearer", good):
            check_problem(await send(nobody, call, world.ids, headers={"Authorization": value}), 401)


async def test_either_header_will_do_and_two_different_keys_are_refused(shared_serve, world, session):
    good = session.client.key
    async with shared_serve.client(None) as nobody:
        for headers in ({"X-API-Key": good}, {"Authorization": f"Bearer {good}"}, {"authorization": f"bearer {good}"}):
            assert (await send(nobody, SHOW, world.ids, headers=headers)).status == 200
        both = {"X-API-Key": good, "Authorization": f"Bearer {good}"}
        assert (await send(nobody, SHOW, world.ids, headers=both)).status == 200
        differing = {"X-API-Key": good, "Authorization": f"Bearer {world.stranger}"}
        check_problem(await send(nobody, SHOW, world.ids, headers=differing), 400, naming="X-API-Key")


@each_call
async def test_a_key_without_the_scope_is_told_which_it_needs(shared_serve, world, call, session):
    async with shared_serve.client(world.without[call.scope]) as client:
        check_problem(await send(client, call, world.ids), 403, "insufficient-scope", naming=call.scope)


@each_call_with_id
async def test_another_organizations_objects_do_not_exist(shared_serve, world, call, session):
    async with shared_serve.client(world.stranger) as stranger:
        theirs = await send(stranger, call, world.ids)
        unknown = {name: _unknown_of(id_) for name, id_ in world.ids.items()}
        nobodys = await send(stranger, call, unknown)
        check_problem(theirs, 404, nobodys.json["code"])
        assert theirs.json.keys() == nobodys.json.keys()


def _unknown_of(id_):
    return id_[:-4] + "aaaa"


async def test_another_organization_sees_empty_lists(shared_serve, world, session):
    async with shared_serve.client(world.stranger) as stranger:
        assert (await stranger.call("GET", "code-sessions")).json == {"sessions": [], "nextCursor": None}
        assert (await stranger.call("GET", "apps")).json == {"apps": []}


async def test_a_key_over_its_rate_is_told_when_to_come_again(tmp_path):
    serve = Serve(tmp_path / "data", CODE_SESSIONS_RATE_LIMIT_PER_MINUTE="5").start()
    try:
        key = make_key(serve, READ)
        async with serve.client(key["secret"]) as client, serve.client() as operator:
            for left in (4, 3, 2, 1, 0):
                answer = await client.call("GET", "code-sessions")
                assert answer.status == 200
                assert answer.headers["RateLimit-Limit"] == "5"
                assert answer.headers["RateLimit-Remaining"] == str(left)
            for call in CALLS:
                ids = {"session": "cs_a", "app": "app_a", "deployment": "dep_a"}
                refused = await send(client, call, ids)
                check_problem(refused, 429, "rate-limited")
                assert refused.headers["RateLimit-Limit"] == "5"
                assert refused.headers["RateLimit-Remaining"] == "0"
                assert 0 < int(refused.headers["RateLimit-Reset"]) <= 60
                assert 0 < int(refused.headers["Retry-After"]) <= 60
            assert (await client.call("GET", "/healthz")).status == 200
            for _ in range(10):
                assert (await operator.call("GET", "code-sessions")).status == 200
    finally:
        serve.stop()


# What it calls

UNKNOWN_IDS = [
    "x", "-", "0", "cs_", "cs_a", "CS_AAAA", "ws_aaaaaaaaaaaaaaaaaaaa", "cs_aaaaaaaaaaaaaaaaaaaa", "a" * 300,
    "cs_" + "a" * 3000,
    "%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%2f", "cs_%00", "%00", "%0a", "cs_%F0%9F%98%80", "%ff%fe", "%25",
    "{id}", "*",
    "cs:%7Bcs_a%7D:session", "%3Cscript%3E", "%22", "a%20b", ".", "null",
]  # fmt: skip


@each_call_with_id
async def test_an_unknown_id_of_whatever_shape_is_not_found(world, client, call, session):
    for id_ in UNKNOWN_IDS:
        answer = await send(client, call, dict.fromkeys(world.ids, id_))
        problem = check_problem(answer, 404)
        assert len(problem["detail"]) < 4000
    # Ids of another kind are unknown too.
    names = list(world.ids)
    others = {name: world.ids[names[place - 1]] for place, name in enumerate(names)}
    check_problem(await send(client, call, others), 404)


@pytest.mark.parametrize(
    "path",
    ["/", "/api", "/api/v1", "/api/v1/", "/api/v1/code-session", "/api/v1/code-sessions/", "/api/v2/code-sessions",
     "/favicon.ico", "/link", "/healthz/", "//", "/api/v1/code-sessions/{session}/",
     "/api/v1/code-sessions/{session}/x",
     "/api/v1/%2e%2e/%2e%2e/etc/passwd", "/%ff", "/%00", "/api/v1/code-sessions//output", "/" + "x" * 6000],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_an_unknown_path_is_not_found(world, client, method, path):
    check_problem(await raw(client, method, client.origin + path.format(**world.ids)), 404, "not-found")


async def test_a_path_longer_than_any_is_refused(client):
    check_problem(await raw(client, "GET", client.origin + "/" + "x" * 60_000), 400)


PATHS = [*sorted({call.path for call in CALLS}), "/healthz", "/readyz"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_wrong_method_is_told_the_right_ones(world, client, session, path):
    right = {call.method for call in CALLS if call.path == path} or {"GET"}
    if "GET" in right:
        right.add("HEAD")
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - right:
        url = client.origin + (path if path.startswith("/") else f"/api/v1/{path.format(**world.ids)}")
        answer = await raw(client, method, url, headers=JSON, data=b"{}")
        check_problem(answer, 405, "method-not-allowed")
        assert {name.strip() for name in answer.headers["Allow"].split(",")} == right


async def test_health_and_readiness_need_no_key_and_mind_no_nonsense(shared_serve):
    async with shared_serve.client(None) as nobody:
        for path in ("/healthz", "/readyz", "/healthz?x=1", "/readyz?x=%00"):
            for headers in ({}, {"X-API-Key": "wrong"}, {"Authorization": "Bearer é"}):
                assert (await nobody.call("GET", path, headers=headers)).json["status"] == "ok"


QUERIES = [
    (OUTPUT, "afterSeq", ["-1", "1.5", "x", "", "1e3", "0x10", "%D9%A3", "%00", "+1", "99999999999999999999999",
        "null", "1%20"]),
    (OUTPUT, "limit", ["0", "-1", "10001", "x", "", "1.0", "99999999999999999999999"]),
    (OUTPUT, "wait", ["-1", "60.1", "61", "x", "", "nan", "inf", "1e1", "1_0"]),
    (OUTPUT, "encoding", ["", "utf-16", "BASE64", "%00"]),
    (OUTPUT, "after_seq", ["1"]),
    (OUTPUT, "AfterSeq", ["1"]),
    (OUTPUT, "anything", ["1", ""]),
    (LIST, "status", ["", "RUNNING", "ended", "x", "%00", "running%00"]),
    (LIST, "limit", ["0", "-1", "201", "x", "", "1.0"]),
    (LIST, "cursor", ["x", "%00", "%C3%A9", "AAAA", "MTp4", "LTE6Y3NfYWFhYQ==x", "a" * 201, "%F0%9F%98%80",
        "bm90OmNzX2FhYWE",
                      "Og", "MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDpjc19h"]),
    (LIST, "anything", ["1"]),
]  # fmt: skip


@pytest.mark.parametrize(("call", "name", "values"), QUERIES, ids=lambda value: value if isinstance(value, str) else "")
async def test_a_bad_query_parameter_is_named(world, client, session, call, name, values):
    for value in values:
        answer = await send(client, call, world.ids, query=f"?{name}={value}")
        check_problem(answer, 400, "invalid-request", naming=name)


async def test_a_parameter_given_twice_is_named(world, client, session):
    for call, query, name in [
        (OUTPUT, "?afterSeq=1&afterSeq=1", "afterSeq"),
        (OUTPUT, "?limit=1&wait=0&limit=2", "limit"),
        (LIST, "?status=running&status=running", "status"),
    ]:
        check_problem(await send(client, call, world.ids, query=query), 400, naming=name)


# What it sends


@each_call_with_body
@pytest.mark.parametrize(
    "given",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml",
     "json", "",
     "application/json; charset=utf-16", "application/json; charset=nonsense", "application/json-patch+json"],
)  # fmt: skip
async def test_a_body_that_is_not_announced_as_json_is_refused(world, client, session, call, given):
    headers = {} if given is None else {"Content-Type": given}
    data = json.dumps(call.body or {"x": 1}).encode()
    check_problem(await send(client, call, world.ids, headers=headers, data=data), 415, "unsupported-media-type")


NO_OBJECTS = [
    b"{", b"}", b"[", b"nothing", b"{'text': 1}", b'{"a": 1,}', b'{"a": NaN}', b'{"a": Infinity}',
    b'{"a": -Infinity}',
    b'{"a": 1} x', b'{"a": 1}{"a": 1}', b'{"a": "\n"}', b'{"a": "\x00"}', b"\x00", b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}', b'{"a": "\\x"}', b'{"a": "\\ud8"}', b"null", b"true", b"1",
    b'"text"', b"[]", b"[{}]",
    b'{"a":' * 5000 + b"1" + b"}" * 5000, b"[" * 1_000_000, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"a": ' + b"9" * 10_000 + b"}", b'{"a": 1e999999}',
]  # fmt: skip


@each_call_with_body
async def test_what_is_no_json_object_is_refused(world, client, session, call):
    for data in NO_OBJECTS:
        check_problem(await send(client, call, world.ids, headers=JSON, data=data), 400, "invalid-request")


@pytest.mark.parametrize("call", [CREATE, INPUT], ids=str)
@pytest.mark.parametrize("data", [b"", b" ", b"\n"])
async def test_an_empty_body_is_refused_where_fields_are_required(world, client, session, call, data):
    check_problem(await send(client, call, world.ids, headers=JSON, data=data), 400, "invalid-request")


NAME, DESCRIPTION = {"projectName": "n"}, {"projectDescription": "d"}
FIELDS = [
    (CREATE, {}, ["projectName", "projectDescription"]),
    (CREATE, NAME, ["projectDescription"]),
    (CREATE, DESCRIPTION, ["projectName"]),
    (CREATE, {"project_name": "n", **DESCRIPTION}, ["projectName", "project_name"]),
    (CREATE, {**NAME, **DESCRIPTION, "userId": "user_x"}, ["userId"]),
    (CREATE, {**NAME, **DESCRIPTION, "organizationId": "org_x"}, ["organizationId"]),
    (CREATE, {**NAME, **DESCRIPTION, "id": "cs_x", "status": "running"}, ["id", "status"]),
    *[(CREATE, {**DESCRIPTION, "projectName": value}, ["projectName"]) for value in (
        None, 1, 1.5, True, [], ["a"], {}, "", " ", "\t", "\u3000", "a\u0000b", "a\nb", "a\x1b[31mb", "\x7f", "\x85",
        "x" * 101,
        "😀" * 101, "\ud83d", "a\udc00b")],
    *[(CREATE, {**NAME, "projectDescription": value}, ["projectDescription"]) for value in (
        None, 1, False, [], {}, "a\u0000b", "\x1b", "x" * 2001, "😀" * 2001, "\udfff")],
    (INPUT, {}, ["text"]),
    (INPUT, {"Text": "x"}, ["text", "Text"]),
    (INPUT, {"text": "x", "more": 1}, ["more"]),
    (INPUT, {"text": "x", "": 1}, []),
    *[(INPUT, {"text": value}, ["text"]) for value in (
        None, 1, True, ["x"], {"a": "b"}, "\ud800", "ok\udc00ok", "\ude00\ud83d")],
    (START, {"cols": 80, "rows": 24, "depth": 1}, ["depth"]),
    *[(START, {"cols": value}, ["cols"]) for value in (0, -1, 1001, 80.5, "80", True, [], {}, 10**30)],
    *[(START, {"rows": value}, ["rows"]) for value in (0, -1, 1001, 24.5, "24", False, [], {})],
    (DEPLOYMENT, {"force": True}, ["force"]),
    (DEPLOYMENT, {"sessionId": "cs_x"}, ["sessionId"]),
]  # fmt: skip


@pytest.mark.parametrize("call", WITH_BODY, ids=str)
async def test_missing_unknown_and_mistyped_fields_are_named(world, client, session, call):
    for of, body, named in FIELDS:
        if of is call:
            answer = await send(client, call, world.ids, body=body)
            check_problem(answer, 400, "invalid-request", naming=named)
    before = len((await client.call("GET", "code-sessions?limit=200")).json["sessions"])
    assert before == len(
        {entry["id"] for entry in (await client.call("GET", "code-sessions?limit=200")).json["sessions"]}
    )


async def test_a_field_given_twice_is_named(world, client, session):
    for call, data, name in [
        (INPUT, b'{"text": "a", "text": "b"}', "text"),
        (CREATE, b'{"projectName": "a", "projectDescription": "", "projectName": "b"}', "projectName"),
    ]:
        check_problem(await send(client, call, world.ids, headers=JSON, data=data), 400, naming=name)


async def test_nothing_refused_has_made_a_session(world, client):
    sessions = (await client.call("GET", "code-sessions?limit=200")).json["sessions"]
    assert {"shared", "ended", "failed"} == {entry["projectName"] for entry in sessions}


@pytest.mark.parametrize(
    "name", ["😀" * 100, "日本語", "..", "../../etc", "-rf", "a/b", "$(id)", "`id`", "'\"", "x" * 100, "é"]
)
async def test_a_strange_name_is_only_a_name(shared_serve, client, name):
    session = await client.create(name, "Line one\r\n\tLine two " + "😀" * 1900)
    assert (await session.show())["projectName"] == name
    text, status = await session.run("stty -echo; pwd", 20)
    assert status == 0
    home = re.escape(str(shared_serve.data_dir / "workspaces"))
    assert re.search(rf"{home}/ws_\w+/home/[A-Za-z0-9._-]+\r\n", text), text
    await session.delete()


async def test_two_mebibytes_of_text_are_too_large_and_exactly_one_arrives(world, client, session):
    for size in (MIB + 1, 2 * MIB):
        answer = await send(client, INPUT, world.ids, body={"text": "x" * size})
        check_problem(answer, 413, "payload-too-large", naming="text")
    over_in_bytes_only = await send(client, INPUT, world.ids, body={"text": "é" * (MIB // 2 + 1)})
    check_problem(over_in_bytes_only, 413, "payload-too-large")

    text = "0123456789abcdeé" * (MIB // 17) + "x" * (MIB % 17)
    assert len(text.encode()) == MIB
    await session.send("stty raw; echo r''eady; head -c 1048576 | sha256sum; stty -raw\n")
    await session.until("ready")
    await session.send(text)
    await session.until(hashlib.sha256(text.encode()).hexdigest())


@each_call_with_body
async def test_a_body_over_eight_mebibytes_is_too_large(world, client, session, call):
    async def endless():
        for _ in range(9):
            yield b" " * MIB

    check_problem(
        await send(client, call, world.ids, headers=JSON, data=b" " * (8 * MIB + 1)), 413, "payload-too-large"
    )
    with contextlib.suppress(aiohttp.ClientConnectionError):  # refused before all of it was sent
        check_problem(await send(client, call, world.ids, headers=JSON, data=endless()), 413, "payload-too-large")


async def test_nul_and_every_other_control_character_is_typed(client, session):
    typed = "".join(map(chr, range(32))) + "\x7f\x80é😀"
    count = len(typed.encode())
    await session.send(f"stty raw; echo r''eady; head -c {count} | od -An -v -tx1 | tr -d ' \\n'; stty -raw\n")
    await session.until("ready")
    await session.send(typed)
    await session.until(typed.encode().hex())
    await session.send("stty raw; echo r''eady; head -c 3 | cat -v; stty -raw\n")
    await session.until("ready")
    await session.send("a\x00b")
    await session.until(re.escape("a^@b"))


async def test_a_surrogate_pair_is_one_character(world, client, session):
    data = b'{"text": "echo \\ud83d\\ude00\\n"}'
    answer = await send(client, INPUT, world.ids, headers=JSON, data=data)
    assert answer.json == {"sent": True, "bytes": 10}
    await session.until("😀")


async def test_an_empty_text_is_sent(world, client, session):
    assert (await send(client, INPUT, world.ids)).json == {"sent": True, "bytes": 0}


async def test_a_bad_idempotency_key_is_named(world, client, session):
    for key in ("x" * 256, "a\tb", "é\x85"):
        answer = await send(client, INPUT, world.ids, headers={"Idempotency-Key": key})
        check_problem(answer, 400, naming="Idempotency-Key")


async def test_a_body_where_none_belongs_does_no_harm(world, client, session):
    for call in (LIST, SHOW, OUTPUT, TERMINAL, APPS, APP, APP_DEPLOYMENTS, SHOW_DEPLOYMENT):
        assert (await send(client, call, world.ids, headers=JSON, data=b"{broken")).status == 200


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GARBAGE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
     b"GET\x00/ HTTP/1.1\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: x\r\nA" + b"a" * 20_000 + b": b\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: x\r\nBad Name: b\r\n\r\n",
     b"POST /api/v1/code-sessions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
     b"POST /api/v1/code-sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
     b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
)  # fmt: skip
async def test_what_is_no_http_gets_a_problem_or_a_closed_connection(shared_serve, data):
    reader, writer = await asyncio.open_connection("127.0.0.1", shared_serve.port)
    writer.write(data)
    writer.write_eof()
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    if answer:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert re.match(rb"HTTP/1\.[01] 4\d\d ", head), answer
        assert b"application/problem+json" in head, answer
        assert b"Traceback" not in body


async def test_a_client_that_leaves_in_the_middle_of_its_body_changes_nothing(shared_serve, world, client, session):
    for sent in (b"", b'{"text": "echo nev'):
        _, writer = await asyncio.open_connection("127.0.0.1", shared_serve.port)
        path = f"/api/v1/{INPUT.path.format(**world.ids)}"
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {client.key}\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + b"Content-Length: 100\r\n\r\n" + sent)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()


# In which state


@pytest.mark.parametrize("state", ["ended", "failed"])
async def test_a_session_that_ended_takes_nothing_more_and_stays_readable(world, client, state):
    ids = {"session": getattr(world, state)}
    before = await send(client, SHOW, ids)
    for call in (INPUT, START, DEPLOYMENT):
        check_problem(await send(client, call, ids), 409, "session-ended")
    for _ in range(2):
        answer = await send(client, DELETE, ids)
        assert (answer.status, answer.raw) == (204, b"")
    after = await send(client, SHOW, ids)
    assert after.json == before.json
    assert after.json["status"] == {"ended": "completed", "failed": "failed"}[state]
    assert ("statusReason" in after.json) == (state == "failed")
    output = await send(client, OUTPUT, ids)
    assert output.status == 200
    assert output.json["chunks"]
    began = time.monotonic()
    rest = await send(client, OUTPUT, ids, query=f"?afterSeq={output.json['lastSeq']}&wait=20")
    assert rest.json["chunks"] == []
    assert time.monotonic() - began < 5, "nothing more can come"
    check_problem(await send(client, INPUT, ids, body={"text": 1}), 400, naming="text")


async def test_a_terminal_that_exited_takes_no_input_and_one_that_runs_is_not_started_again(client, world, session):
    check_problem(await send(client, START, world.ids), 409, "terminal-running")
    other = await client.create("exits")
    await other.send("exit\n")
    await other.until_state("exited")
    check_problem(await send(client, INPUT, {"session": other.id}), 409, "terminal-exited")
    assert (await send(client, DELETE, {"session": other.id})).status == 204


# The store


def the_store(serve):
    return next(process for process in serve.processes() if "valkey-server" in " ".join(process.cmdline()))


def workspaces(serve):
    return {path.name for path in (serve.data_dir / "workspaces").iterdir()}


async def test_while_the_store_does_not_answer_every_call_says_so_and_leaves_nothing_half_done(serve):
    async with serve.client() as client, serve.client(None) as nobody:
        session = await client.create("kept")
        await session.run("stty -echo; PS1=; echo '<p>hi' > index.html")
        deployment = await session.deploy()
        ids = {"session": session.id, "app": deployment["appId"], "deployment": deployment["id"]}
        before, running = workspaces(serve), {process.pid for process in serve.processes()}
        listed = (await client.call("GET", "code-sessions")).json["sessions"]
        store = the_store(serve)
        store.send_signal(signal.SIGSTOP)
        try:
            # First on a connection whose commands a store that goes on carries out, then on new ones.
            check_problem(await send(client, CREATE, ids), 503, "store-unavailable")
            began = time.monotonic()
            answers = await asyncio.gather(*(send(client, call, ids) for call in CALLS if call is not DELETE))
            assert time.monotonic() - began < 8
            for answer in answers:
                check_problem(answer, 503)
            began = time.monotonic()
            check_problem(await nobody.call("GET", "/readyz"), 503, "not-ready", naming="store")
            assert time.monotonic() - began < 4
            assert (await nobody.call("GET", "/healthz")).status == 200
            assert workspaces(serve) == before
        finally:
            store.send_signal(signal.SIGCONT)
        text, _ = await session.run("echo goes''-on")
        assert "goes-on" in text
        await asyncio.sleep(3)
        assert (await nobody.call("GET", "/readyz")).status == 200
        now = (await client.call("GET", "code-sessions")).json["sessions"]
        assert [entry["id"] for entry in now] == [entry["id"] for entry in listed]
        assert workspaces(serve) == before
        assert {process.pid for process in serve.processes() if "sidecar" in process.cmdline()} <= running
        fresh = await client.create("fresh")
        _, status = await fresh.run("true")
        assert status == 0
        await session.delete()


async def test_a_delete_while_the_store_does_not_answer_is_done_by_the_next_one(serve):
    async with serve.client() as client:
        session = await client.create("deleted")
        await session.run("sleep 1000 &")
        store = the_store(serve)
        store.send_signal(signal.SIGSTOP)
        try:
            check_problem(await send(client, DELETE, {"session": session.id}), 503)
        finally:
            store.send_signal(signal.SIGCONT)
        await session.delete()
        assert (await session.show())["status"] == "completed"
        assert workspaces(serve) == set()
        assert not [process for process in serve.processes() if process.name() == "sleep"]


async def test_a_killed_store_costs_at_most_a_moment_of_503(serve):
    async with serve.client() as client:
        session = await client.create("kept")
        await session.run("stty -echo; PS1=; echo '<p>hi' > index.html")
        deployment = await session.deploy()
        ids = {"session": session.id, "app": deployment["appId"], "deployment": deployment["id"]}
        for _ in range(3):
            the_store(serve).kill()
            calls = [call for call in CALLS if call not in (DELETE, DEPLOYMENT)]
            for call, answer in zip(calls, await asyncio.gather(*(send(client, c, ids) for c in calls)), strict=True):
                if answer.status == 503:
                    check_problem(answer, 503)
                else:
                    assert answer.status in ({409} if call is START else {200, 201}), answer
            text, _ = await session.run("echo goes''-on", 20)
            assert "goes-on" in text
        assert session.seqs == list(range(1, len(session.seqs) + 1))
