"""Tickets on a real store."""

import asyncio

import pytest

from orchestrator.access.keys import ApiKey
from orchestrator.access.scopes import Scope
from orchestrator.access.tickets import LIFETIME_S, TicketStore
from orchestrator.errors import Unauthenticated

KEY = ApiKey(
    id="key_a",
    name="ci",
    scopes=frozenset({Scope.READ, Scope.WRITE}),
    user_id="user_a",
    organization_id="org_a",
    operator=True,
    rate_limit_per_minute=7,
    created_at_ms=1,
)


async def test_a_ticket_gives_back_who_it_was_issued_to_and_what_they_may_but_no_operator(redis):
    tickets = TicketStore(redis)
    ticket = await tickets.issue(KEY, "cs_a")
    key = await tickets.redeem(ticket.text, "cs_a")
    assert (key.id, key.user_id, key.organization_id, key.scopes) == ("key_a", "user_a", "org_a", KEY.scopes)
    assert not key.operator


async def test_two_replicas_that_redeem_a_ticket_at_the_same_time_are_told_apart(redis):
    replicas = [TicketStore(redis), TicketStore(redis)]
    for _ in range(20):
        ticket = await replicas[0].issue(KEY, "cs_a")
        results = await asyncio.gather(
            *(replica.redeem(ticket.text, "cs_a") for replica in replicas), return_exceptions=True
        )
        assert sorted(isinstance(result, Unauthenticated) for result in results) == [False, True]


async def test_the_store_holds_a_hash_of_the_ticket_and_not_for_long(redis):
    ticket = await TicketStore(redis).issue(KEY, "cs_a")
    [name] = await redis.keys("cs:ticket:*")
    assert ticket.text.encode() not in name + await redis.get(name)
    assert 0 < await redis.ttl(name) <= LIFETIME_S


@pytest.mark.parametrize("text", ["", "cst_unknown", "x" * 10_000, "\udcff"])
async def test_what_is_no_ticket_opens_nothing(redis, text):
    with pytest.raises(Unauthenticated):
        await TicketStore(redis).redeem(text, "cs_a")
