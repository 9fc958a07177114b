"""What a terminal must give for a command's output, and a check that it did."""

import hashlib
import random
from dataclasses import asdict, dataclass

_WORDS = 4000
_HEAD_CHARACTERS = 40


@dataclass(frozen=True)
class Expected:
    """`head` is how the output begins: what the shell's line editor writes before it is not counted."""

    head: str
    length: int
    sha256: str

    def as_parameters(self):
        return asdict(self)


def through_a_terminal(output: bytes) -> Expected:
    text = output.replace(b"\n", b"\r\n")  # termios(3): ONLCR, on in every new terminal
    return Expected(text[:_HEAD_CHARACTERS].decode(), len(text), hashlib.sha256(text).hexdigest())


def lines_of_words(size_bytes: int) -> bytes:
    """Numbered lines of about 80 columns: the same ones each time, no two alike."""
    seeded = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(seeded.choices(letters, k=seeded.randint(2, 11))) for _ in range(_WORDS)]
    tails = [" ".join(seeded.choices(words, k=10))[:72] for _ in range(5000)]
    lines, size = [], 0
    while size < size_bytes:
        line = f"{len(lines):7d} {tails[len(lines) * 7919 % len(tails)]}\n"
        lines.append(line)
        size += len(line)
    return "".join(lines).encode()[: size_bytes - 1] + b"\n"


class Collected:
    """Puts together what comes, and knows when all of it is there. Checks only then, so that no hashing is timed."""

    def __init__(self, *, head, length, sha256):
        self._head, self._length, self._sha256 = head, length, sha256
        self._texts, self._size, self._start = [], 0, -1

    def add(self, text):
        self._texts.append(text)
        self._size += len(text)
        if self._start < 0:
            self._start = "".join(self._texts).find(self._head)

    @property
    def complete(self):
        return self._start >= 0 and self._size - self._start >= self._length

    def check(self):
        found = "".join(self._texts)[self._start :][: self._length].encode()
        if hashlib.sha256(found).hexdigest() != self._sha256:
            raise AssertionError("what came is not what the program wrote")
