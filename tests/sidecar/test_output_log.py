"""The sidecar's log against a model of the control plane and its store: crashes, loss, repeats, any order of events."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sidecar.output_log import OutputLog, ResumeImpossible
from sidecar.protocol import MAX_CHUNK_BYTES, RecordKind

RING = 4000


class LinkAndStore(RuleBasedStateMachine):
    """The store takes only the next seq; the link may break with messages on it; the store may lose its tail."""

    @initialize()
    def start(self):
        self.now_ms = 1000
        self.log = OutputLog(window_bytes=5000, ring_bytes=RING, clock_ms=lambda: self.now_ms)
        self.produced = b""
        self.store = []
        self.seen = {}
        self.on_the_way = []
        self.connected = False

    @rule(data=st.binary(min_size=1, max_size=700), step_ms=st.integers(-50, 200))
    def output(self, data, step_ms):
        self.now_ms += step_ms
        if not self.log.full:
            self.log.write(data)
            self.produced += data

    @rule()
    def resized(self):
        self.log.note(RecordKind.RESIZE, {"cols": 80, "rows": 24})

    @rule()
    @precondition(lambda self: not self.connected)
    def connect(self):
        self.on_the_way.clear()
        self.log.resume(len(self.store))
        self.connected = True

    @rule()
    @precondition(lambda self: self.connected)
    def disconnect(self):
        self.connected = False

    @rule(size=st.integers(1, 2000))
    @precondition(lambda self: self.connected)
    def send(self, size):
        batch = self.log.take_batch(max_bytes=size)
        if batch:
            self.on_the_way.append(batch)

    @rule(acknowledge=st.booleans(), twice=st.booleans())
    @precondition(lambda self: self.on_the_way)
    def arrive(self, acknowledge, twice):
        batch = self.on_the_way.pop(0)
        for _ in range(1 + twice):  # a second replica, or a repeated command
            for record in batch:
                if record.seq == len(self.store) + 1:
                    self.store.append(record)
                    assert self.seen.setdefault(record.seq, record) == record, "a chunk once seen changed"
        if acknowledge and self.connected and len(self.store) >= batch[-1].seq:
            self.log.acknowledge(batch[-1].seq)

    @rule(lost=st.integers(1, 5))
    def store_loses_its_last_moments(self, lost):
        kept_bytes, keep = 0, len(self.store)
        while keep and lost and kept_bytes + len(self.store[keep - 1].data) + 200 < RING:
            kept_bytes += len(self.store[keep - 1].data) + 200
            keep, lost = keep - 1, lost - 1
        if keep >= self.log.first_seq - 1:
            del self.store[keep:]
            self.connected = False

    @invariant()
    def the_store_is_a_prefix_of_what_the_program_wrote(self):
        assert [record.seq for record in self.store] == list(range(1, len(self.store) + 1))
        joined, offset = b"", 0
        for record in self.store:
            assert record.offset == offset
            if record.kind is RecordKind.OUTPUT:
                assert 0 < len(record.data) <= MAX_CHUNK_BYTES
                joined += record.data
                offset += len(record.data)
        assert self.produced.startswith(joined)
        times = [record.time_ms for record in self.store]
        assert times == sorted(times)

    @invariant()
    def memory_is_bounded(self):
        kept = sum(len(record.data) for record in self.log._records) + self.log.waiting_bytes
        assert kept <= 5000 + 700 + RING + 64 * 40

    def teardown(self):
        self.log.note(RecordKind.EXIT, {"exitCode": 0})
        self.log.resume(len(self.store))
        while batch := self.log.take_batch():
            self.store += batch
            self.log.acknowledge(batch[-1].seq)
        self.the_store_is_a_prefix_of_what_the_program_wrote()
        assert b"".join(record.data for record in self.store if record.kind is RecordKind.OUTPUT) == self.produced
        assert self.store[-1].kind is RecordKind.EXIT
        assert self.log.drained


TestLinkAndStore = LinkAndStore.TestCase
TestLinkAndStore.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def _acknowledge_all(log):
    while batch := log.take_batch():
        log.acknowledge(batch[-1].seq)


def test_a_full_window_says_so_until_something_is_acknowledged():
    log = OutputLog(window_bytes=1000, ring_bytes=1000)
    log.write(b"x" * 1000)
    assert log.full
    _acknowledge_all(log)
    assert not log.full


def test_a_flood_becomes_large_chunks():
    log = OutputLog()
    for _ in range(100):
        log.write(b"y" * 4095)
    sizes = [len(record.data) for record in log.take_batch(max_bytes=10**6)]
    assert sizes[:-1] == [MAX_CHUNK_BYTES] * (len(sizes) - 1)


def test_what_was_acknowledged_is_sent_again_to_a_store_that_lost_it():
    log = OutputLog()
    for number in range(10):
        log.write(b"%d" % number)
        _acknowledge_all(log)
    log.resume(4)
    assert [record.data for record in log.take_batch()] == [b"4", b"5", b"6", b"7", b"8", b"9"]


def test_a_store_behind_everything_that_is_kept_cannot_be_healed():
    log = OutputLog(ring_bytes=1000)
    for _ in range(20):
        log.write(b"z" * 500)
        _acknowledge_all(log)
    with pytest.raises(ResumeImpossible):
        log.resume(0)


def test_an_acknowledgement_of_what_was_never_sent_is_refused():
    log = OutputLog()
    log.write(b"a")
    with pytest.raises(ResumeImpossible):
        log.acknowledge(1)


def test_output_while_nobody_takes_it_keeps_its_times():
    now = [1000]
    log = OutputLog(clock_ms=lambda: now[0])
    for _ in range(3):
        log.write(b"line\n")
        now[0] += 5000
    assert [record.time_ms for record in (*log.take_batch(), *log.take_batch())] == [1000, 6000, 11000]


def test_an_unfinished_character_waits_for_its_rest_and_for_the_end_at_most():
    log = OutputLog()
    log.write("é".encode()[:1])
    assert log.take_batch() == []
    log.note(RecordKind.EXIT, {})
    assert [(record.kind, record.data) for record in log.take_batch()] == [
        (RecordKind.OUTPUT, b"\xc3"),
        (RecordKind.EXIT, b"{}"),
    ]


@given(
    steps=st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=900),
            st.text(min_size=1, max_size=300).map(str.encode),
            st.sampled_from(["send", "send and acknowledge", "lose the link", "resize"]),
        ),
        max_size=60,
    )
)
@settings(max_examples=300, deadline=None)
def test_with_drop_oldest_every_byte_is_there_or_counted_in_a_gap_at_its_place(steps):
    log = OutputLog(window_bytes=2000, ring_bytes=100_000)
    log.drop_oldest = True
    produced, stored, acknowledged = b"", [], 0
    for step in [*steps, "lose the link"]:
        if isinstance(step, bytes):
            log.write(step)
            produced += step
            assert not log.full
            assert log.waiting_bytes <= 2000 + 200
        elif step == "resize":
            log.note(RecordKind.RESIZE, {})
        elif step == "lose the link":
            log.resume(acknowledged)
            del stored[acknowledged:]
        else:
            stored += log.take_batch(max_bytes=500)
            if stored and step == "send and acknowledge":
                acknowledged = stored[-1].seq
                log.acknowledge(acknowledged)
    log.note(RecordKind.EXIT, {})
    while batch := log.take_batch():
        stored += batch
    position, gaps = 0, 0
    for record in stored:
        assert record.offset == position
        if record.kind is RecordKind.OUTPUT:
            assert record.data == produced[position : position + len(record.data)]
            position += len(record.data)
        elif record.kind is RecordKind.GAP:
            gaps += 1
            position += json.loads(record.data)["droppedBytes"]
    assert position == len(produced)
    assert [record.seq for record in stored] == list(range(1, len(stored) + 1))
    assert gaps or len(produced) == sum(record.output_bytes for record in stored)


def test_a_gap_begins_and_ends_between_characters():
    log = OutputLog(window_bytes=1000)
    log.drop_oldest = True
    log.write("é".encode() * 1000)
    gap, text = log.take_batch(max_bytes=10_000)
    assert gap.kind is RecordKind.GAP
    assert text.data.decode() == "é" * (len(text.data) // 2)
    assert json.loads(gap.data)["droppedBytes"] + len(text.data) == 2000
