"""How many requests a key may make in a minute, counted in the store for all replicas together."""

from dataclasses import dataclass
from typing import Final

from redis.asyncio import Redis

from orchestrator.access.keys import ApiKey
from orchestrator.errors import RateLimited

WINDOW_S: Final = 60

# A count for each second of the last minute, by the store's clock: no minute whatever holds more than the limit, memory
# does not grow with the limit, and one round trip counts and answers. What is refused is not counted.
# KEYS: the key's counts; ARGV: limit, window in s. Returns counted (0/1), remaining, seconds until some of it is free.
_HIT: Final = """
local limit, window = tonumber(ARGV[1]), tonumber(ARGV[2])
local now = tonumber(redis.call('TIME')[1])
local used, oldest = 0, now
local counts = redis.call('HGETALL', KEYS[1])
for i = 1, #counts, 2 do
  local second = tonumber(counts[i])
  if second <= now - window then
    redis.call('HDEL', KEYS[1], counts[i])
  else
    used = used + tonumber(counts[i + 1])
    if second < oldest then oldest = second end
  end
end
local reset = oldest + window - now
if used >= limit then return {0, 0, reset} end
redis.call('HINCRBY', KEYS[1], now, 1)
redis.call('EXPIRE', KEYS[1], window + 1)
return {1, limit - used - 1, reset}
"""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Where a key stands after one request. Rendered as `RateLimit-Limit`, `-Remaining` and `-Reset`."""

    allowed: bool
    limit: int
    remaining: int
    reset_s: int
    """Seconds until the oldest requests leave the minute and make room."""

    def exceeded(self) -> RateLimited:
        """The error for a request that is not allowed."""
        return RateLimited(
            f"The API key's limit of {self.limit} requests a minute is used up. Try again in {self.reset_s} s.",
            limit_name="requests-per-minute",
            limit=self.limit,
            retry_after_s=self.reset_s,
        )


class RateLimiter:
    """Counts requests. `default_per_minute` is for keys without a limit of their own; 0 is no limit."""

    def __init__(self, redis: "Redis", default_per_minute: int) -> None:
        self._hit = redis.register_script(_HIT)
        self._default_per_minute = default_per_minute

    async def hit(self, key: ApiKey) -> RateLimit | None:
        """Count one request of the key. None: the key has no limit, and this cost no round trip.

        Raises redis-py's errors when the store is out of reach.
        """
        own = key.rate_limit_per_minute
        limit = self._default_per_minute if own is None else own
        if key.operator or limit == 0:
            return None
        allowed, remaining, reset_s = await self._hit(keys=[f"cs:rate:{key.id}"], args=[limit, WINDOW_S])
        return RateLimit(allowed=bool(allowed), limit=limit, remaining=remaining, reset_s=reset_s)
