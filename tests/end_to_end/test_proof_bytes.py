"""Bytes that are no text, characters that are cut everywhere, escape sequences without end: exact, and as one text."""

import asyncio

import pytest

from tests.end_to_end.flood import Reader, sha256, start_flood
from tests.end_to_end.proof import keeping_all


@pytest.fixture(scope="module")
def roomy_serve(tmp_path_factory):
    with keeping_all(tmp_path_factory.mktemp("bytes")) as serve:
        yield serve


# 104 MB together, each read twice.
@pytest.mark.parametrize(
    ("kind", "size_bytes"), [("garbage", 32_000_000), ("characters", 36_000_000), ("escapes", 36_000_000)]
)
async def test_any_bytes_come_exactly_in_base64_and_as_the_text_that_they_are_as_a_whole(roomy_serve, kind, size_bytes):
    async with roomy_serve.client() as client:
        session = await client.create(kind)
        flood = await start_flood(roomy_serve, session, size_bytes, kind=kind)
        async with asyncio.TaskGroup() as tasks:
            exact = tasks.create_task(Reader(session).until_end())
            text = tasks.create_task(Reader(session, encoding="utf-8").until_end())
        assert sha256(exact.result()) == flood.sha256
        whole = exact.result().decode(errors="replace")
        assert sha256(text.result()) == sha256(whole.encode())
        if kind == "garbage":
            assert set(exact.result()) == set(range(256))
        await session.delete()
