"""Numbering, acknowledging and resuming as one state machine with both of its real ends and a real store between them.

Real: the sidecar's log, the frames, the control plane's end of the link, the append script in a Valkey server. Played:
the wires, which break with frames on them; control planes, which are killed, or hang and go on later; and the store,
which repeats what it was told, keeps its answers to itself, or loses its last moments.
"""

import asyncio
import itertools
import json

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from redis.exceptions import ConnectionError as StoreGone

from orchestrator.store.connection import connect
from orchestrator.terminal import link as link_module
from orchestrator.terminal.link import LinkLost, SidecarLink
from orchestrator.terminal.live import LiveBudget, LiveLog
from orchestrator.terminal.output_store import OutputStore
from sidecar.output_log import OutputLog
from sidecar.protocol import RecordKind, decode_json, encode_records
from tests.orchestrator.terminal.planes import session_named

WINDOW_BYTES, RING_BYTES = 6000, 4000
WRITE_MAX_BYTES = 900
RECORD_COST_BYTES = 200  # what a record counts for besides its data
BATCH_BYTES = 1500
MOST_PLANES = 4
_session_numbers = itertools.count(1)


def cost(record):
    return len(record.data) + RECORD_COST_BYTES


class PlayedStore:
    """An `OutputStore` whose every append waits for the test: is it carried out, how often, and is that told?"""

    def __init__(self, real):
        self._real = real
        self.asked = None  # the records of the append under way
        self.result = None  # its answer, once it was carried out
        self._answer = None

    async def append(self, _session_id, records):
        self.asked, self.result = list(records), None
        self._answer = asyncio.get_running_loop().create_future()
        try:
            return await self._answer
        finally:
            self.asked = None

    async def carry_out(self, session_id):
        self.result = await self._real.append(session_id, self.asked)

    def tell(self):
        self._answer.set_result(self.result)

    def fail(self):
        self._answer.set_exception(StoreGone())


class Plane:
    """A control plane that believes that it has the session, and its wire to the sidecar."""

    def __init__(self, session_id, store, bounds):
        self.up, self.down = [], []  # what is on the wire, each way
        self.store = PlayedStore(store)
        self.live = LiveLog(*bounds, LiveBudget())
        self.link = SidecarLink(session_named(session_id), self, self.store, self.live, on_appended=self._on_appended)
        self.appends = asyncio.get_running_loop().create_task(self.link.run_appends())

    async def send_text(self, message):
        self.down.append(decode_json(message))

    async def send_binary(self, message):
        raise AssertionError("nothing else is sent here")

    async def close(self, reason):
        raise AssertionError("nobody closes here")

    async def _on_appended(self, _session_id, _records):
        pass

    async def end(self):
        self.link.lost()
        self.appends.cancel()
        await asyncio.gather(self.appends, return_exceptions=True)


class Protocol(RuleBasedStateMachine):
    def __init__(self, valkey, *, drop_oldest):
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis = connect(valkey)
        self.session_id = f"cs_{next(_session_numbers)}"
        self.store = OutputStore(self.redis, retention_bytes=1024 * 1024)
        self.now_ms = 1000
        self.log = OutputLog(window_bytes=WINDOW_BYTES, ring_bytes=RING_BYTES, clock_ms=lambda: self.now_ms)
        self.log.drop_oldest = drop_oldest
        self.written = bytearray()
        self.planes = []
        self.live = None  # the plane that the sidecar is connected to
        self.welcomed = False
        self.numbered = {}  # every record that was ever on a wire, by seq
        self.states = [(0, [])]  # the store after each append: its last seq and a dump of its keys
        self.ever_stored = 0
        self.acknowledged = 0  # the newest acknowledgement that reached the sidecar
        self.checked = 0

    def run(self, coroutine):
        return self.runner.run(coroutine)

    async def settle(self):
        for _ in range(8):
            await asyncio.sleep(0)

    # --- the program in the terminal

    @rule(
        writes=st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.integers(-50, 200)), min_size=1, max_size=5)
    )
    def the_program_writes(self, writes):
        """What is further apart than a moment becomes records of its own."""
        for data, step_ms in writes:
            self.now_ms += step_ms
            if not self.log.full:
                self.log.write(data)
                self.written += data

    @rule()
    def the_terminal_is_resized(self):
        if not self.log.full:
            self.log.note(RecordKind.RESIZE, {"cols": 80, "rows": 24})

    # --- the sidecar and its wire

    @rule()
    @precondition(lambda self: self.live is None and len(self.planes) < MOST_PLANES)
    def the_sidecar_dials_a_new_control_plane(self):
        async def dial():
            bounds = await self.store.bounds(self.session_id)
            plane, stands_at = Plane(self.session_id, self.store, bounds), bounds[1]
            assert self.log.first_seq - 1 <= stands_at <= self.log.last_seq, "the store cannot be healed"
            plane.down.append({"t": "welcome", "resumeAfter": stands_at})
            return plane

        self.live, self.welcomed = self.run(dial()), False
        self.planes.append(self.live)

    @rule()
    @precondition(lambda self: self.live)
    def the_wire_breaks(self):
        """The control plane does not know yet: what is on the wire may reach it much later."""
        self.live.down.clear()
        self.live = None

    @rule(size=st.integers(1, BATCH_BYTES))
    @precondition(lambda self: self.live and self.welcomed and self.log.drained is False)
    def the_sidecar_sends(self, size):
        batch = self.log.take_batch(max_bytes=size)
        for record in batch:
            assert self.numbered.setdefault(record.seq, record) == record, "a record changed after it was sent"
        if batch:
            self.live.up.append(encode_records(batch))

    @rule(count=st.integers(1, 3))
    @precondition(lambda self: self.live and self.live.down)
    def the_sidecar_hears(self, count):
        for message in [self.live.down.pop(0) for _ in range(min(count, len(self.live.down)))]:
            if message["t"] == "ack":
                assert message["seq"] <= self.ever_stored, "acknowledged, but never in the store"
                self.acknowledged = max(self.acknowledged, message["seq"])
                self.log.acknowledge(message["seq"])
            elif message["t"] == "resume":
                self.log.resume(message["after"])
            else:
                self.log.resume(message["resumeAfter"])
                self.welcomed = True

    # --- control planes

    @rule(data=st.data(), count=st.integers(1, 3))
    @precondition(lambda self: any(plane.up for plane in self.planes))
    def a_control_plane_receives(self, data, count):
        plane = data.draw(st.sampled_from([plane for plane in self.planes if plane.up]))

        async def receive():
            for _ in range(min(count, len(plane.up))):
                await plane.link.receive(plane.up.pop(0))
            await self.settle()

        self.run(receive())

    @rule(data=st.data())
    @precondition(lambda self: self.planes)
    def a_control_plane_is_killed(self, data):
        plane = data.draw(st.sampled_from(self.planes))
        self.planes.remove(plane)
        if self.live is plane:
            self.live = None
        self.run(plane.end())

    @rule(data=st.data(), superseded=st.booleans())
    @precondition(lambda self: self.left_behind())
    def a_control_plane_learns_that_its_link_is_lost(self, data, superseded):
        """It appends what had come all the same, unless it hears that another one has the session now."""
        plane = data.draw(st.sampled_from(self.left_behind()))
        plane.up.clear()
        plane.link.lost(superseded=superseded)
        self.run(self.settle())

    def left_behind(self):
        return [plane for plane in self.planes if plane is not self.live and not plane.link.closed.is_set()]

    @rule(data=st.data())
    @precondition(lambda self: self.planes)
    def a_control_plane_compares_its_link_with_the_store(self, data):
        """As it does when the store was started again; a dead wire tells it that the link is lost."""
        plane = data.draw(st.sampled_from(self.planes))

        async def compare():
            last_seq = (await self.store.bounds(self.session_id))[1]
            try:
                await plane.link.resume_from(last_seq)
            except LinkLost:
                return
            await self.settle()

        self.run(compare())

    # --- the store

    def asking(self):
        return [plane for plane in self.planes if plane.store.asked]

    @rule(data=st.data(), times=st.integers(1, 2))
    @precondition(lambda self: self.asking())
    def the_store_appends(self, data, times):
        """Twice: redis-py may run a command again when a connection broke."""
        plane = data.draw(st.sampled_from(self.asking()))

        async def append():
            for _ in range(times):
                await self._carry_out(plane)

        self.run(append())

    async def _carry_out(self, plane):
        await plane.store.carry_out(self.session_id)
        last_seq = (await self.store.bounds(self.session_id))[1]
        self.ever_stored = max(self.ever_stored, last_seq)
        keys = self.store.keys(self.session_id)
        self.states.append((last_seq, [(key, await self.redis.dump(key)) for key in keys]))
        await self.check_store()

    @rule(data=st.data())
    @precondition(lambda self: any(plane.store.result for plane in self.asking()))
    def the_store_answers(self, data):
        plane = data.draw(st.sampled_from([plane for plane in self.asking() if plane.store.result]))
        self.run(self._after(plane.store.tell))

    @rule(data=st.data())
    @precondition(lambda self: self.asking())
    def the_stores_answer_is_lost(self, data):
        """Whether it was carried out or not: the control plane cannot tell."""
        plane = data.draw(st.sampled_from(self.asking()))
        self.run(self._after(plane.store.fail))

    async def _after(self, change):
        change()
        await self.settle()

    @rule(appends=st.integers(1, 6))
    @precondition(lambda self: len(self.states) > 1)
    def the_store_loses_its_last_moments(self, appends):
        """As much as a sidecar promises to keep for it: the last RING_BYTES of what was acknowledged."""
        state = max(0, len(self.states) - 1 - appends)
        while not self._can_be_healed(self.states[state][0]):
            state += 1
        del self.states[state + 1 :]
        last_seq, dumps = self.states[-1]
        note(f"the store stands at {last_seq} again")

        async def restore():
            await self.redis.delete(*self.store.keys(self.session_id))
            for key, dump in dumps:
                if dump is not None:
                    await self.redis.restore(key, 0, dump)
            assert (await self.store.bounds(self.session_id))[1] == last_seq
            self.checked = min(self.checked, last_seq)
            await self.check_store()

        self.run(restore())

    def _can_be_healed(self, last_seq):
        lost = [self.numbered[seq] for seq in range(last_seq + 1, self.acknowledged + 1)]
        return sum(map(cost, lost)) <= RING_BYTES

    # --- now and then nothing is in the way, so that what breaks next breaks something that went far

    @rule(pieces=st.lists(st.binary(min_size=1, max_size=WRITE_MAX_BYTES), min_size=1, max_size=8))
    def all_goes_well(self, pieces):
        for piece in pieces:
            self.the_program_writes([(piece, 10)])
            self.one_round(BATCH_BYTES)

    @rule(
        pieces=st.lists(st.binary(min_size=1, max_size=WRITE_MAX_BYTES), min_size=2, max_size=8),
        arrive=st.integers(1, 7),
    )
    def much_is_on_its_way(self, pieces, arrive):
        """Some of it arrives and is acknowledged while the rest is on the wire."""
        self.one_round(BATCH_BYTES)
        for piece in pieces:
            self.the_program_writes([(piece, 10)])
            self.the_sidecar_sends(BATCH_BYTES)
        self.run(self._arrive(self.live, arrive))
        self.the_sidecar_hears(len(self.live.down))

    def one_round(self, size):
        if self.live is None:
            while len(self.planes) > MOST_PLANES - 1:
                self.run(self.planes.pop(0).end())
            self.the_sidecar_dials_a_new_control_plane()
        self.the_sidecar_hears(len(self.live.down))
        self.the_sidecar_sends(size)
        self.run(self._arrive(self.live))
        self.the_sidecar_hears(len(self.live.down))

    # --- what always holds

    async def check_store(self):
        """Gap-free, and every record as it was numbered; also when it was read before and lost meanwhile."""
        checked = self.checked
        page = await self.store.read(self.session_id, after=checked, limit=10_000)
        assert [record.seq for record in page.records] == list(range(checked + 1, page.last_seq + 1))
        for record in page.records:
            assert self.numbered[record.seq] == record, "the store has something else than was sent"
        self.checked = page.last_seq
        self.check_memories_of_control_planes()
        self.check_nothing_acknowledged_is_missing()

    @invariant()
    def check_nothing_acknowledged_is_missing(self):
        assert self.log.first_seq - 1 <= self.checked, "acknowledged, in no store, and no longer kept"
        assert self.checked <= self.log.last_seq

    @invariant()
    def check_that_the_promised_ring_is_kept(self):
        kept_bytes, promised = 0, self.acknowledged + 1
        while promised > 1 and (kept_bytes := kept_bytes + cost(self.numbered[promised - 1])) <= RING_BYTES:
            promised -= 1
        assert self.log.first_seq <= promised, "less of what was acknowledged is kept than was promised"

    def check_memories_of_control_planes(self):
        """What a replica serves without asking the store is what was stored."""
        for plane in self.planes:
            live = plane.live
            for after in {live.first_seq - 1, max(0, live.last_seq - 3)}:
                page = live.page(after, limit=10_000, max_bytes=1 << 30)
                if page is not None:
                    assert [record.seq for record in page.records] == list(range(after + 1, live.last_seq + 1))
                    assert all(self.numbered[record.seq] == record for record in page.records)
            assert live.last_seq <= self.ever_stored

    @invariant()
    def check_memory(self):
        kept = range(self.log.first_seq, self.log.last_seq + 1)
        known = sum(cost(self.numbered[seq]) for seq in kept if seq in self.numbered)
        # Twice the window: what a resume shows to be stored is let go with the next acknowledgement.
        bound = 2 * WINDOW_BYTES + WRITE_MAX_BYTES + RING_BYTES + 3 * RECORD_COST_BYTES
        assert known + self.log.waiting_bytes <= bound + self._lost_again_bytes(), "more is kept than was promised"

    def _lost_again_bytes(self):
        """What the store lost after it was acknowledged counts as unacknowledged again until it is back."""
        return sum(cost(self.numbered[seq]) for seq in range(self.checked + 1, self.acknowledged + 1))

    # --- the end: with nothing in the way, everything arrives

    def teardown(self):
        try:
            self.finish()
        finally:
            for plane in self.planes:
                self.run(plane.end())
            self.run(self.redis.delete(*self.store.keys(self.session_id)))
            self.run(self.redis.aclose())
            self.runner.close()

    def finish(self):
        self.log.note(RecordKind.EXIT, {"exitCode": 0})
        for _ in range(1000):
            self.one_round(BATCH_BYTES)
            if self.log.drained:
                break
        assert self.log.drained, "the rest does not arrive"
        records = self.run(self._read_all())
        assert [record.seq for record in records] == list(range(1, len(records) + 1))
        self.check_output(records)
        assert records[-1].kind is RecordKind.EXIT
        times = [record.time_ms for record in records]
        assert times == sorted(times)

    def check_output(self, records):
        """Each byte at its place; what is not there was dropped, and that is said, with its count."""
        at = 0
        for record in records:
            assert record.offset == at
            if record.kind is RecordKind.GAP:
                assert self.log.drop_oldest
                at += json.loads(record.data)["droppedBytes"]
            elif record.kind is RecordKind.OUTPUT:
                assert record.data == self.written[at : at + len(record.data)]
                at += len(record.data)
        assert at == len(self.written)

    async def _arrive(self, plane, count=None):
        for message in plane.up[:count]:
            await plane.link.receive(message)
        del plane.up[:count]
        await self.settle()
        while plane.store.asked:
            await self._carry_out(plane)
            await self._after(plane.store.tell)

    async def _read_all(self):
        records = []
        while more := (await self.store.read(self.session_id, after=len(records), limit=10_000)).records:
            records += more
        return records


@pytest.mark.parametrize("drop_oldest", [False, True], ids=["block", "drop-oldest"])
def test_whatever_breaks_the_stored_log_is_what_the_program_wrote(valkey, monkeypatch, drop_oldest):
    monkeypatch.setattr(link_module, "_RETRY_FIRST_S", 0)  # the order of events is the machine's
    run_state_machine_as_test(
        lambda: Protocol(valkey, drop_oldest=drop_oldest),
        settings=settings(
            max_examples=80,
            stateful_step_count=40,
            deadline=None,
            phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes longer than the test may
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
