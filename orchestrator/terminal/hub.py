"""All links that this replica holds, the way to those of other replicas, and everybody who waits for something."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import structlog
from redis.exceptions import RedisError

from orchestrator.store.bus import Bus
from orchestrator.tasks import TaskOwner
from orchestrator.terminal.directory import LINKED, LinkDirectory
from orchestrator.terminal.link import LinkLost, SidecarLink
from orchestrator.terminal.output_store import OutputStore, events_channel
from orchestrator.terminal.relay import Relay, RemoteLink, SessionLink

_STORE_CHECK_S: Final = 1.0
_LOOK_AGAIN_S: Final = 5.0  # for what no message told; one that the store confirmed misses nothing
_LOOK_SOON_S: Final = 0.25  # while it has not

log = structlog.get_logger(__name__)


class Watch:
    """One waiter for changes of a session. `clear` it before you look, then `wait`."""

    def __init__(self, *, early: bool = False) -> None:
        self.early = early  # woken also by output that is not durable yet
        self._event = asyncio.Event()
        self.confirmed = True  # nothing is missed; False: look again soon

    def clear(self) -> None:
        self._event.clear()

    def wake(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float) -> bool:
        """Whether something changed within the time, or should be looked at again."""
        limit_s = _LOOK_AGAIN_S if self.confirmed else _LOOK_SOON_S
        try:
            async with asyncio.timeout(min(timeout_s, limit_s)):
                await self._event.wait()
        except TimeoutError:
            return timeout_s > limit_s
        return True


class Hub:
    def __init__(
        self,
        store: OutputStore,
        bus: Bus,
        directory: LinkDirectory,
        tasks: TaskOwner,
        store_identity: Callable[[], Awaitable[str]],
    ) -> None:
        """`store_identity` gives something else whenever the store was restarted."""
        self._store, self._bus, self._directory, self._tasks = store, bus, directory, tasks
        self._store_identity = store_identity
        self._links: dict[str, SidecarLink] = {}
        self._watches: dict[str, set[Watch]] = {}
        self._remote: dict[str, RemoteLink] = {}
        self._listening: dict[str, Callable[[bytes], None]] = {}
        self.stopping = self.closing = False
        self.relay = Relay(bus, tasks, directory.replica_id, self.link)
        self.relay.on_moved, self.relay.on_gap = self._on_moved, self._on_gap

    def link(self, session_id: str) -> SidecarLink | None:
        """The session's link, when this replica holds it and it works."""
        link = self._links.get(session_id)
        return None if link is None or link.closed.is_set() else link

    # Watching

    @asynccontextmanager
    async def watching(self, session_id: str, *, early: bool = False) -> AsyncIterator[Watch]:
        """A watch that wakes at new output, another status or another link, on whichever replica it happens."""
        watch = Watch(early=early)
        self._watches.setdefault(session_id, set()).add(watch)
        try:
            if self.link(session_id) is None:
                await self._listen(session_id)
            yield watch
        finally:
            watches = self._watches[session_id]
            watches.discard(watch)
            if not watches:
                del self._watches[session_id]
                self._stop_listening(session_id)

    async def _listen(self, session_id: str) -> None:
        listener = self._listening.get(session_id)
        if listener is None:

            def listener(message: bytes) -> None:
                self._on_message(session_id, message)

            self._listening[session_id] = listener
        confirmed = await self._bus.listen(events_channel(session_id), listener)
        for watch in self._watches.get(session_id, ()):
            watch.confirmed = confirmed
        if session_id not in self._watches:
            self._stop_listening(session_id)

    def _stop_listening(self, session_id: str) -> None:
        listener = self._listening.pop(session_id, None)
        if listener is not None:
            self._bus.forget(events_channel(session_id), listener)
        remote = self._remote.pop(session_id, None)
        if remote is not None:
            remote.moved.set()

    def _on_message(self, session_id: str, message: bytes) -> None:
        if session_id in self._remote and message in {b"", LINKED.encode()}:
            self._tasks.start(self._check_remote(session_id), name=f"find link {session_id}")
        if not message:
            for watch in self._watches.get(session_id, ()):
                watch.confirmed = True
        self.changed(session_id)

    def changed(self, session_id: str) -> None:
        """New output, another status or another link: whoever waits here looks again."""
        for watch in self._watches.get(session_id, ()):
            watch.wake()

    def stop_waiting(self) -> None:
        """We stop: whoever waits here looks again, and sees by `stopping` that waiting is over."""
        self.stopping = True
        for session_id in list(self._watches):
            self.changed(session_id)

    def received(self, session_id: str) -> None:
        """Output has come over a link of ours and is being appended."""
        for watch in self._watches.get(session_id, ()):
            if watch.early:
                watch.wake()

    # Links

    async def attach(self, link: SidecarLink) -> None:
        """Take in a link that said hello; an older one of the same session is closed, wherever it is.

        Raises:
            LinkLost: we stop.
        """
        if self.closing:
            raise LinkLost
        older = self._links.get(link.session_id)
        self._links[link.session_id] = link
        if older is not None:
            self._close_behind(older)
        former = await self._directory.claim(link.session_id, link.number)
        if former is not None and former.replica_id != self._directory.replica_id:
            await self.relay.tell_moved(former, link.session_id)
        remote = self._remote.pop(link.session_id, None)
        if remote is not None:
            remote.moved.set()
        self.changed(link.session_id)

    def _close_behind(self, older: SidecarLink) -> None:
        """The goodbye to a connection that is dead takes seconds, and the new one is to work at once."""
        older.lost(superseded=True)
        self._tasks.start(older.close("another link of this session came up"), name=f"close link {older.session_id}")

    def _on_moved(self, session_id: str, link_number: str) -> None:
        link = self._links.get(session_id)
        if link is not None and link.number == link_number:
            self._close_behind(link)

    def _on_gap(self) -> None:
        for link in self._links.values():
            self._tasks.start(self._check_own(link), name=f"check link {link.session_id}")

    async def _check_own(self, link: SidecarLink) -> None:
        """Messages may have been missed: that this link has moved to another replica, too."""
        with suppress(RedisError):
            holder = await self._directory.holder(link.session_id)
            if holder is not None and holder.replica_id != self._directory.replica_id:
                self._on_moved(link.session_id, link.number)

    async def detach(self, link: SidecarLink) -> bool:
        """The link is gone; whether its session has none now, as far as this replica knows."""
        link.lost()
        if self._links.get(link.session_id) is not link:
            return False
        del self._links[link.session_id]
        if link.session_id in self._watches:
            self._tasks.start(self._listen(link.session_id), name=f"listen {link.session_id}")
        self.changed(link.session_id)
        with suppress(RedisError):  # the next link's claim replaces it all the same
            await self._directory.release(link.session_id, link.number)
        return True

    async def find(self, session_id: str) -> SessionLink | None:
        """The session's link, here or on another replica. Call it while watching."""
        link = self.link(session_id)
        if link is not None:
            return link
        remote = self._remote.get(session_id)
        if remote is not None and not remote.moved.is_set():
            return remote
        holder = await self._directory.holder(session_id)
        if holder is None or holder.replica_id == self._directory.replica_id:
            return self.link(session_id)
        if session_id not in self._watches:
            return None
        remote = self._remote[session_id] = RemoteLink(session_id, holder, self.relay, asyncio.Event())
        return remote

    async def holds(self, session_id: str) -> bool:
        """Whether any replica still has a link of the session, or appends what one had brought."""
        return session_id in self._links or await self._directory.holder(session_id) is not None

    async def forget(self, session_id: str) -> None:
        """The session has ended: an entry that a replica left when it died is of no use any more."""
        await self._directory.forget(session_id)

    async def _check_remote(self, session_id: str) -> None:
        remote = self._remote.get(session_id)
        if remote is None:
            return
        with suppress(RedisError):
            if await self._directory.holder(session_id) == remote.holder:
                return
            remote.moved.set()
            if self._remote.get(session_id) is remote:
                del self._remote[session_id]
            self.changed(session_id)

    async def link_within(
        self, session_id: str, timeout_s: float, still_wanted: Callable[[], Awaitable[None]]
    ) -> SessionLink | None:
        """The session's link as soon as there is one; None after `timeout_s`. Call it while watching.

        `still_wanted` is called now and then while waiting and raises when waiting has become pointless.
        """
        deadline = time.monotonic() + timeout_s
        async with self.watching(session_id) as watch:
            while True:
                watch.clear()
                link = await self.find(session_id)
                if link is not None:
                    return link
                await still_wanted()
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return None
                await watch.wait(min(left_s, 0.5))

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
        # The directory's entry may be among what was lost.
        await self._directory.restore(link.session_id, link.number)
        _, last_seq = await self._store.bounds(link.session_id)
        # Not waited for: a sidecar that takes nothing must not keep the others' from being healed.
        self._tasks.start(self._resume(link, last_seq), name=f"resume {link.session_id}")

    async def _resume(self, link: SidecarLink, last_seq: int) -> None:
        with suppress(LinkLost):
            await link.resume_from(last_seq)

    async def close(self) -> None:
        """Close all links at the same time: one that does not answer costs the others nothing. No new ones come in."""
        self.closing = True
        closing = [link.close("the control plane stops") for link in self._links.values()]
        await asyncio.gather(*closing, return_exceptions=True)
