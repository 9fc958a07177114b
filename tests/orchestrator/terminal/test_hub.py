import asyncio

from orchestrator.terminal.hub import Hub


class SilentLink:
    """Its other end is dead: the goodbye to it takes its time."""

    def __init__(self, session_id):
        self.session_id, self.closed, self.said_goodbye = session_id, asyncio.Event(), False

    def lost(self):
        self.closed.set()

    async def close(self, _reason):
        await asyncio.sleep(0.3)
        self.said_goodbye = True


async def test_a_new_link_works_at_once_though_the_older_one_is_dead():
    hub = Hub(None, None)
    older, newer = SilentLink("cs_a"), SilentLink("cs_a")
    await hub.attach(older)
    async with asyncio.timeout(0.2):
        await hub.attach(newer)
    assert hub.link("cs_a") is newer
    assert older.closed.is_set()
    assert not hub.detach(older)
    assert hub.link("cs_a") is newer
    await hub.close()
    assert older.said_goodbye


async def test_dead_links_delay_the_end_once_and_not_each():
    hub = Hub(None, None)
    links = [SilentLink(f"cs_{place}") for place in range(20)]
    for link in links:
        await hub.attach(link)
    async with asyncio.timeout(1):
        await hub.close()
    assert all(link.said_goodbye for link in links)
