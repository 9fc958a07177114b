"""Standard MIDI files, format 1: one tempo track and one track for each instrument."""

import struct
from dataclasses import dataclass

TICKS_PER_BEAT = 480


@dataclass(frozen=True)
class Note:
    start: int  # ticks
    length: int  # ticks
    pitch: int  # 0 to 127; on channel 9 a drum
    velocity: int = 90


def write_file(path, tempo, tracks):
    """`tracks`: (name, channel, program or None, notes)."""
    chunks = [_chunk(b"MTrk", _tempo_track(tempo)), *(_chunk(b"MTrk", _track(*track)) for track in tracks)]
    header = _chunk(b"MThd", struct.pack(">HHH", 1, len(chunks), TICKS_PER_BEAT))
    path.write_bytes(header + b"".join(chunks))


def _chunk(kind, content):
    return kind + struct.pack(">I", len(content)) + content


def _tempo_track(tempo):
    microseconds = round(60_000_000 / tempo)
    return b"\x00\xff\x51\x03" + microseconds.to_bytes(3, "big") + b"\x00\xff\x2f\x00"


def _track(name, channel, program, notes):
    encoded = name.encode()
    data = b"\x00\xff\x03" + _length(len(encoded)) + encoded
    if program is not None:
        data += b"\x00" + bytes((0xC0 | channel, program))
    events = []
    for note in notes:
        events.append((note.start + note.length, 0, bytes((0x80 | channel, note.pitch, 0))))
        events.append((note.start, 1, bytes((0x90 | channel, note.pitch, note.velocity))))
    now = 0
    for at, _, event in sorted(events):  # at the same tick a note ends before the next begins
        data += _length(at - now) + event
        now = at
    return data + b"\x00\xff\x2f\x00"


def _length(value):
    """A number in groups of seven bits, the highest first."""
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(0x80 | value & 0x7F)
    return bytes(reversed(groups))
