"""A program that writes bytes which it can account for, and readers that check every one of them."""

import asyncio
import base64
import hashlib
import shlex
import sys
import time

from tests.end_to_end.polling import retrying

BEGIN, END = b"\x1e<begin>\x1e", b"\x1e<end>\x1e"

# Runs in the workspace. Its terminal is raw while it writes, so what it writes is what comes. It tells in files how far
# it is, and at the end what the SHA-256 of it all was.
PROGRAM = r"""
import hashlib, os, random, sys, termios, time
name, kind, size, seed, rate = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
chance = random.Random(seed)
noise = chance.randbytes(1 << 16).hex().encode()
alphabet = ["a", "Z", "\n", "\u00e9", "\u00df", "\u2502", "\u4e16", "\ufffd", "\U0001f600", "\U0001f469\u200d"]
storms = [
    b"\x1b[", b"\x1b", b"\x1b[?1049h\x1b[2J\x1b[H", b"\x1b[38;2;1;2;3m", b"\x1b]0;a title that never ends",
    b"\x1bP" + b"q" * 40, b"\x1b[" + b"9;" * 60, b"\x9b\x9b", b"\x07\x08\x7f\x00", b"\x1b[6n\x0e\x0f", b"\r\n\x85\xa0",
]

def lines():
    number = 0
    while True:
        block = []
        for _ in range(500):
            start = number * 37 % 130000
            block.append(b"%09d %s\n" % (number, noise[start:start + 60]))
            number += 1
        yield b"".join(block)

def garbage():
    yield bytes(range(256)) * 16
    while True:
        yield chance.randbytes(1 << 16)

def characters():
    while True:
        yield "".join(chance.choices(alphabet, k=1 << 14)).encode()

def escapes():
    while True:
        yield b"".join(chance.choices(storms, k=1 << 12))

def cut(blocks):
    # Cut at every place of a character: single bytes first, then pieces of any length.
    for block in blocks:
        for position in range(64):
            yield block[position:position + 1]
        position = 64
        while position < len(block):
            length = chance.randint(1, 6000)
            yield block[position:position + length]
            position += length

def put(data):
    while data:
        data = data[os.write(1, data):]

kinds = {"lines": lines, "garbage": garbage, "characters": lambda: cut(characters()), "escapes": lambda: cut(escapes())}
before = termios.tcgetattr(1)
raw = termios.tcgetattr(1)
raw[1] &= ~termios.OPOST
termios.tcsetattr(1, termios.TCSADRAIN, raw)
digest, done = hashlib.sha256(), 0
progress = os.open(name + ".progress", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
put(b"\x1e<begin>\x1e")
for piece in kinds[kind]():
    piece = piece[:size - done]
    put(piece)
    digest.update(piece)
    done += len(piece)
    os.pwrite(progress, b"%015d" % done, 0)
    if done == size:
        break
    if rate:
        time.sleep(len(piece) / rate)
with open(name + ".new", "w") as file:
    file.write(digest.hexdigest())
os.rename(name + ".new", name + ".sha256")
put(b"\x1e<end>\x1e")
termios.tcsetattr(1, termios.TCSADRAIN, before)
"""


class Flood:
    """The program in a session's terminal."""

    def __init__(self, folder, name, size_bytes):
        self._folder, self._name, self.size_bytes = folder, name, size_bytes

    @property
    def progress_bytes(self):
        """What the terminal took of it so far."""
        path = self._folder / f"{self._name}.progress"
        return int(path.read_text() or 0) if path.exists() else 0

    @property
    def running(self):
        return not self.digest_path.exists()

    @property
    def digest_path(self):
        return self._folder / f"{self._name}.sha256"

    @property
    def sha256(self):
        return self.digest_path.read_text()

    async def past(self, size_bytes, timeout_s=120):
        """Return when so much of it is written: what is done then happens in the middle of the flood."""
        deadline = time.monotonic() + timeout_s
        while self.progress_bytes < size_bytes:
            assert time.monotonic() < deadline, f"the flood stands at {self.progress_bytes} bytes"
            await asyncio.sleep(0.005)


async def quiet(session):
    """A shell that prints nothing of its own."""
    await session.run("stty -echo; PS1=; PS2=; bind 'set enable-bracketed-paste off'")


async def put_program(session, name, text):
    await session.run(f"cat > {name} <<'END-OF-PROGRAM'\n{text}\nEND-OF-PROGRAM")


async def start_flood(serve, session, size_bytes, *, kind="lines", name="flood", rate_bytes_s=0):
    """Have the program write, at most so fast (0: as fast as it can); it is under way when this returns."""
    await quiet(session)
    await put_program(session, f"{name}.py", PROGRAM)
    shown = await session.show()
    home = serve.data_dir / "workspaces" / shown["workspaceId"] / "home"
    (program,) = home.glob(f"*/{name}.py")
    arguments = [sys.executable, f"{name}.py", name, kind, size_bytes, name, rate_bytes_s]
    await session.send(shlex.join(map(str, arguments)) + "\n")
    return Flood(program.parent, name, size_bytes)


class Reader:
    """The documents' polling loop, which only retries. Checks that seqs are 1, 2, 3, ... and never change."""

    def __init__(self, session, *, encoding="base64", may_go_back=False):
        """`may_go_back`: the store may lose its last moments, and what was read may for a while not be there."""
        self._session, self._encoding, self._may_go_back = session, encoding, may_go_back
        self._after = 0
        self._chunks = []  # a digest for each seq
        self._pieces = []
        self._tail = b""
        self.went_back = 0

    @property
    def read_bytes(self):
        return sum(map(len, self._pieces))

    async def until_end(self, timeout_s=150):
        """What stands between BEGIN and END; exact bytes, or their text as UTF-8."""
        async with asyncio.timeout(timeout_s):
            while END not in self._tail:
                await self._poll()
        text = b"".join(self._pieces)
        return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]

    async def _poll(self):
        client, path = self._session.client, self._session.path
        query = f"afterSeq={self._after}&wait=2&encoding={self._encoding}"
        answer = await retrying(client, "GET", f"{path}/output?{query}")
        assert answer.status == 200, answer
        assert not answer.json.get("truncated"), answer.json["firstSeq"]
        new = []
        for chunk in answer.json["chunks"]:
            data = base64.b64decode(chunk["data"]) if self._encoding == "base64" else chunk["text"].encode()
            if self._take(chunk["seq"], hashlib.sha256(data + chunk["createdAt"].encode()).digest()):
                new.append(data)
        self._pieces += new
        self._tail = (self._tail + b"".join(new))[-2 * 1024 * 1024 :] if new else self._tail
        if answer.json["lastSeq"] < self._after:
            assert self._may_go_back, f"the newest is {answer.json['lastSeq']}, {self._after} was read before"
            self.went_back += 1
        self._after = answer.json["lastSeq"]

    def _take(self, seq, digest):
        if seq <= len(self._chunks):
            assert self._may_go_back, f"chunk {seq} came twice"
            assert self._chunks[seq - 1] == digest, f"chunk {seq} changed"
            return False
        assert seq == len(self._chunks) + 1, f"chunk {seq} came after {len(self._chunks)}"
        self._chunks.append(digest)
        return True


def sha256(data):
    return hashlib.sha256(data).hexdigest()
