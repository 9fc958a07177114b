"""The link between a workspace's sidecar and the control plane: version 1, imported by both ends.

A WebSocket that the sidecar opens (`GET /link`, `Authorization: Bearer <link token>`, `X-Session-Id`). Text messages
are JSON objects whose `t` names them; binary messages start with one byte that says what follows. Both ends treat what
arrives as hostile: anything that does not parse raises `ProtocolError` and ends the link, never the process.

sidecar -> control plane
  hello    {v, sessionId, workspaceId, boot, firstSeq, lastSeq}  first message; firstSeq..lastSeq are still kept
  RECORDS  one or more records of the output log, in order
  result   {id, ...}                      answer to a request
  error    {id, code, detail}             refusal of a request
  STREAM   bytes of a stream that a request opened; `streamEnd` {id, ...facts} or `error` ends it
control plane -> sidecar
  welcome  {v, resumeAfter, outputPolicy} the store stands at this seq: send on from resumeAfter + 1
  resume   {after}                        the same, in the middle of a link (the store lost its last moments)
  ack      {seq}                          durably appended up to here
  INPUT    id, idempotency key, bytes for the terminal; answered with {id, bytes} after the write
  request  {id, op, args}                 see the operations in `terminal.py` and `workspace.py`
  credit   {id, bytes}                    the sidecar may send this many more bytes of stream `id`
  cancel   {id}                           stop working on request or stream `id`
"""

import codecs
import json
import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum, StrEnum
from typing import Any, Final, NamedTuple, TypeAlias

VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
MAX_CHUNK_BYTES: Final = 64 * 1024
MAX_INPUT_BYTES: Final = 1024 * 1024
ONCE: Final = "once-"  # how the key of an input begins whose caller gave none
MAX_SEQ: Final = 2**53 - 2  # the store counts in doubles, and after the last record comes one that closes the log
MAX_TIME_MS: Final = 253_402_300_799_999  # the end of the year 9999, the last that dates have
STREAM_PIECE_BYTES: Final = 64 * 1024
STREAM_CREDIT_BYTES: Final = 1024 * 1024  # what a sender of a stream may send before the first `credit`
HEARTBEAT_S: Final = 10.0  # each side pings this often, and gives the other up after three of them

JsonObject: TypeAlias = dict[str, Any]


class OutputPolicy(StrEnum):
    """What happens when a workspace holds as much output as it may and cannot hand it on."""

    BLOCK = "block"  # the program waits
    DROP_OLDEST = "drop-oldest"  # the oldest is dropped, and a GAP record says how much


class ProtocolError(Exception):
    """The other end sent something that is not this protocol."""


class Binary(IntEnum):
    """First byte of a binary message."""

    RECORDS = 1
    INPUT = 2
    STREAM = 3


class RecordKind(IntEnum):
    """What a record of the output log is. All but OUTPUT carry a small JSON object."""

    OUTPUT = 0  # bytes from the PTY
    START = 1  # {"cols", "rows"}: a shell was started
    # {"exitCode"} or {"signal"}, {"ptyHeldOpen": true} when a descendant still had the PTY open; or, put there by the
    # control plane when the workspace ended without telling, {"lost": reason}
    EXIT = 2
    RESIZE = 3  # {"cols", "rows"}
    GAP = 4  # {"droppedBytes"}: so much output was dropped here, by the session's own output policy


class Record(NamedTuple):
    """One numbered record. It never changes once it has its `seq`."""

    seq: int  # 1, 2, 3, ... for the life of the session
    offset: int  # bytes that the terminal had put out before this record, dropped ones included
    time_ms: int  # Unix time
    kind: RecordKind
    data: bytes

    @property
    def output_bytes(self) -> int:
        return len(self.data) if self.kind is RecordKind.OUTPUT else 0


class Input(NamedTuple):
    request_id: int
    key: str  # the caller's Idempotency-Key, made unique per caller; empty: none; `ONCE` and more: made for this input
    data: bytes


_RECORD: Final = struct.Struct("!QQQBI")
_INPUT: Final = struct.Struct("!BQB")
_STREAM: Final = struct.Struct("!BQ")
RECORD_HEADER_BYTES: Final = _RECORD.size


def encode_json(message: JsonObject) -> str:
    return json.dumps(message, separators=(",", ":"))


def decode_json(text: str | bytes) -> JsonObject:
    """
    Raises:
        ProtocolError: not a JSON object with a `t` that is text.
    """
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None
    if not isinstance(message, dict) or not isinstance(message.get("t"), str):
        raise ProtocolError("not a message: a JSON object with `t` was expected")
    return message


def integer(message: JsonObject, name: str) -> int:
    """A non-negative integer member, at most 2**63 - 1.

    Raises:
        ProtocolError: missing or something else.
    """
    value = message.get(name)
    if type(value) is not int or not 0 <= value < 2**63:
        raise ProtocolError(f"`{name}` of `{message.get('t')}` is not an integer from 0 to 2**63 - 1")
    return value


def encode_records(records: Iterable[Record]) -> bytes:
    parts = [b"\x01"]
    for record in records:
        parts.append(_RECORD.pack(record.seq, record.offset, record.time_ms, record.kind, len(record.data)))
        parts.append(record.data)
    return b"".join(parts)


def decode_records(message: bytes) -> Iterator[Record]:
    """The records of a RECORDS message, contiguous in `seq`.

    Raises:
        ProtocolError: cut short, out of order, of an unknown kind, or with a chunk over MAX_CHUNK_BYTES.
    """
    position, end, previous = 1, len(message), None
    while position < end:
        if end - position < RECORD_HEADER_BYTES:
            raise ProtocolError("a record's header is cut short")
        seq, offset, time_ms, kind, length = _RECORD.unpack_from(message, position)
        position += RECORD_HEADER_BYTES
        if length > MAX_CHUNK_BYTES or end - position < length:
            raise ProtocolError("a record is too long or cut short")
        if not 1 <= seq <= MAX_SEQ or offset >= 2**63 or time_ms > MAX_TIME_MS:
            raise ProtocolError("a record's numbers are out of range")
        if previous is not None and seq != previous + 1:
            raise ProtocolError("a record is out of order")
        try:
            record_kind = RecordKind(kind)
        except ValueError:
            raise ProtocolError(f"unknown record kind {kind}") from None
        yield Record(seq, offset, time_ms, record_kind, message[position : position + length])
        position, previous = position + length, seq


def encode_input(request: Input) -> bytes:
    key = request.key.encode()
    return _INPUT.pack(Binary.INPUT, request.request_id, len(key)) + key + request.data


def decode_input(message: bytes) -> Input:
    """
    Raises:
        ProtocolError: cut short, or its key is not UTF-8.
    """
    if len(message) < _INPUT.size:
        raise ProtocolError("an input is cut short")
    _, request_id, key_length = _INPUT.unpack_from(message)
    start = _INPUT.size + key_length
    if len(message) < start:
        raise ProtocolError("an input is cut short")
    try:
        key = message[_INPUT.size : start].decode()
    except UnicodeDecodeError:
        raise ProtocolError("an input's key is not UTF-8") from None
    return Input(request_id, key, message[start:])


def encode_stream(stream_id: int, piece: bytes) -> bytes:
    return _STREAM.pack(Binary.STREAM, stream_id) + piece


def decode_stream(message: bytes) -> tuple[int, bytes]:
    """
    Raises:
        ProtocolError: cut short.
    """
    if len(message) < _STREAM.size:
        raise ProtocolError("a piece of a stream is cut short")
    return _STREAM.unpack_from(message)[1], message[_STREAM.size :]


def complete_utf8(data: bytes) -> int:
    """How many of these bytes to give out so that no character is split: all but an unfinished last character.

    Never less than `len(data) - 3` (a UTF-8 character has at most 4 bytes, RFC 3629), and text that is decoded piece by
    piece at such places equals the text decoded as a whole.
    """
    start = max(0, len(data) - 3)
    # Not final: an unfinished character stays undecoded; what cannot begin one counts as decoded (U+FFFD).
    return start + codecs.utf_8_decode(data[start:], "replace", False)[1]
