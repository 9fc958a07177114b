"""The frames of the link: what one end writes the other reads, and garbage ends in ProtocolError only."""

import codecs
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import protocol
from sidecar.protocol import Input, ProtocolError, Record, RecordKind


def _records(first, sizes):
    return [
        Record(first + i, 1000 * i, 1_700_000_000_000 + i, RecordKind.OUTPUT, b"x" * n) for i, n in enumerate(sizes)
    ]


@given(st.integers(1, protocol.MAX_SEQ - 20), st.lists(st.integers(0, 300), max_size=20))
def test_records_come_back_as_they_were_sent(first, sizes):
    records = _records(first, sizes)
    assert list(protocol.decode_records(protocol.encode_records(records))) == records


@given(st.text(max_size=60), st.binary(max_size=200), st.integers(0, 2**63 - 1))
def test_input_comes_back_as_it_was_sent(key, data, request_id):
    sent = Input(request_id, key, data)
    assert protocol.decode_input(protocol.encode_input(sent)) == sent


@given(st.binary(max_size=300))
def test_garbage_is_refused_or_read_but_never_breaks_the_parser(garbage):
    for decode in (protocol.decode_json, protocol.decode_input, protocol.decode_stream):
        try:
            decode(garbage)
        except ProtocolError:
            continue
    with contextlib.suppress(ProtocolError):
        list(protocol.decode_records(b"\x01" + garbage))


@given(st.integers(1, 60))
def test_records_cut_short_anywhere_are_refused(cut):
    message = protocol.encode_records(_records(1, [30]))
    if cut < len(message) - 1:
        with pytest.raises(ProtocolError):
            list(protocol.decode_records(message[:-cut]))


def test_records_out_of_order_are_refused():
    one, two = _records(5, [1, 1])
    with pytest.raises(ProtocolError, match="out of order"):
        list(protocol.decode_records(protocol.encode_records([two, one])))


def test_a_chunk_over_the_limit_is_refused():
    with pytest.raises(ProtocolError, match="too long"):
        list(protocol.decode_records(protocol.encode_records(_records(1, [protocol.MAX_CHUNK_BYTES + 1]))))


@pytest.mark.parametrize("text", ["[]", '"x"', "{", '{"t": 1}', "{}", "[" * 100_000])
def test_json_that_is_no_message_is_refused(text):
    with pytest.raises(ProtocolError):
        protocol.decode_json(text)


@pytest.mark.parametrize("value", [-1, 2**63, 1.5, "1", None, True])
def test_a_number_that_is_no_count_is_refused(value):
    with pytest.raises(ProtocolError, match="seq"):
        protocol.integer({"t": "ack", "seq": value}, "seq")


_BYTES_AND_TEXT = st.lists(
    st.one_of(st.text(max_size=8).map(lambda s: s.encode("utf-8", "replace")), st.binary(max_size=8)), max_size=12
).map(b"".join)


@given(_BYTES_AND_TEXT, st.lists(st.integers(1, 7), min_size=1, max_size=50))
def test_text_decoded_chunk_by_chunk_equals_text_decoded_as_a_whole(stream, read_sizes):
    chunks, waiting, position = [], b"", 0
    for size in read_sizes * (len(stream) // len(read_sizes) + 1):
        waiting += stream[position : position + size]
        position += size
        whole = protocol.complete_utf8(waiting)
        assert whole >= len(waiting) - 3
        chunks.append(waiting[:whole])
        waiting = waiting[whole:]
    chunks.append(waiting)
    assert b"".join(chunks) == stream
    assert "".join(chunk.decode(errors="replace") for chunk in chunks) == stream.decode(errors="replace")


@given(st.text(min_size=1, max_size=30), st.integers(1, 100))
def test_a_character_is_never_split(text, cut):
    data = text.encode("utf-8", "ignore")[:cut]
    codecs.decode(data[: protocol.complete_utf8(data)], "utf-8")  # strict


@pytest.mark.parametrize(
    "numbers", [{"seq": protocol.MAX_SEQ + 1}, {"offset": 2**63}, {"time_ms": 253_402_300_800_000}]
)
def test_numbers_that_no_terminal_can_have_are_refused(numbers):
    record = _records(1, [1])[0]._replace(**numbers)
    with pytest.raises(ProtocolError, match="out of range"):
        list(protocol.decode_records(protocol.encode_records([record])))
