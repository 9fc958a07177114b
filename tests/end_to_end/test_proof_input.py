"""A minute of typing while serve is killed again and again: a retried input is typed once, and in its order."""

import asyncio
import hashlib
import random
import time

from tests.end_to_end.flood import put_program, quiet
from tests.end_to_end.polling import retrying
from tests.end_to_end.proof import keeping_all

TYPING_S = 60
TYPISTS = 3
SENT_AT_MOST = 4000  # a sidecar remembers 4096 keys; fewer, so that each may be tried again at the end

# Counts what it reads, and says so; a line that came twice, or not at all, or too early, changes every count after it.
COUNTER = """
import hashlib, sys
digest, number = hashlib.sha256(), 0
for line in sys.stdin:
    if line == "end\\n":
        break
    digest.update(line.encode())
    number += 1
    print(number, line, end="", flush=True)
print("counted", number, digest.hexdigest(), flush=True)
"""


async def typed(client, session, line, key):
    headers = {"Idempotency-Key": key}
    answer = await retrying(client, "POST", f"{session.path}/input", {"text": line}, headers=headers)
    assert answer.status == 200, answer
    assert answer.json == {"sent": True, "bytes": len(line.encode())}


async def typist(client, session, until, chance):
    """Types until then, each line until it is taken; the lines."""
    lines = []
    while time.monotonic() < until and len(lines) < SENT_AT_MOST:
        # Some are longer than what a terminal takes at once, so that a kill finds them half-written.
        length = chance.choice((1, 10, 100, 3000))
        lines.append(f"{len(lines)} {'x' * length} é\n")
        await typed(client, session, lines[-1], f"line-{len(lines)}")
    return lines


async def test_inputs_that_are_retried_until_they_are_taken_are_typed_once_though_serve_is_killed_under_them(tmp_path):
    kills = 0
    with keeping_all(tmp_path) as serve:
        async with serve.client() as client:
            sessions = [await client.create(f"typist-{number}") for number in range(TYPISTS)]
            for session in sessions:
                await quiet(session)
                await put_program(session, "counter.py", COUNTER)
                await session.send("python3 counter.py; echo left-it\n")
            until = time.monotonic() + TYPING_S
            typing = [
                asyncio.create_task(typist(client, session, until, random.Random(number)))
                for number, session in enumerate(sessions)
            ]
            chance = random.Random(0)
            while time.monotonic() < until - 3:
                await asyncio.sleep(chance.uniform(0.1, 1.5))
                await asyncio.to_thread(serve.restart)
                kills += 1
            written = await asyncio.gather(*typing)
            for session, lines in zip(sessions, written, strict=True):
                for number in range(0, len(lines), 7):  # once more, long afterwards
                    await typed(client, session, lines[number], f"line-{number + 1}")
                await typed(client, session, "end\n", "the end")
                text = await session.until(r"left-it\r\n")
                digest = hashlib.sha256("".join(lines).encode()).hexdigest()
                assert f"counted {len(lines)} {digest}\r\n" in text
    assert kills >= 8
    assert all(len(lines) > 50 for lines in written)
