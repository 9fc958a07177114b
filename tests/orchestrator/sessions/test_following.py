"""Who follows a session's log gets all of it, or is told what is missing."""

from dataclasses import replace

from orchestrator.api.attach_frames import marked_frames
from orchestrator.api.output_stream import _events
from orchestrator.models import SessionStatus
from orchestrator.sessions.following import Follower
from orchestrator.sessions.registry import SessionRegistry
from orchestrator.sessions.terminals import Terminals
from sidecar.protocol import Record, RecordKind
from tests.orchestrator.terminal.planes import replicas, session_named

SESSION_ID = "cs_" + "a" * 20


async def test_who_follows_a_session_whose_output_has_expired_is_told_so(redis):
    async with replicas(redis, "a") as (one,):
        registry = SessionRegistry(redis)
        session = replace(session_named(SESSION_ID), status=SessionStatus.COMPLETED)
        await registry.add(session)
        await one.store.append(SESSION_ID, [Record(1, 0, 1000, RecordKind.OUTPUT, b"x")])
        await redis.delete(one.store.keys(SESSION_ID)[0])  # as the store does when the days of retention are over
        follower = Follower(Terminals(registry, one.hub, one.store), registry, session, after=0)
        outputs = [output async for output in follower.pages(1)]
        assert [(output.truncated, output.page.records) for output in outputs] == [(True, [])]
        assert b'event: truncated\ndata: {"afterSeq":0,"firstSeq":2}\n\n' in _events(outputs[0], base64_data=False)
        frames = [sent.frame for sent in marked_frames(outputs[0], 0)]
        assert frames == ['{"type":"truncated","afterSeq":0,"firstSeq":2}']
        follower = Follower(Terminals(registry, one.hub, one.store), registry, session, after=1)
        assert [output async for output in follower.pages(1)] == [], "who has all of it misses nothing"


async def test_who_follows_is_told_once_of_a_loss_after_which_nothing_has_come_yet(redis):
    async with replicas(redis, "a") as (one,):
        registry = SessionRegistry(redis)
        await registry.add(session_named(SESSION_ID))
        await one.store.skip_to(SESSION_ID, 9)
        follower = Follower(
            Terminals(registry, one.hub, one.store), registry, await registry.get("org_a", SESSION_ID), after=5
        )
        pages = follower.pages(0.05)
        assert [(await anext(pages)).truncated for _ in range(3)] == [True, False, False]


async def test_a_poller_is_not_sent_back_by_a_replica_whose_memory_is_behind_the_log(redis):
    async with replicas(redis, "a", "b") as (one, two):
        registry = SessionRegistry(redis)
        await registry.add(session_named(SESSION_ID))
        await one.link_sidecar(SESSION_ID)  # half-open by now: its sidecar has dialled the other one
        records = [Record(seq, seq - 1, 1000, RecordKind.OUTPUT, b"x") for seq in (1, 2, 3)]
        await two.store.append(SESSION_ID, records)
        terminals = Terminals(registry, one.hub, one.store)
        output = await terminals.read("org_a", SESSION_ID, after=3, limit=10, wait_s=0)
        assert (output.page.records, output.last_seq) == ([], 3)
