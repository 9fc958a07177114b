"""API keys: their records in the store, and who a secret belongs to.

In the store (times in ms since 1970; one hash tag, so that a cluster has them together):
  cs:{keys}:key:<key id> hash, the fields of `ApiKey` and `secret_hash`
  cs:{keys}              sorted set of all key ids by creation
  cs:{keys}:<org id>     the same for one organization
  cs:{keys}:first        id of the operator's first key
"""

import hmac
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from redis.asyncio import Redis

from orchestrator.access import secrets
from orchestrator.access.cache import ExpiringCache
from orchestrator.access.scopes import Scope
from orchestrator.errors import InvalidRequest, KeyNotFound, Unauthenticated
from orchestrator.ids import is_id, new_id
from orchestrator.settings import SettingsError

NAME_MAX_CHARACTERS: Final = 100
ADMIN_KEY_MIN_CHARACTERS: Final = 32
_FIRST_KEY_NAME: Final = "operator"
# Revoking takes effect on every replica within a second; the rest of it is for the look-up itself.
_CACHE_S: Final = 0.9
_CACHED_KEYS: Final = 10_000
_CACHED_REFUSALS: Final = 1_000
_LAST_USED_EVERY_MS: Final = 60_000
_ALL: Final = "cs:{keys}"
_FIRST: Final = "cs:{keys}:first"

# Two replicas that start at once must agree on one first key, and a changed admin key must end the old one, all in one
# step. KEYS: cs:{keys}:first, cs:{keys}; ARGV: "generated" or "given", now, then the new record's fields and values.
# Returns 1 when the new record became the first key.
_ENSURE_FIRST: Final = """
local record = {}
for i = 3, #ARGV, 2 do record[ARGV[i]] = ARGV[i + 1] end
local first = redis.call('GET', KEYS[1])
if first then
  if first == record.id then return 1 end -- this very call, repeated after a lost connection
  local old = 'cs:{keys}:key:' .. first
  if ARGV[1] == 'generated' or redis.call('HGET', old, 'secret_hash') == record.secret_hash then return 0 end
  record.user_id = redis.call('HGET', old, 'user_id')
  record.organization_id = redis.call('HGET', old, 'organization_id')
  redis.call('HSETNX', old, 'revoked_at', ARGV[2])
end
for field, value in pairs(record) do redis.call('HSET', 'cs:{keys}:key:' .. record.id, field, value) end
redis.call('ZADD', KEYS[2], ARGV[2], record.id)
redis.call('ZADD', KEYS[2] .. ':' .. record.organization_id, ARGV[2], record.id)
redis.call('SET', KEYS[1], record.id)
return 1
"""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key of one user of one organization. Holds no secret."""

    id: str
    name: str
    scopes: frozenset[Scope]
    user_id: str
    organization_id: str
    operator: bool
    """The operator's key: not limited in its rate, and may make keys for any organization."""
    rate_limit_per_minute: int | None
    """None: the default of the settings; 0: no limit."""
    created_at_ms: int
    expires_at_ms: int | None = None
    revoked_at_ms: int | None = None
    last_used_at_ms: int | None = None
    """Exact to a minute."""

    def refused(self, now_ms: int) -> str | None:
        """Why it opens nothing any more, None while it does."""
        if self.revoked_at_ms is not None:
            return "The API key has been revoked."
        if self.expires_at_ms is not None and self.expires_at_ms <= now_ms:
            return "The API key has expired."
        return None


@dataclass(frozen=True, slots=True)
class _Record:
    key: ApiKey
    secret_hash: str


class KeyStore:
    """All keys in one store. Any number of replicas work on the same one.

    Answers about secrets are remembered for less than a second, in bounded memory, so that a busy key costs no round
    trip and a flood of wrong ones can neither fill the memory nor push out the good ones.

    Every method raises redis-py's errors when the store is out of reach; `is_unavailable` in `store.connection` tells.
    """

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis
        self._ensure_first = redis.register_script(_ENSURE_FIRST)
        self._known: ExpiringCache[ApiKey] = ExpiringCache(_CACHED_KEYS, _CACHE_S)
        self._refused: ExpiringCache[str] = ExpiringCache(_CACHED_REFUSALS, _CACHE_S)
        self._first: ExpiringCache[tuple[_Record | None]] = ExpiringCache(1, _CACHE_S)

    async def create(
        self,
        *,
        name: str,
        scopes: Iterable[Scope],
        user_id: str | None = None,
        organization_id: str | None = None,
        operator: bool = False,
        rate_limit_per_minute: int | None = None,
        expires_at_ms: int | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key, in a user and an organization of its own when none is given. Its secret is only in this answer.

        Raises:
            InvalidRequest: a value cannot be; the detail names it.
        """
        key_id, secret = secrets.new_secret()
        key = ApiKey(
            id=key_id,
            name=name,
            scopes=frozenset(scopes),
            user_id=new_id("user") if user_id is None else user_id,
            organization_id=new_id("org") if organization_id is None else organization_id,
            operator=operator,
            rate_limit_per_minute=rate_limit_per_minute,
            created_at_ms=_now_ms(),
            expires_at_ms=expires_at_ms,
        )
        _check(key)
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hset(f"cs:{{keys}}:key:{key_id}", mapping=cast("Any", _fields(key, secrets.digest(secret))))
            for index in (_ALL, f"{_ALL}:{key.organization_id}"):
                pipeline.zadd(index, {key_id: key.created_at_ms})
            await pipeline.execute()
        return key, secret

    async def authenticate(self, secret: str) -> ApiKey:
        """The key that a secret belongs to.

        Raises:
            Unauthenticated: the detail says malformed, unknown, or to who has the secret: revoked, expired.
        """
        if not secret or len(secret) > secrets.MAX_CHARACTERS:
            raise Unauthenticated("The API key is malformed.")
        digest = secrets.digest(secret)
        if (reason := self._refused.get(digest)) is not None:
            raise Unauthenticated(reason)
        key = self._known.get(digest)
        if key is None:
            asked_s = time.monotonic()
            found = await self._look_up(secret, digest)
            if isinstance(found, str):
                self._refused.put(digest, found, asked_s)
                raise Unauthenticated(found)
            key = await self._note_use(found)
            self._known.put(digest, key, asked_s)
        if (reason := key.refused(_now_ms())) is not None:
            raise Unauthenticated(reason)
        return key

    async def list(self, organization_id: str | None) -> list[ApiKey]:
        """An organization's keys, newest first, revoked ones too. None: those of all, for the operator."""
        index = _ALL if organization_id is None else f"{_ALL}:{organization_id}"
        key_ids: list[bytes] = cast("Any", await self._redis.zrevrange(index, 0, -1))
        async with self._redis.pipeline(transaction=False) as pipeline:
            for key_id in key_ids:
                pipeline.hgetall(b"cs:{keys}:key:" + key_id)
            found = await pipeline.execute()
        return [_record(fields).key for fields in found if fields]

    async def get(self, organization_id: str | None, key_id: str) -> ApiKey:
        """One key of an organization. None: of any, for the operator.

        Raises:
            KeyNotFound: there is none, or it is another organization's.
        """
        record = await self._fetch(key_id)
        if record is None or organization_id not in {None, record.key.organization_id}:
            raise KeyNotFound(f"There is no API key {key_id}.")
        return record.key

    async def revoke(self, organization_id: str | None, key_id: str) -> ApiKey:
        """End a key; here at once, on other replicas within a second. Revoking it again changes nothing.

        Raises:
            KeyNotFound: as in `get`.
        """
        key = await self.get(organization_id, key_id)
        if key.revoked_at_ms is None:
            await self._redis.hsetnx(f"cs:{{keys}}:key:{key_id}", "revoked_at", _now_ms())
            self._forget()
        return await self.get(organization_id, key_id)

    async def ensure_first_key(self, admin_key: str | None) -> str | None:
        """See to it that the operator has a key with all scopes; return its secret when this call made one up.

        With `admin_key` (CODE_SESSIONS_ADMIN_KEY) that value is the first key: another value than last time replaces
        it, within the same user and organization, and the old one stops working. Without it, a first key stays.

        Raises:
            SettingsError: the value is too short, or cannot stand in an HTTP header.
        """
        if admin_key is not None:
            _check_admin_key(admin_key)
        key_id, made_up = secrets.new_secret()
        key = ApiKey(
            id=key_id,
            name=_FIRST_KEY_NAME,
            scopes=frozenset(Scope),
            user_id=new_id("user"),
            organization_id=new_id("org"),
            operator=True,
            rate_limit_per_minute=None,
            created_at_ms=_now_ms(),
        )
        fields = _fields(key, secrets.digest(admin_key or made_up))
        mode = "given" if admin_key else "generated"
        flat = [part for pair in fields.items() for part in pair]
        stored = await self._ensure_first(keys=[_FIRST, _ALL], args=[mode, key.created_at_ms, *flat])
        if stored:
            self._forget()
        return made_up if stored and not admin_key else None

    async def _look_up(self, secret: str, digest: str) -> ApiKey | str:
        """The key, revoked and expired ones too, or why there is none."""
        key_id = secrets.key_id_of(secret)
        if key_id is not None:
            record = await self._fetch(key_id)
            if record is not None and hmac.compare_digest(record.secret_hash, digest):
                return record.key
        elif secret.startswith(secrets.PREFIX) or len(secret) < ADMIN_KEY_MIN_CHARACTERS:
            return "The API key is malformed."
        # What is not of our making can only be the operator's own value, whose record is at hand.
        first = await self._first_record()
        if first is not None and hmac.compare_digest(first.secret_hash, digest):
            return first.key
        return "The API key is not known."

    async def _first_record(self) -> _Record | None:
        known = self._first.get("")
        if known is None:
            asked_s = time.monotonic()
            key_id = cast("bytes | None", await self._redis.get(_FIRST))
            known = (await self._fetch(key_id.decode()) if key_id else None,)
            self._first.put("", known, asked_s)
        return known[0]

    async def _fetch(self, key_id: str) -> _Record | None:
        if not is_id(key_id, "key"):
            return None
        fields = await cast("Any", self._redis.hgetall(f"cs:{{keys}}:key:{key_id}"))
        return _record(fields) if fields else None

    async def _note_use(self, key: ApiKey) -> ApiKey:
        now_ms = _now_ms()
        if key.refused(now_ms) is not None or now_ms - (key.last_used_at_ms or 0) < _LAST_USED_EVERY_MS:
            return key
        await cast("Any", self._redis.hset(f"cs:{{keys}}:key:{key.id}", "last_used_at", str(now_ms)))
        return replace(key, last_used_at_ms=now_ms)

    def _forget(self) -> None:
        for cache in (self._known, self._refused, self._first):
            cache.clear()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _check(key: ApiKey) -> None:
    if not key.name.strip() or len(key.name) > NAME_MAX_CHARACTERS or not key.name.isprintable():
        raise InvalidRequest(f"name: 1 to {NAME_MAX_CHARACTERS} printable characters")
    if not key.scopes:
        raise InvalidRequest("scopes: at least one")
    if not is_id(key.user_id, "user"):
        raise InvalidRequest("userId: not a user's id (user_…)")
    if not is_id(key.organization_id, "org"):
        raise InvalidRequest("organizationId: not an organization's id (org_…)")
    if key.rate_limit_per_minute is not None and key.rate_limit_per_minute < 0:
        raise InvalidRequest("rateLimitPerMinute: 0 or more")
    if key.expires_at_ms is not None and key.expires_at_ms <= key.created_at_ms:
        raise InvalidRequest("expiresAt: lies in the past")


def _check_admin_key(value: str) -> None:
    # The characters of a header value that no client, proxy or server trims or folds.
    if not re.fullmatch(rf"[!-~]{{{ADMIN_KEY_MIN_CHARACTERS},{secrets.MAX_CHARACTERS}}}", value):
        raise SettingsError(
            f"CODE_SESSIONS_ADMIN_KEY: {ADMIN_KEY_MIN_CHARACTERS} to {secrets.MAX_CHARACTERS} ASCII letters, digits "
            "and punctuation marks, without spaces"
        )
    if value.startswith(secrets.PREFIX) and secrets.key_id_of(value) is None:
        raise SettingsError(f"CODE_SESSIONS_ADMIN_KEY: starts with {secrets.PREFIX} but is not a complete key")


def _fields(key: ApiKey, secret_hash: str) -> dict[str, str | int]:
    """The hash in the store; what is not set has no field."""
    optional = {
        "rate_limit": key.rate_limit_per_minute,
        "expires_at": key.expires_at_ms,
        "revoked_at": key.revoked_at_ms,
        "last_used_at": key.last_used_at_ms,
    }
    return {
        "id": key.id,
        "name": key.name,
        "scopes": " ".join(sorted(key.scopes)),
        "user_id": key.user_id,
        "organization_id": key.organization_id,
        "operator": int(key.operator),
        "created_at": key.created_at_ms,
        "secret_hash": secret_hash,
        **{name: value for name, value in optional.items() if value is not None},
    }


def _record(fields: Mapping[bytes, bytes]) -> _Record:
    text = {name.decode(): value.decode() for name, value in fields.items()}

    def number(name: str) -> int | None:
        return int(text[name]) if name in text else None

    known = {scope.value for scope in Scope}
    key = ApiKey(
        id=text["id"],
        name=text["name"],
        scopes=frozenset(Scope(scope) for scope in text["scopes"].split() if scope in known),
        user_id=text["user_id"],
        organization_id=text["organization_id"],
        operator=text["operator"] == "1",
        rate_limit_per_minute=number("rate_limit"),
        created_at_ms=int(text["created_at"]),
        expires_at_ms=number("expires_at"),
        revoked_at_ms=number("revoked_at"),
        last_used_at_ms=number("last_used_at"),
    )
    return _Record(key, text["secret_hash"])
