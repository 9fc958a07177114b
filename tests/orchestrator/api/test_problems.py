import asyncio
import re

import aiohttp
import pytest

from orchestrator import errors
from orchestrator.api.problems import _code_and_title
from tests.orchestrator.api.conftest import is_problem

REQUEST = b"POST /items HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("how", "status", "code"),
    [
        ("domain", 404, "session-not-found"),
        ("quota", 429, "rate-limited"),
        ("runtime", 503, "runtime-unavailable"),
        ("redis", 503, "store-unavailable"),
        ("misconf", 503, "store-unavailable"),
        ("wrongtype", 500, "internal-error"),
        ("bug", 500, "internal-error"),
        ("reset", 500, "internal-error"),
        ("timeout", 500, "internal-error"),
        ("nothing", 500, "internal-error"),
        ("406", 406, "not-acceptable"),
        ("416", 416, "range-not-satisfiable"),
        ("426", 426, "upgrade-required"),
        ("503", 503, "unavailable"),
        ("html", 400, "invalid-request"),
    ],
)
async def test_whatever_a_handler_raises_is_a_problem_document(server, how, status, code):
    answer, document = await server.call("GET", f"/fail/{how}")
    assert is_problem(answer, document, status, code)
    assert "secret" not in str(document)
    assert "<" not in document["detail"]
    assert "Traceback" not in str(document)


async def test_facts_become_camel_case_members(server):
    _, document = await server.call("GET", "/fail/domain")
    assert document["sessionId"] == "cs_a"
    _, document = await server.call("GET", "/fail/quota")
    assert (document["limitName"], document["limit"]) == ("sessions", 10)


@pytest.mark.parametrize(("how", "seconds"), [("quota", "7"), ("runtime", "2"), ("redis", "2")])
async def test_what_passes_by_itself_says_when_to_try_again(server, how, seconds):
    answer, _ = await server.call("GET", f"/fail/{how}")
    assert answer.headers["Retry-After"] == seconds


async def test_an_unknown_path_is_404_with_and_without_a_key(server):
    answer, document = await server.call("GET", "/api/v1/nothing")
    assert is_problem(answer, document, 404, "not-found")
    _, secret = await server.keys.create(name="k", scopes=["code-sessions:read"])
    answer, document = await server.call("GET", "/api/v1/nothing", headers={"X-API-Key": secret})
    assert is_problem(answer, document, 404, "not-found")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PROPFIND"])
async def test_a_wrong_method_says_which_are_allowed(server, method):
    answer, document = await server.call(method, "/page")
    assert is_problem(answer, document, 405, "method-not-allowed")
    assert set(answer.headers["Allow"].split(",")) == {"GET", "HEAD"}


async def test_head_answers_as_get_without_a_body(server):
    answer, document = await server.call("HEAD", "/page")
    assert (answer.status, document) == (200, {})
    answer, document = await server.call("HEAD", "/nothing")
    assert (answer.status, document) == (404, {})


async def test_a_redirect_stays_a_redirect(server):
    async with server.client.get(server.url("/fail/redirect"), allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (302, "/elsewhere")
        assert answer.headers["X-Request-Id"]


async def test_a_sane_request_id_is_kept_and_any_other_replaced(server):
    answer, document = await server.call("GET", "/nothing", headers={"X-Request-Id": "mine-1"})
    assert document["requestId"] == answer.headers["X-Request-Id"] == "mine-1"
    for insane in ("a b", "x" * 129, "<script>", '"'):
        answer, _ = await server.call("GET", "/page", headers={"X-Request-Id": insane})
        assert re.fullmatch("[0-9a-f]{24}", answer.headers["X-Request-Id"])


async def test_good_answers_carry_the_common_headers_too(server):
    answer, _ = await server.call("GET", "/page")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Request-Id"]


async def test_an_unmet_expectation_is_417(server):
    answer, document = await server.call("GET", "/page", headers={"Expect": "a-miracle"})
    assert is_problem(answer, document, 417, "expectation-failed")


@pytest.mark.parametrize("query", ["", "?http"])
async def test_an_answer_that_had_begun_is_broken_off(server, query):
    with pytest.raises(aiohttp.ClientPayloadError):
        await server.call("GET", f"/stream{query}")


@pytest.mark.parametrize(
    "pieces",
    [
        [b"this is not http\r\n\r\n"],
        [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"],
        [b"GET / HTTP/9.9\r\n\r\n"],
        [b"GET /page HTTP/1.1\r\nHost: x\r\nBad Header\r\n\r\n"],
        [b"GET /page HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n"],
        [b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
        [b"GET http://[::bad HTTP/1.1\r\nHost: x\r\n\r\n"],
        [REQUEST + b"Content-Length: nine\r\n\r\n"],
        [REQUEST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"],
        [REQUEST + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\n{}\r\n0\r\n\r\n"],
        [REQUEST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"],
        [REQUEST + b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\nnot gzip!"],
    ],
)
async def test_what_the_http_parser_refuses_is_a_problem_document(server, pieces):
    status, headers, document = await server.raw(*pieces)
    assert status.split()[1] == b"400"
    assert headers["content-type"] == "application/problem+json"
    assert document["code"] in {"malformed-request", "invalid-request"}
    assert document["requestId"] == headers["x-request-id"]
    assert "aaaa" not in document["detail"]
    answer, _ = await server.call("GET", "/page")
    assert answer.status == 200


async def test_a_client_that_leaves_in_the_middle_of_its_body_disturbs_nobody(server, caplog):
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(REQUEST + b"Content-Length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
    await asyncio.sleep(0.1)
    answer, _ = await server.call("GET", "/page")
    assert answer.status == 200
    assert "Traceback" not in caplog.text


async def test_a_store_that_went_away_is_503_and_serves_again_when_it_is_back(server, redis, monkeypatch):
    _, secret = await server.keys.create(name="k", scopes=["code-sessions:read"])
    sockets = redis.connection_pool.connection_kwargs
    path = sockets["path"]
    sockets["path"] = "/nonexistent/valkey.sock"
    await redis.connection_pool.disconnect()
    redis.connection_pool.reset()
    answer, document = await server.call("GET", "/api/v1/read", headers={"X-API-Key": secret})
    assert is_problem(answer, document, 503, "store-unavailable")
    assert answer.headers["Retry-After"]
    assert "nonexistent" not in str(document)
    sockets["path"] = path
    redis.connection_pool.reset()
    answer, _ = await server.call("GET", "/api/v1/read", headers={"X-API-Key": secret})
    assert answer.status == 200


def _all_errors(base=errors.OrchestratorError):
    for error in base.__subclasses__():
        yield error
        yield from _all_errors(error)


def test_every_error_has_a_code_of_its_own_that_the_modules_tree_names():
    codes = [error.code for error in _all_errors() if error.__module__ == errors.__name__]
    assert len(codes) == len(set(codes))
    for code in codes:
        assert re.search(rf" {code}$", errors.__doc__, re.MULTILINE), code


@pytest.mark.parametrize(
    "status", [402, 406, 408, 411, 412, 413, 414, 415, 416, 417, 418, 421, 422, 426, 431, 501, 599]
)
def test_every_status_has_a_machine_readable_code(status):
    code, title = _code_and_title(status)
    assert re.fullmatch("[a-z0-9-]+", code)
    assert title
