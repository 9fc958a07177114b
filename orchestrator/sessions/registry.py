"""Sessions in the store. A lookup takes the organization and cannot return another one's session."""

import base64
import re
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, fields
from importlib.resources import files
from typing import Any, Final, cast

from redis.asyncio import Redis

from orchestrator.errors import InvalidRequest, SessionNotFound
from orchestrator.ids import is_id
from orchestrator.models import ALLOWED, Session, SessionStatus
from orchestrator.terminal.output_store import events_channel

_LIVE: Final = "cs:sessions:live"  # set of the ids whose workspace may still exist
_SCAN: Final = 100
_CREATED: Final = re.compile(r"[0-9]{1,15}")  # milliseconds, in a cursor
_INTEGERS: Final = {"created_at_ms", "updated_at_ms"}


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class SessionRegistry:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._transition = redis.register_script(files(__package__).joinpath("transition.lua").read_text())

    @staticmethod
    def _key(session_id: str) -> str:
        return f"cs:{{{session_id}}}:session"

    @staticmethod
    def _index(organization_id: str) -> str:
        return f"cs:org:{organization_id}:sessions"

    async def add(self, session: Session) -> None:
        """Live first: whatever is cut off after that is found again by the reconciler."""
        mapping: dict[Any, Any] = {name: value for name, value in asdict(session).items() if value is not None}
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.sadd(_LIVE, session.id)
            pipe.hset(self._key(session.id), mapping=mapping)
            pipe.zadd(self._index(session.organization_id), {session.id: session.created_at_ms})
            await pipe.execute()

    async def remove(self, session: Session) -> None:
        """Take back what `add` put there, all of it or some. Live last, as there."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zrem(self._index(session.organization_id), session.id)
            pipe.delete(self._key(session.id))
            pipe.srem(_LIVE, session.id)
            await pipe.execute()

    async def answers(self) -> None:
        """Return when the store answers; redis-py's errors otherwise."""
        await self._redis.ping()

    async def get(self, organization_id: str, session_id: str) -> Session:
        """
        Raises:
            SessionNotFound: there is none of this id in this organization.
        """
        session = await self.find(session_id) if is_id(session_id, "cs") else None
        if session is None or session.organization_id != organization_id:
            raise SessionNotFound(f"no code session {session_id[:64]}")
        return session

    async def find(self, session_id: str) -> Session | None:
        """For the control plane's own work, where no caller is involved."""
        return _session(cast("dict[bytes, bytes]", await self._redis.hgetall(self._key(session_id))))

    async def page(
        self, organization_id: str, *, status: SessionStatus | None, limit: int, cursor: str
    ) -> tuple[list[Session], str | None]:
        """Newest first, and the cursor of the next page (None: this was the last).

        Raises:
            InvalidRequest: not a cursor of ours.
        """
        found: list[Session] = []
        async for session in self._newest_first(organization_id, cursor):
            if status is not None and session.status is not status:
                continue
            if len(found) == limit:
                return found, _encode_cursor(found[-1])
            found.append(session)
        return found, None

    async def _newest_first(self, organization_id: str, cursor: str) -> AsyncIterator[Session]:
        newest, last_id = _decode_cursor(cursor) if cursor else (None, "")
        skip = 0
        while True:
            # Equal scores come in descending order of id.
            answer = await self._redis.zrevrangebyscore(
                self._index(organization_id), "+inf" if newest is None else newest, "-inf", start=skip, num=_SCAN
            )
            ids = cast("list[bytes]", answer)
            skip += len(ids)
            async with self._redis.pipeline(transaction=False) as pipe:
                for session_id in ids:
                    pipe.hgetall(self._key(session_id.decode()))
                for fields_ in await pipe.execute():
                    session = _session(fields_)
                    if session is None or session.organization_id != organization_id:
                        continue
                    if newest is not None and session.created_at_ms == newest and session.id >= last_id:
                        continue
                    yield session
            if len(ids) < _SCAN:
                return

    async def move(self, session_id: str, to: SessionStatus, *, reason: str = "") -> bool:
        """Whether it moved; False when its status does not allow it (it may have moved already) or it is not there."""
        moved = await self._run(session_id, "status", to, reason, [at for at in SessionStatus if to in ALLOWED[at]])
        if to.ended:
            await self._redis.srem(_LIVE, session_id)
        return moved

    async def begin_end(self, session_id: str, to: SessionStatus, *, reason: str = "") -> bool:
        """Decide how it ends, once; whether this call decided it."""
        return await self._run(session_id, "ending_as", to, reason, [at for at in SessionStatus if not at.ended])

    async def _run(self, session_id: str, field: str, value: str, reason: str, allowed: list[SessionStatus]) -> bool:
        arguments: list[str | int] = [field, value, now_ms(), reason, events_channel(session_id), *allowed]
        return bool(await self._transition(keys=[self._key(session_id)], args=arguments) == 1)

    async def live_ids(self) -> set[str]:
        members = cast("set[bytes]", await self._redis.smembers(_LIVE))
        return {member.decode() for member in members}

    async def forget_live(self, session_id: str) -> None:
        await self._redis.srem(_LIVE, session_id)


def _session(stored: dict[bytes, bytes]) -> Session | None:
    if not stored:
        return None
    values: dict[str, object] = {}
    for field in fields(Session):
        raw = stored.get(field.name.encode())
        if raw is not None:
            values[field.name] = int(raw) if field.name in _INTEGERS else raw.decode()
    values["status"] = SessionStatus(str(values["status"]))
    if "ending_as" in values:
        values["ending_as"] = SessionStatus(str(values["ending_as"]))
    return Session(**values)  # type: ignore[arg-type]


def _encode_cursor(session: Session) -> str:
    return base64.urlsafe_b64encode(f"{session.created_at_ms}:{session.id}".encode()).decode().rstrip("=")


def _decode_cursor(cursor: str) -> tuple[int, str]:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except ValueError:
        text = ""
    created, _, session_id = text.partition(":")
    if _CREATED.fullmatch(created) and is_id(session_id, "cs"):
        return int(created), session_id
    raise InvalidRequest("cursor: not a cursor that an earlier answer gave")
