"""SIGTERM: everybody is answered, and nobody dials in again while the process ends."""

import asyncio
import signal
import time


async def test_serve_that_is_asked_to_stop_answers_who_waits_and_lets_no_sidecar_back_in(serve):
    async with serve.client() as client:
        sessions = [await client.create(f"stop-{number}") for number in range(4)]
        for session in sessions:
            await session.run("true")
            while (await session.poll(wait=1))["chunks"]:
                pass
        polls = [asyncio.create_task(session.poll(wait=60)) for session in sessions]
        await asyncio.sleep(0.5)
        asked_at_s = time.monotonic()
        serve.process.send_signal(signal.SIGTERM)
        for answer in await asyncio.gather(*polls):
            assert (answer["chunks"], answer["hasMore"]) == ([], False)
        await asyncio.to_thread(serve.stop)
        assert time.monotonic() - asked_at_s < 9, "a held poll used to keep it for ten seconds"
        assert serve.process.returncode == 0
    serve.start()
    async with serve.client() as client:
        for session in sessions:
            session.client = client
            await session.run("true")
            assert session.seqs == list(range(1, len(session.seqs) + 1))
