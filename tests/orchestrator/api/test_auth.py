import asyncio

import aiohttp
import pytest

from orchestrator.access.scopes import Scope
from tests.orchestrator.api.conftest import is_problem

PATH = "/api/v1/read"


@pytest.fixture
async def secret(server) -> str:
    _, secret = await server.keys.create(name="reader", scopes=[Scope.READ])
    return secret


@pytest.mark.parametrize(
    "header", ["X-API-Key: {}", "x-api-key: {}", "Authorization: Bearer {}", "Authorization: bearer  {}"]
)
async def test_both_headers_carry_the_same_key(server, secret, header):
    name, value = header.format(secret).split(": ", 1)
    answer, document = await server.call("GET", PATH, headers={name: value})
    assert answer.status == 200
    assert document["organizationId"].startswith("org_")


async def test_the_same_key_twice_is_fine_and_two_different_ones_are_400(server, secret):
    both = {"X-API-Key": secret, "Authorization": f"Bearer {secret}"}
    answer, _ = await server.call("GET", PATH, headers=both)
    assert answer.status == 200
    for headers in ([*both.items(), ("X-API-Key", "other")], {**both, "Authorization": "Bearer other"}):
        answer, document = await server.call("GET", PATH, headers=headers)
        assert is_problem(answer, document, 400, "invalid-request")
        assert "X-API-Key" in document["detail"]


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "X-API-Key"),
        ({"Authorization": "Basic abc"}, "Bearer only"),
        ({"Authorization": "Bearer"}, "malformed"),
        ({"X-API-Key": ""}, "malformed"),
        ({"X-API-Key": "nonsense"}, "malformed"),
        ({"X-API-Key": "csk_nonsense"}, "malformed"),
        ({"X-API-Key": "x" * 4000}, "malformed"),
        ({"X-API-Key": "x" * 40}, "not known"),
        ({"X-API-Key": "\N{SNOWMAN}"}, "malformed"),
    ],
)
async def test_a_call_without_a_good_key_is_401_with_www_authenticate(server, headers, said):
    answer, document = await server.call("GET", PATH, headers=headers)
    assert is_problem(answer, document, 401, "unauthenticated")
    assert said in document["detail"]
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


async def test_bytes_that_are_no_text_in_a_key_are_401(server):
    status, _, document = await server.raw(b"GET /api/v1/read HTTP/1.1\r\nHost: x\r\nX-API-Key: \xff\xfe\r\n\r\n")
    assert (status.split()[1], document["code"]) == (b"401", "unauthenticated")


@pytest.mark.parametrize("scope", [scope for scope in Scope if scope is not Scope.READ])
async def test_no_scope_implies_another(server, scope):
    _, secret = await server.keys.create(name="other", scopes=[scope])
    answer, document = await server.call("GET", PATH, headers={"X-API-Key": secret})
    assert is_problem(answer, document, 403, "insufficient-scope")
    assert "code-sessions:read" in document["detail"]
    assert document["requiredScope"] == "code-sessions:read"


async def test_every_limited_answer_says_where_the_key_stands_and_the_one_too_many_is_429(server, secret):
    headers = {"X-API-Key": secret}
    for expected in (4, 3, 2, 1, 0):
        answer, _ = await server.call("GET", PATH, headers=headers)
        assert answer.status == 200
        assert answer.headers["RateLimit-Limit"] == "5"
        assert answer.headers["RateLimit-Remaining"] == str(expected)
        assert 1 <= int(answer.headers["RateLimit-Reset"]) <= 60
    answer, document = await server.call("GET", PATH, headers=headers)
    assert is_problem(answer, document, 429, "rate-limited")
    assert "5 requests a minute" in document["detail"]
    assert (document["limitName"], document["limit"]) == ("requests-per-minute", 5)
    assert answer.headers["RateLimit-Remaining"] == "0"
    assert 1 <= int(answer.headers["Retry-After"]) <= 60


async def test_a_refused_scope_counts_and_says_where_the_key_stands(server):
    _, secret = await server.keys.create(name="other", scopes=[Scope.WRITE])
    answer, _ = await server.call("GET", PATH, headers={"X-API-Key": secret})
    assert (answer.status, answer.headers["RateLimit-Remaining"]) == (403, "4")


async def test_the_operators_key_is_not_limited(server):
    secret = await server.keys.ensure_first_key(None)
    for _ in range(10):
        answer, _ = await server.call("GET", PATH, headers={"X-API-Key": secret})
        assert answer.status == 200
        assert "RateLimit-Limit" not in answer.headers


async def test_a_websocket_needs_a_key_as_well(server, secret):
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await server.client.ws_connect(server.url("/api/v1/socket"))
    assert caught.value.status == 401
    socket = await server.client.ws_connect(server.url("/api/v1/socket"), headers={"X-API-Key": secret})
    await socket.close()
    answer, document = await server.call("GET", "/api/v1/socket", headers={"X-API-Key": secret})
    assert answer.status in {400, 426}
    assert document["code"] in {"invalid-request", "upgrade-required"}


async def test_health_needs_no_key(server):
    answer, document = await server.call("GET", "/healthz")
    assert (answer.status, document) == (200, {"status": "ok"})
    answer, document = await server.call("GET", "/readyz")
    assert answer.status == 200
    assert document["checks"][0]["name"] == "redis"
    assert document["checks"][0]["ok"] is True


async def test_a_flood_of_bad_keys_leaves_a_good_one_working(server, secret):
    async def bad(number: int) -> int:
        answer, _ = await server.call("GET", PATH, headers={"X-API-Key": f"{number:040}"})
        return answer.status

    statuses = await asyncio.gather(*(bad(number) for number in range(300)))
    assert set(statuses) == {401}
    answer, _ = await server.call("GET", PATH, headers={"X-API-Key": secret})
    assert answer.status == 200
