"""Who watches live gets output before it is durable, but is never told to resume from there."""

import asyncio
import dataclasses

import pytest

from orchestrator.models import SessionStatus
from orchestrator.sessions.following import Follower
from orchestrator.sessions.registry import SessionRegistry
from orchestrator.sessions.terminals import Terminals
from sidecar.protocol import Record, RecordKind, encode_records
from tests.orchestrator.terminal.planes import replicas, session_named

SESSION = dataclasses.replace(session_named("cs_aaaaaaaaaaaaaaaaaaaa"), project_name="followed")


def output(seq, data=b"x"):
    return Record(seq, seq - 1, 1000, RecordKind.OUTPUT, data)


class Watched:
    """A replica whose store takes nothing while it is told to wait."""

    def __init__(self, replica, registry):
        self.replica, self.registry = replica, registry
        self.terminals = Terminals(registry, replica.hub, replica.store)
        self.may_append = asyncio.Event()
        really = replica.store.append

        async def append(*arguments):
            await self.may_append.wait()
            return await really(*arguments)

        replica.store.append = append

    def follower(self, **options):
        return Follower(self.terminals, self.registry, SESSION, after=0, early=True, **options)


@pytest.fixture
async def watched(redis):
    async with replicas(redis, "a") as (replica,):
        registry = SessionRegistry(redis)
        await registry.add(SESSION)
        watched = Watched(replica, registry)
        watched.sidecar = await replica.link_sidecar(SESSION.id)
        watched.sidecar.link._on_received = replica.hub.received
        yield watched


async def next_page(pages):
    async with asyncio.timeout(5):
        return await anext(pages)


async def test_output_is_given_out_before_it_is_durable_and_marked_when_it_is(watched):
    follower = watched.follower(marks=True)
    pages = follower.pages(20)
    await next_page(pages)  # nothing yet
    await watched.sidecar.link.receive(encode_records([output(1), output(2)]))
    page = await next_page(pages)
    assert [record.seq for record in page.page.records] == [1, 2]
    assert follower.durable_seq == 0
    watched.may_append.set()
    page = await next_page(pages)
    assert not page.page.records
    assert (follower.durable_seq, follower.durable_offset) == (2, 2)


async def test_who_wants_no_marks_is_not_woken_for_them(watched):
    pages = watched.follower().pages(20)
    await next_page(pages)
    await watched.sidecar.link.receive(encode_records([output(1)]))
    await next_page(pages)
    watched.may_append.set()
    waiting = asyncio.create_task(anext(pages))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await watched.sidecar.link.receive(encode_records([output(2)]))
    async with asyncio.timeout(5):
        assert [record.seq for record in (await waiting).page.records] == [2]


async def test_an_end_that_comes_instead_of_what_was_given_out_early_is_seen(watched):
    follower = watched.follower(marks=True)
    pages = follower.pages(0.2)
    await next_page(pages)
    watched.may_append.set()
    await watched.sidecar.link.receive(encode_records([Record(1, 0, 1000, RecordKind.START, b'{"cols":80,"rows":24}')]))
    while follower.after < 1:
        await next_page(pages)
    watched.may_append.clear()
    await watched.sidecar.link.receive(encode_records([output(2), output(3)]))
    while follower.after < 3:
        await next_page(pages)
    # The workspace and what it had sent are gone before any of it was appended.
    watched.sidecar.link.lost(superseded=True)
    await watched.replica.hub.detach(watched.sidecar.link)
    await watched.replica.store.close(SESSION.id, lost_reason="gone", at_ms=2000)
    await watched.registry.move(SESSION.id, SessionStatus.FAILED, reason="gone")
    watched.replica.hub.changed(SESSION.id)
    seen = [record async for page in pages for record in page.page.records]
    assert [(record.seq, record.kind) for record in seen] == [(2, RecordKind.EXIT)]
