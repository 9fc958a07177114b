"""From a genre, a key and a mode to the notes of each instrument."""

from dataclasses import dataclass

from midi import TICKS_PER_BEAT, Note

KEYS = {"C": 0, "C#": 1, "Db": 1, "D": 2, "D#": 3, "Eb": 3, "E": 4, "F": 5, "F#": 6, "Gb": 6, "G": 7, "G#": 8,
        "Ab": 8, "A": 9, "A#": 10, "Bb": 10, "B": 11}  # fmt: skip
MODES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
}
KICK, SNARE, CLOSED_HAT, RIDE = 36, 38, 42, 51
BEATS_PER_BAR = 4


@dataclass(frozen=True)
class Genre:
    progression: tuple  # degrees of the scale, one for each bar
    kick: tuple  # beats in the bar
    snare: tuple
    hat: tuple
    bass: tuple  # (beat, step of the chord)
    strum: tuple  # beats
    swing: float = 0.0  # how much an off-beat comes late, in beats
    cymbal: int = CLOSED_HAT


EIGHTHS = (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)
GENRES = {
    "classic_rock": Genre((1, 4, 5, 4), (0, 2, 2.5), (1, 3), EIGHTHS, tuple((b, 0) for b in EIGHTHS), (0, 1.5, 2, 3.5)),
    "blues": Genre((1, 1, 1, 1, 4, 4, 1, 1, 5, 4, 1, 5), (0, 2), (1, 3), EIGHTHS,
                   ((0, 0), (1, 1), (2, 2), (3, 1)), (0, 1, 2, 3), swing=1 / 6),
    "jazz": Genre((2, 5, 1, 6), (0,), (1, 3), (0, 1, 1.5, 2, 3, 3.5),
                  ((0, 0), (1, 1), (2, 2), (3, 1)), (1.5, 3.5), swing=1 / 6, cymbal=RIDE),
    "pop": Genre((1, 5, 6, 4), (0, 1.5, 2), (1, 3), EIGHTHS, ((0, 0), (1.5, 0), (2, 0), (3.5, 2)), (0, 1, 2, 3)),
    "funk": Genre((1, 1, 4, 1), (0, 0.75, 2.5), (1, 3), tuple(n / 4 for n in range(16)),
                  ((0, 0), (0.75, 0), (1.5, 2), (2.5, 0), (3.25, 1)), (0.5, 1.25, 2.5, 3.25)),
}  # fmt: skip


def compose(genre, key, mode, sections, with_keys):
    """{instrument: (channel, program, notes)}; the same wishes always give the same notes."""
    style, root, scale = GENRES[genre], KEYS[key], MODES[mode]
    bars = list(style.progression) * sections
    parts = {
        "drums": (9, None, _drums(style, len(bars))),
        "bass": (1, 33, _bass(style, bars, root, scale)),
        "guitar": (2, 27, _chords(style, bars, root, scale, style.strum, octave=4, length=0.45)),
    }
    if with_keys:
        parts["keys"] = (3, 4, _chords(style, bars, root, scale, (0, 2), octave=5, length=1.9))
    return parts


def _drums(style, bars):
    hits = [(beat, KICK, 105) for beat in style.kick]
    hits += [(beat, SNARE, 100) for beat in style.snare]
    hits += [(beat, style.cymbal, 80 if beat % 1 == 0 else 60) for beat in style.hat]
    return [
        Note(_ticks(bar, beat, style), TICKS_PER_BEAT // 8, drum, velocity)
        for bar in range(bars)
        for beat, drum, velocity in hits
    ]


def _bass(style, bars, root, scale):
    return [
        Note(_ticks(bar, beat, style), TICKS_PER_BEAT * 2 // 5, _pitch(root, scale, degree + 2 * step, octave=2), 95)
        for bar, degree in enumerate(bars)
        for beat, step in style.bass
    ]


def _chords(style, bars, root, scale, beats, octave, length):
    return [
        Note(_ticks(bar, beat, style), round(TICKS_PER_BEAT * length), _pitch(root, scale, degree + third, octave), 75)
        for bar, degree in enumerate(bars)
        for beat in beats
        for third in (0, 2, 4)
    ]


def _ticks(bar, beat, style):
    late = style.swing if beat % 1 == 0.5 else 0
    return round((bar * BEATS_PER_BAR + beat + late) * TICKS_PER_BEAT)


def _pitch(root, scale, degree, octave):
    """The note of a degree: 1 is the root, 8 the root an octave above."""
    octaves, step = divmod(degree - 1, len(scale))
    return 12 * (octave + 1 + octaves) + root + scale[step]
