"""What a replica serves from memory is what the store would say, or nothing."""

import pytest

from orchestrator.terminal.live import MAX_BYTES, LiveBudget, LiveLog
from sidecar.protocol import Record, RecordKind


def records(first, count, size=1):
    return [
        Record(first + place, (first + place) * size, 1000, RecordKind.OUTPUT, b"x" * size) for place in range(count)
    ]


def read_log(**facts):
    live = LiveLog(facts.pop("first", 1), facts.pop("last", 0), facts.pop("budget", LiveBudget()))
    live.page(0, limit=1, max_bytes=1)  # somebody reads
    return live


def seqs(page):
    return [record.seq for record in page.records]


def test_a_reader_who_keeps_up_is_served_from_memory():
    live = read_log()
    live.add(records(1, 5), 1)
    page = live.page(2, limit=10, max_bytes=1000)
    assert (seqs(page), page.first_seq, page.last_seq) == ([3, 4, 5], 1, 5)
    assert seqs(live.page(5, limit=10, max_bytes=1000)) == []


def test_a_reader_who_has_more_than_the_memory_is_left_to_the_store():
    live = read_log()
    live.add(records(1, 5), 1)
    assert live.page(6, limit=10, max_bytes=1000) is None


def test_a_reader_who_has_what_the_store_lost_is_not_sent_back():
    live = LiveLog(1, 90, LiveBudget(), numbered_seq=100)
    page = live.page(97, limit=10, max_bytes=1000)
    assert (page.records, page.last_seq) == ([], 97)
    assert live.page(101, limit=10, max_bytes=1000) is None
    live.add(records(91, 20), 1)
    assert seqs(live.page(97, limit=2, max_bytes=1000)) == [98, 99]


def test_a_page_is_bounded_in_number_and_bytes_and_has_one_at_least():
    live = read_log()
    live.add(records(1, 10, size=100), 1)
    assert seqs(live.page(0, limit=3, max_bytes=10_000)) == [1, 2, 3]
    assert seqs(live.page(0, limit=10, max_bytes=250)) == [1, 2]
    assert seqs(live.page(0, limit=10, max_bytes=1)) == [1]


def test_what_was_before_the_link_is_left_to_the_store():
    live = read_log(last=7)
    live.add(records(8, 2), 1)
    assert live.page(5, limit=10, max_bytes=1000) is None
    assert seqs(live.page(7, limit=10, max_bytes=1000)) == [8, 9]


def test_nothing_is_kept_while_nobody_reads(monkeypatch):
    budget = LiveBudget()
    before = budget.left_bytes
    live = LiveLog(1, 0, budget)
    live.add(records(1, 10), 1)
    assert budget.left_bytes == before
    assert live.last_seq == 10
    assert live.page(0, limit=10, max_bytes=1000) is None


def test_a_session_keeps_its_newest_and_all_sessions_share_a_budget():
    budget = LiveBudget(max_bytes=MAX_BYTES + MAX_BYTES // 2)
    first, second = read_log(budget=budget), read_log(budget=budget)
    for log in (first, second):
        for batch in range(100):
            log.add(records(1 + batch * 4, 4, size=64 * 1024), 1)
    assert first.page(0, limit=1, max_bytes=1) is None
    assert seqs(first.page(399, limit=1, max_bytes=1)) == [400]
    assert budget.left_bytes > -(64 * 1024 + 250) * 4
    first.clear()
    second.clear()
    assert budget.left_bytes == MAX_BYTES + MAX_BYTES // 2


def test_what_the_store_lost_and_got_again_is_in_memory_once():
    live = read_log()
    live.add(records(1, 5), 1)
    live.add(records(3, 4), 1)
    assert seqs(live.page(0, limit=100, max_bytes=1000)) == [1, 2, 3, 4, 5, 6]


def test_what_retention_trimmed_is_left_to_the_store_which_says_so():
    live = read_log()
    live.add(records(1, 5), 1)
    live.add(records(6, 5), 4)
    assert live.page(1, limit=100, max_bytes=1000) is None
    page = live.page(3, limit=100, max_bytes=1000)
    assert (seqs(page)[0], page.first_seq) == (4, 4)


@pytest.mark.parametrize("count", [1, 3000])
def test_memory_does_not_grow_with_what_went_by(count):
    live = read_log()
    for batch in range(3000 // count):
        live.add(records(1 + batch * count, count, size=10_000), 1)
    assert len(live._records) < 2 * MAX_BYTES // 10_000 + count


def test_a_batch_that_holds_records_twice_is_served_as_it_is_stored():
    live = read_log()
    live.add(records(1, 2), 1)
    live.add(records(3, 2) + records(3, 4), 1)  # two resumes crossed: the store passed over the second copy
    assert seqs(live.page(0, limit=10, max_bytes=1000)) == [1, 2, 3, 4, 5, 6]
    assert seqs(live.page(4, limit=10, max_bytes=1000)) == [5, 6]


def test_what_is_not_durable_is_given_only_to_who_asks_for_it_early():
    live = read_log()
    live.add(records(1, 2), 1)
    live.receive(records(3, 2))
    assert seqs(live.page(2, limit=10, max_bytes=1000)) == []
    early = live.page(2, limit=10, max_bytes=1000, early=True)
    assert (seqs(early), early.last_seq) == ([3, 4], 2)
    assert seqs(live.page(0, limit=10, max_bytes=1000, early=True)) == [1, 2], "first what is durable"
    live.add(records(3, 1), 1)
    assert seqs(live.page(2, limit=10, max_bytes=1000)) == [3]
    assert seqs(live.page(3, limit=10, max_bytes=1000, early=True)) == [4]


def test_how_the_terminal_ended_is_never_told_early():
    live = read_log()
    live.receive([*records(1, 1), Record(2, 1, 1000, RecordKind.EXIT, b"{}"), *records(3, 1)])
    assert seqs(live.page(0, limit=10, max_bytes=1000, early=True)) == [1]
    assert seqs(live.page(1, limit=10, max_bytes=1000, early=True)) == []


def test_what_the_sidecar_is_to_send_again_is_not_given_twice():
    live = read_log()
    live.receive(records(1, 3))
    live.forget_ahead()
    live.receive(records(1, 3))
    live.receive(records(2, 3))  # crossed on the way
    assert seqs(live.page(0, limit=10, max_bytes=1000, early=True)) == [1, 2, 3, 4]
    live.receive(records(9, 1))  # not the next one
    assert seqs(live.page(0, limit=10, max_bytes=1000, early=True)) == [1, 2, 3, 4]
