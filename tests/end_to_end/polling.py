"""A caller that knows nothing but to try again."""

import asyncio
import contextlib

import aiohttp

from tests.end_to_end.harness import Answer


async def retrying(client, method, path, body=None, headers=None) -> Answer:
    """A caller that knows nothing but to try again."""
    while True:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            answer = await client.call(method, path, body, headers=headers, timeout_s=10)
            if answer.status < 500:
                return answer
        await asyncio.sleep(0.05)


async def poll_through(client, session, done, timeout_s=120):
    text, after, seqs = "", 0, []
    async with asyncio.timeout(timeout_s):
        while not done(text):
            answer = await retrying(client, "GET", f"{session.path}/output?afterSeq={after}&wait=2")
            assert answer.status == 200, answer
            assert not answer.json.get("truncated")
            seqs += [chunk["seq"] for chunk in answer.json["chunks"]]
            text += "".join(chunk["text"] for chunk in answer.json["chunks"])
            after = answer.json["lastSeq"]
    assert seqs == list(range(1, len(seqs) + 1))
    return text
