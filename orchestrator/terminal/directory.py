"""Which replica holds a session's link, so that every call works on every replica."""

from dataclasses import dataclass
from typing import Final

from orchestrator.store.connection import StoreClient
from orchestrator.terminal.output_store import events_channel

LINKED: Final = "link"  # published when a session's link came, moved or went

# Another replica may have the session by now: then its entry stays. KEYS: the entry; ARGV: what it must be, channel.
_RELEASE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('PUBLISH', ARGV[2], 'link')
return 1
"""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a link: a replica, and the number of the connection there."""

    replica_id: str
    link_number: str


class LinkDirectory:
    """Entries of replicas that died stay until the sidecar has dialled another one, or its session has ended."""

    def __init__(self, redis: StoreClient, replica_id: str) -> None:
        self.replica_id = replica_id
        self._redis = redis
        self._release = redis.register_script(_RELEASE)

    @staticmethod
    def _key(session_id: str) -> str:
        return f"cs:{{{session_id}}}:link"

    async def claim(self, session_id: str, link_number: str) -> Holder | None:
        """Enter a link of this replica; who held it until now."""
        old = await self._redis.set(self._key(session_id), f"{self.replica_id}:{link_number}", get=True)
        await self._redis.publish(events_channel(session_id), LINKED)
        return _holder(old)

    async def restore(self, session_id: str, link_number: str) -> None:
        """Enter a link of this replica where nobody is entered: the store may have lost the entry."""
        await self._redis.set(self._key(session_id), f"{self.replica_id}:{link_number}", nx=True)

    async def holder(self, session_id: str) -> Holder | None:
        return _holder(await self._redis.get(self._key(session_id)))

    async def release(self, session_id: str, link_number: str) -> None:
        """Take the entry back, unless it is another link's by now."""
        entry = f"{self.replica_id}:{link_number}"
        await self._release(keys=[self._key(session_id)], args=[entry, events_channel(session_id)])

    async def forget(self, session_id: str) -> None:
        """The session has ended: nobody holds its link any more."""
        await self._redis.delete(self._key(session_id))


def _holder(entry: object) -> Holder | None:
    if not isinstance(entry, bytes):
        return None
    replica_id, _, link_number = entry.decode().partition(":")
    return Holder(replica_id, link_number)
