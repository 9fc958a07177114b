"""All links that this replica holds, and everybody who waits for something from them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

import structlog

from orchestrator.terminal.link import LinkLost, SidecarLink
from orchestrator.terminal.output_store import OutputStore

_STORE_CHECK_S: Final = 1.0

log = structlog.get_logger(__name__)


class Hub:
    def __init__(self, store: OutputStore, store_identity: Callable[[], Awaitable[str]]) -> None:
        """`store_identity` gives something else whenever the store was restarted."""
        self._store, self._store_identity = store, store_identity
        self._links: dict[str, SidecarLink] = {}
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def link(self, session_id: str) -> SidecarLink | None:
        return self._links.get(session_id)

    @contextmanager
    def waiting(self, session_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever something about the session changes; clear it before you look."""
        event = asyncio.Event()
        waiters = self._waiters.setdefault(session_id, set())
        waiters.add(event)
        try:
            yield event
        finally:
            waiters.discard(event)
            if not waiters:
                self._waiters.pop(session_id, None)

    def changed(self, session_id: str) -> None:
        """New output, another status or another link: whoever waits looks again."""
        for event in self._waiters.get(session_id, ()):
            event.set()

    async def attach(self, link: SidecarLink) -> None:
        """Take in a link that said hello; an older one of the same session is closed."""
        older = self._links.get(link.session_id)
        self._links[link.session_id] = link
        if older is not None:
            older.lost()
            # Behind it: the goodbye to a connection that is dead takes seconds, and the new one is to work at once.
            closing = asyncio.create_task(older.close("another link of this session came up"))
            self._closing.add(closing)
            closing.add_done_callback(self._closed)
        self.changed(link.session_id)

    def _closed(self, closing: asyncio.Task[None]) -> None:
        self._closing.discard(closing)
        if not closing.cancelled() and (error := closing.exception()) is not None:
            log.warning("closing an older link failed", error=str(error))

    def detach(self, link: SidecarLink) -> bool:
        """The link is gone; whether its session has none now."""
        link.lost()
        if self._links.get(link.session_id) is not link:
            return False
        del self._links[link.session_id]
        self.changed(link.session_id)
        return True

    async def link_within(
        self, session_id: str, timeout_s: float, still_wanted: Callable[[], Awaitable[None]]
    ) -> SidecarLink | None:
        """The session's link as soon as there is one; None after `timeout_s`.

        `still_wanted` is called now and then while waiting and raises when waiting has become pointless.
        """
        deadline = time.monotonic() + timeout_s
        with self.waiting(session_id) as event:
            while True:
                event.clear()
                link = self._links.get(session_id)
                if link is not None and not link.closed.is_set():
                    return link
                await still_wanted()
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return None
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left_s, 0.5)):
                        await event.wait()

    async def watch_store(self) -> None:
        """Until cancelled: when the store was restarted it may have lost its last moments, so every link goes back to
        where the store stands and sends again what is missing there."""
        known = ""
        while True:
            await asyncio.sleep(_STORE_CHECK_S)
            try:
                identity = await self._store_identity()
                if known and identity != known:
                    log.warning("the store was restarted: comparing every link with it", links=len(self._links))
                    for link in list(self._links.values()):
                        await self._compare(link)
                known = identity
            except Exception as error:  # noqa: BLE001 - the store is away; the next look will tell
                log.warning("the store does not answer", error=str(error))

    async def _compare(self, link: SidecarLink) -> None:
        try:
            await link.resume_from(await self._store.last_seq(link.session_id))
        except LinkLost:
            return

    async def close(self) -> None:
        """Close all links at the same time: one that does not answer costs the others nothing."""
        closing = [link.close("the control plane stops") for link in self._links.values()]
        await asyncio.gather(*closing, *self._closing, return_exceptions=True)
