"""Tickets: what a browser shows instead of a key where it cannot set headers, since a key never stands in a URL.

A ticket is good once, for half a minute, for one session. In the store: `cs:ticket:<SHA-256 of it>`, which expires.
"""

import json
import secrets
import time
from dataclasses import dataclass
from typing import Final

from redis.asyncio import Redis

from orchestrator.access.keys import ApiKey
from orchestrator.access.scopes import Scope
from orchestrator.access.secrets import digest
from orchestrator.errors import Unauthenticated

LIFETIME_S: Final = 30
_RANDOM_BYTES: Final = 24
_PREFIX: Final = "cst_"


@dataclass(frozen=True, slots=True)
class Ticket:
    text: str
    expires_at_ms: int


class TicketStore:
    def __init__(self, redis: "Redis") -> None:
        self._redis = redis

    async def issue(self, key: ApiKey, session_id: str) -> Ticket:
        """A ticket for one session, with what the key may do now."""
        text = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
        expires_at_ms = int(time.time() * 1000) + LIFETIME_S * 1000
        holder = {
            "session_id": session_id,
            "key_id": key.id,
            "name": key.name,
            "user_id": key.user_id,
            "organization_id": key.organization_id,
            "scopes": sorted(key.scopes),
        }
        await self._redis.set(f"cs:ticket:{digest(text)}", json.dumps(holder), ex=LIFETIME_S)
        return Ticket(text, expires_at_ms)

    async def redeem(self, text: str, session_id: str) -> ApiKey:
        """The key that the ticket was issued to, as it was then. The ticket is used up, also when this refuses it.

        Raises:
            Unauthenticated: it is unknown, used, expired, or of another session.
        """
        # One command, so that only one of two replicas can get it. A command that is repeated after a lost connection
        # finds nothing and refuses: the caller asks for another ticket.
        stored = await self._redis.getdel(f"cs:ticket:{digest(text)}")
        holder = json.loads(stored) if stored is not None else {}
        if holder.get("session_id") != session_id:
            raise Unauthenticated(
                f"The ticket does not open this. It is good once, for {LIFETIME_S} s, for the session it was made for."
            )
        return ApiKey(
            id=holder["key_id"],
            name=holder["name"],
            scopes=frozenset(Scope(scope) for scope in holder["scopes"]),
            user_id=holder["user_id"],
            organization_id=holder["organization_id"],
            operator=False,
            rate_limit_per_minute=None,
            created_at_ms=0,
        )
