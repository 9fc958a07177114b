import asyncio

import pytest

from orchestrator.access import rate_limit
from orchestrator.access.keys import ApiKey
from orchestrator.access.rate_limit import RateLimiter
from orchestrator.access.scopes import Scope


def _key(**changes) -> ApiKey:
    given = {
        "id": "key_a",
        "name": "ci",
        "scopes": frozenset({Scope.READ}),
        "user_id": "user_a",
        "organization_id": "org_a",
        "operator": False,
        "rate_limit_per_minute": None,
        "created_at_ms": 0,
    }
    return ApiKey(**{**given, **changes})


async def test_exactly_the_limit_is_allowed_over_all_replicas_at_once(redis):
    replicas = [RateLimiter(redis, 50) for _ in range(4)]
    hits = await asyncio.gather(*(replicas[number % 4].hit(_key()) for number in range(120)))
    assert sum(hit.allowed for hit in hits) == 50
    assert sorted(hit.remaining for hit in hits if hit.allowed) == list(range(50))


async def test_an_answer_says_limit_remaining_and_when_room_comes_back(redis):
    limiter = RateLimiter(redis, 2)
    first, second, third = [await limiter.hit(_key()) for _ in range(3)]
    assert (first.allowed, first.limit, first.remaining) == (True, 2, 1)
    assert (second.allowed, second.remaining) == (True, 0)
    assert (third.allowed, third.remaining) == (False, 0)
    assert 58 <= third.reset_s <= 60
    error = third.exceeded()
    assert "2 requests a minute" in error.detail
    assert error.facts["retry_after_s"] == third.reset_s


async def test_room_comes_back_after_the_time_that_was_said_and_refused_requests_do_not_count(redis, monkeypatch):
    monkeypatch.setattr(rate_limit, "WINDOW_S", 2)
    limiter = RateLimiter(redis, 3)
    hits = [await limiter.hit(_key()) for _ in range(20)]
    assert sum(hit.allowed for hit in hits) == 3
    await asyncio.sleep(hits[-1].reset_s)
    assert (await limiter.hit(_key())).allowed


async def test_each_key_has_its_own_count_and_its_own_limit(redis):
    limiter = RateLimiter(redis, 1)
    assert (await limiter.hit(_key())).allowed
    assert not (await limiter.hit(_key())).allowed
    assert (await limiter.hit(_key(id="key_b", rate_limit_per_minute=5))).remaining == 4


@pytest.mark.parametrize(("default", "changes"), [(0, {}), (5, {"rate_limit_per_minute": 0}), (5, {"operator": True})])
async def test_a_key_without_a_limit_costs_no_round_trip(redis, default, changes):
    await redis.config_resetstat()
    assert await RateLimiter(redis, default).hit(_key(**changes)) is None
    assert "cmdstat_evalsha" not in await redis.info("commandstats")


async def test_counts_are_forgotten_by_themselves(redis):
    await RateLimiter(redis, 5).hit(_key())
    assert 0 < await redis.ttl("cs:rate:key_a") <= 61
    assert await redis.hlen("cs:rate:key_a") == 1


async def test_a_server_that_forgot_the_script_is_taught_again(redis):
    limiter = RateLimiter(redis, 5)
    await limiter.hit(_key())
    await redis.script_flush()
    assert (await limiter.hit(_key())).remaining == 3
