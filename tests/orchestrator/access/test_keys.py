import asyncio
import random
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.access import keys as keys_module
from orchestrator.access import secrets
from orchestrator.access.cache import ExpiringCache
from orchestrator.access.keys import KeyStore
from orchestrator.access.scopes import Scope
from orchestrator.errors import InvalidRequest, KeyNotFound, Unauthenticated
from orchestrator.settings import SettingsError

ADMIN_KEY = "operator's-own-value-of-40-characters-00"


@pytest.fixture
def keys(redis) -> KeyStore:
    return KeyStore(redis)


async def _refusal(keys: KeyStore, secret: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await keys.authenticate(secret)
    return caught.value.detail


async def test_a_secret_leads_to_its_key_on_every_replica(keys, redis):
    key, secret = await keys.create(name="ci", scopes=[Scope.READ, Scope.DEPLOY])
    found = await KeyStore(redis).authenticate(secret)
    assert found.id == key.id
    assert found.scopes == {Scope.READ, Scope.DEPLOY}
    assert (found.user_id, found.organization_id) == (key.user_id, key.organization_id)
    assert not found.operator


async def test_only_a_hash_of_the_secret_is_stored(keys, redis):
    key, secret = await keys.create(name="ci", scopes=[Scope.READ])
    random_part = secret.split("_")[2].encode()
    fields = await redis.hgetall(f"cs:{{keys}}:key:{key.id}")
    assert fields[b"secret_hash"].decode() == secrets.digest(secret)
    assert not any(random_part in value for value in fields.values())


async def test_a_secret_with_another_keys_id_is_unknown(keys):
    _, secret = await keys.create(name="ci", scopes=[Scope.READ])
    _, other = secrets.new_secret()
    body = f"csk_{secret.split('_')[1]}_{other.split('_')[2]}"
    assert await _refusal(keys, f"{body}_{secrets._checksum(body)}") == "The API key is not known."
    assert await _refusal(keys, other) == "The API key is not known."


async def test_a_typing_error_is_malformed_without_a_look_up(keys, redis):
    _, secret = await keys.create(name="ci", scopes=[Scope.READ])
    await redis.config_resetstat()
    for wrong in (secret[:-1], secret + "a", "csk_", "x", "\N{SNOWMAN}", "\ud800", "a" * 10_000, ""):
        assert await _refusal(keys, wrong) == "The API key is malformed."
    calls = await redis.info("commandstats")
    assert not {"cmdstat_get", "cmdstat_hgetall"} & calls.keys()


@given(st.data())
def test_any_one_wrong_character_is_noticed(data):
    _, secret = secrets.new_secret()
    place = data.draw(st.integers(0, len(secret) - 1))
    wrong = data.draw(
        st.sampled_from(string.ascii_lowercase + string.digits + "_").filter(lambda c: c != secret[place])
    )
    assert secrets.key_id_of(secret[:place] + wrong + secret[place + 1 :]) is None


def test_secrets_hold_160_random_bits_and_a_prefix_that_scanners_can_find():
    made = [secrets.new_secret()[1] for _ in range(50)]
    assert all(secret.startswith("csk_") for secret in made)
    assert len({secret.split("_")[2] for secret in made}) == 50
    assert {len(secret.split("_")[2]) * 5 for secret in made} == {160}


async def test_a_revoked_key_is_refused_at_once_here_and_within_a_second_elsewhere(keys, redis):
    key, secret = await keys.create(name="ci", scopes=[Scope.READ])
    elsewhere = KeyStore(redis)
    await keys.authenticate(secret)
    await elsewhere.authenticate(secret)
    revoked = await keys.revoke(key.organization_id, key.id)
    revoked_s = time.monotonic()
    assert revoked.revoked_at_ms is not None
    assert await _refusal(keys, secret) == "The API key has been revoked."
    while time.monotonic() - revoked_s < 1:
        try:
            await elsewhere.authenticate(secret)
        except Unauthenticated:
            break
        await asyncio.sleep(0.01)
    assert await _refusal(elsewhere, secret) == "The API key has been revoked."
    assert time.monotonic() - revoked_s < 1.1


async def test_revoking_again_keeps_the_first_time(keys):
    key, _ = await keys.create(name="ci", scopes=[Scope.READ])
    first = await keys.revoke(None, key.id)
    await asyncio.sleep(0.005)
    assert await keys.revoke(None, key.id) == first


async def test_an_expired_key_is_refused_even_when_it_was_just_used(keys, monkeypatch):
    now_ms = keys_module._now_ms()
    _, secret = await keys.create(name="ci", scopes=[Scope.READ], expires_at_ms=now_ms + 60_000)
    await keys.authenticate(secret)
    monkeypatch.setattr(keys_module, "_now_ms", lambda: now_ms + 60_000)
    assert await _refusal(keys, secret) == "The API key has expired."


async def test_a_busy_key_costs_no_round_trip(keys, redis):
    _, secret = await keys.create(name="ci", scopes=[Scope.READ])
    await keys.authenticate(secret)
    await redis.config_resetstat()
    for _ in range(1000):
        await keys.authenticate(secret)
    assert (await redis.info("commandstats")).get("cmdstat_hgetall", {"calls": 0})["calls"] <= 2


async def test_a_flood_of_wrong_keys_takes_bounded_memory_and_pushes_no_good_key_out(keys):
    _, good = await keys.create(name="ci", scopes=[Scope.READ])
    await keys.authenticate(good)
    for _ in range(1200):
        await _refusal(keys, secrets.new_secret()[1])
    assert len(keys._refused) <= 1000
    assert len(keys._known) == 1


async def test_last_use_is_written_at_most_once_a_minute(keys, redis, monkeypatch):
    now_ms = keys_module._now_ms()
    key, secret = await keys.create(name="ci", scopes=[Scope.READ])
    assert (await keys.get(None, key.id)).last_used_at_ms is None
    for later_ms, expected_ms in ((1_000, 1_000), (50_000, 1_000), (61_000, 61_000)):
        monkeypatch.setattr(keys_module, "_now_ms", lambda later_ms=later_ms: now_ms + later_ms)
        await KeyStore(redis).authenticate(secret)
        assert (await keys.get(None, key.id)).last_used_at_ms == now_ms + expected_ms


async def test_an_organization_sees_and_revokes_only_its_own_keys(keys):
    mine, _ = await keys.create(name="mine", scopes=[Scope.READ])
    other, secret = await keys.create(name="other", scopes=[Scope.READ])
    assert [key.id for key in await keys.list(mine.organization_id)] == [mine.id]
    assert {key.id for key in await keys.list(None)} == {mine.id, other.id}
    for call in (keys.get, keys.revoke):
        with pytest.raises(KeyNotFound):
            await call(mine.organization_id, other.id)
        with pytest.raises(KeyNotFound):
            await call(mine.organization_id, "key_nosuch")
        with pytest.raises(KeyNotFound):
            await call(mine.organization_id, "first")
    assert await keys.authenticate(secret)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"scopes": []}, "scopes"),
        ({"user_id": "bob"}, "userId"),
        ({"organization_id": "key_abc"}, "organizationId"),
        ({"rate_limit_per_minute": -1}, "rateLimitPerMinute"),
        ({"expires_at_ms": 1}, "expiresAt"),
    ],
)
async def test_a_key_that_cannot_be_is_refused_by_name(keys, wrong, named):
    with pytest.raises(InvalidRequest, match=named):
        await keys.create(**{"name": "ci", "scopes": [Scope.READ], **wrong})
    assert await keys.list(None) == []


async def test_the_first_start_makes_the_operators_key_once_even_with_many_replicas(redis):
    replicas = [KeyStore(redis) for _ in range(8)]
    made = await asyncio.gather(*(replica.ensure_first_key(None) for replica in replicas))
    [secret] = [secret for secret in made if secret is not None]
    key = await replicas[0].authenticate(secret)
    assert key.operator
    assert key.scopes == set(Scope)
    assert [listed.id for listed in await replicas[1].list(None)] == [key.id]
    assert await KeyStore(redis).ensure_first_key(None) is None


async def test_a_given_admin_key_is_the_first_key_on_many_replicas(redis):
    replicas = [KeyStore(redis) for _ in range(8)]
    made = await asyncio.gather(*(replica.ensure_first_key(ADMIN_KEY) for replica in replicas))
    assert made == [None] * 8
    found = [await replica.authenticate(ADMIN_KEY) for replica in replicas]
    assert len({key.id for key in found}) == 1
    assert found[0].operator


async def test_a_changed_admin_key_ends_the_old_one_and_keeps_the_organization(redis):
    generated = await KeyStore(redis).ensure_first_key(None)
    first = await KeyStore(redis).authenticate(generated)
    for value, old in ((ADMIN_KEY, generated), ("b" * 32, ADMIN_KEY), (ADMIN_KEY, "b" * 32)):
        replica = KeyStore(redis)
        assert await replica.ensure_first_key(value) is None
        key = await replica.authenticate(value)
        assert (key.user_id, key.organization_id) == (first.user_id, first.organization_id)
        assert await _refusal(replica, old)
    assert await _refusal(KeyStore(redis), generated) == "The API key has been revoked."


async def test_a_revoked_admin_key_stays_revoked_at_the_next_start(redis):
    keys = KeyStore(redis)
    await keys.ensure_first_key(ADMIN_KEY)
    key = await keys.authenticate(ADMIN_KEY)
    await keys.revoke(None, key.id)
    await keys.ensure_first_key(ADMIN_KEY)
    assert await _refusal(keys, ADMIN_KEY) == "The API key has been revoked."


async def test_an_admin_key_may_be_a_key_made_elsewhere(redis):
    value = secrets.new_secret()[1]
    keys = KeyStore(redis)
    await keys.ensure_first_key(value)
    assert (await keys.authenticate(value)).operator


@pytest.mark.parametrize("value", ["short", "a" * 31, "a" * 513, "with space" + "a" * 30, "ü" * 40, "csk_" + "a" * 40])
async def test_an_admin_key_that_could_not_be_sent_is_refused_at_start(keys, value):
    with pytest.raises(SettingsError, match="CODE_SESSIONS_ADMIN_KEY"):
        await keys.ensure_first_key(value)


async def test_unknown_values_of_an_admin_keys_length_cost_one_look_up_for_all(keys, redis):
    await keys.ensure_first_key(ADMIN_KEY)
    await redis.config_resetstat()
    for number in range(100):
        assert await _refusal(keys, f"{number:040}") == "The API key is not known."
    assert (await redis.info("commandstats"))["cmdstat_hgetall"]["calls"] <= 2


async def test_a_scope_of_a_later_version_is_passed_over(keys, redis):
    key, secret = await keys.create(name="ci", scopes=[Scope.READ])
    await redis.hset(f"cs:{{keys}}:key:{key.id}", "scopes", "code-sessions:read code-sessions:fly")
    assert (await keys.authenticate(secret)).scopes == {Scope.READ}


def test_an_answer_from_before_the_cache_was_cleared_is_not_kept():
    cache: ExpiringCache[str] = ExpiringCache(10, 60)
    asked_s = time.monotonic()
    cache.clear()
    cache.put("name", "old", asked_s)
    assert cache.get("name") is None


def test_a_cache_never_grows_beyond_its_bound():
    cache: ExpiringCache[int] = ExpiringCache(10, 60)
    names = [str(number) for number in range(100)]
    random.shuffle(names)
    for name in names:
        cache.put(name, 1, time.monotonic())
    assert len(cache) == 10
    assert cache.get(names[-1]) == 1
