import asyncio
import time

import pytest
from aiohttp import web

from orchestrator.api import health
from orchestrator.api.health import health_routes
from orchestrator.api.problems import setup_problems
from tests.orchestrator.api.conftest import is_problem


@pytest.fixture
def make_client(aiohttp_client):
    async def make(checks):
        app = web.Application()
        setup_problems(app)
        app.add_routes(health_routes(checks))
        return await aiohttp_client(app)

    return make


async def _good():
    return True


async def _refused():
    raise ConnectionRefusedError("10.0.0.7:6379")


async def _hangs():
    await asyncio.sleep(60)


async def test_a_failed_check_is_named_in_a_503_that_says_nothing_of_addresses(make_client):
    client = await make_client({"redis": _refused, "runtime": _good})
    answer = await client.get("/readyz")
    document = await answer.json(content_type=None)
    assert is_problem(answer, document, 503, "not-ready")
    assert answer.headers["Retry-After"]
    assert {check["name"]: check["ok"] for check in document["checks"]} == {"redis": False, "runtime": True}
    assert "redis" in document["detail"]
    assert "10.0.0.7" not in str(document)
    assert (await client.get("/healthz")).status == 200


async def test_a_check_that_hangs_is_given_up_in_time(make_client, monkeypatch):
    monkeypatch.setattr(health, "CHECK_TIMEOUT_S", 0.2)
    client = await make_client({"runtime": _hangs, "other": _hangs})
    began_s = time.monotonic()
    assert (await client.get("/readyz")).status == 503
    assert time.monotonic() - began_s < 1


async def test_many_who_ask_at_once_cost_one_check(make_client):
    calls = []

    async def counted():
        calls.append(1)
        await asyncio.sleep(0.05)

    client = await make_client({"redis": counted})
    answers = await asyncio.gather(*(client.get("/readyz") for _ in range(50)))
    assert {answer.status for answer in answers} == {200}
    assert len(calls) == 1
    await asyncio.sleep(0.6)
    await client.get("/readyz")
    assert len(calls) == 2
