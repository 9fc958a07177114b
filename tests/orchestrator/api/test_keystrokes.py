"""The order and the bounds of what one client types."""

import asyncio

import pytest

from orchestrator.api.keystrokes import OUTSTANDING_BYTES_MAX, Keystrokes, Typed
from orchestrator.errors import TerminalNotReading
from orchestrator.tasks import end_tasks


class Terminal:
    """Takes writes one at a time, each when the test lets it."""

    def __init__(self):
        self.written, self.answers, self.refusals = [], [], []
        self.may_write = asyncio.Semaphore(0)

    async def write(self, typed):
        await self.may_write.acquire()
        if typed.data == b"refuse":
            raise TerminalNotReading("no")
        self.written.append(typed)
        return len(typed.data)

    async def on_written(self, typed, written):
        self.answers.append((typed.input_id, written))

    async def on_refused(self, typed, error):
        self.refusals.append((typed.input_id, error.code))

    def keystrokes(self):
        return Keystrokes(self.write, on_written=self.on_written, on_refused=self.on_refused)


async def test_what_waits_goes_together_and_in_order_but_inputs_with_an_id_go_alone():
    terminal = Terminal()
    keys = terminal.keystrokes()
    for data, input_id in ((b"a", ""), (b"b", ""), (b"c", "1"), (b"refuse", "2"), (b"d", ""), (b"e", "")):
        keys.add(Typed(data, input_id))
    running = asyncio.create_task(keys.run())
    for _ in range(4):
        terminal.may_write.release()
    async with asyncio.timeout(5):
        while not keys.idle:
            await asyncio.sleep(0.001)
    await end_tasks(running)
    assert terminal.written == [Typed(b"ab"), Typed(b"c", "1"), Typed(b"de")]
    assert terminal.answers == [("", 2), ("1", 1), ("", 2)]
    assert terminal.refusals == [("2", "terminal-not-reading")]


async def test_nothing_more_is_taken_in_while_too_much_waits():
    terminal = Terminal()
    keys = terminal.keystrokes()
    keys.add(Typed(b"x" * OUTSTANDING_BYTES_MAX))
    room = asyncio.create_task(keys.room())
    running = asyncio.create_task(keys.run())
    await asyncio.sleep(0.05)
    assert not room.done()
    terminal.may_write.release()
    async with asyncio.timeout(5):
        await room
    await end_tasks(running)


@pytest.mark.parametrize("typed", [Typed(b"", "id"), Typed(b"x"), Typed(b"x", "id")])
async def test_a_great_many_tiny_inputs_are_too_much_as_well(typed):
    terminal = Terminal()
    keys = terminal.keystrokes()
    count = 5000
    for _ in range(count):
        keys.add(typed)
    room = asyncio.create_task(keys.room())
    await asyncio.sleep(0.05)
    assert not room.done()
    running = asyncio.create_task(keys.run())
    for _ in range(count):
        terminal.may_write.release()
    async with asyncio.timeout(5):
        await room
        while not keys.idle:
            await asyncio.sleep(0.001)
    await end_tasks(running)
