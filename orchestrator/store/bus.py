"""Messages between replicas through the store (Redis pub/sub): one subscribed connection for each process.

Delivery is at most once: what is published while a subscriber reconnects is lost to it. So every message is a hint to
look, or a request that is repeated until it is answered; and whenever a channel is subscribed to, at first or again,
its listeners get an empty message: something may have been missed until now.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeAlias

import structlog
from redis.exceptions import RedisError

from orchestrator.store.connection import StoreClient

Listener: TypeAlias = Callable[[bytes], None]

CONFIRM_S: Final = 2.0
LINGER_S: Final = 30.0  # a channel nobody listens to stays subscribed: a poller comes back in a moment
SILENCE_S: Final = 10.0  # then the server is asked whether it is there
ANSWER_S: Final = 5.0
_BACKOFF_FIRST_S, _BACKOFF_MAX_S = 0.05, 2.0
_ALWAYS: Final = "cs:bus"

log = structlog.get_logger(__name__)


class Bus:
    """Run `run` as a task; everything else may be called before it is connected."""

    def __init__(self, redis: StoreClient) -> None:
        self._redis = redis
        self._listeners: dict[str, set[Listener]] = {}
        self._idle_since_s: dict[str, float] = {}
        self._confirmed: set[str] = set()
        self._confirmations: dict[str, asyncio.Event] = {}
        self._pubsub: Any = None

    async def publish(self, channel: str, message: bytes | str) -> int:
        """How many connections got it; on a cluster only those to the node that was asked.

        Raises redis-py's errors when the store is out of reach.
        """
        return int(await self._redis.publish(channel, message))

    async def listen(self, channel: str, listener: Listener) -> bool:
        """Call `listener` with every message; whether the store has confirmed it: from now on nothing is missed.

        It is not an error when it has not (the store is away): the channel is subscribed to as soon as it is back.
        """
        self._listeners.setdefault(channel, set()).add(listener)
        self._idle_since_s.pop(channel, None)
        if channel in self._confirmed:
            return True
        event = self._confirmations.get(channel)
        if event is None:
            event = self._confirmations[channel] = asyncio.Event()
            if self._pubsub is not None:
                try:
                    await self._pubsub.subscribe(channel)
                except (RedisError, OSError):
                    return False  # `run` notices and subscribes to everything again
        with suppress(TimeoutError):
            async with asyncio.timeout(CONFIRM_S):
                await event.wait()
        return channel in self._confirmed

    def forget(self, channel: str, listener: Listener) -> None:
        """Stop calling `listener`; unknown ones are fine."""
        listeners = self._listeners.get(channel)
        if listeners is None:
            return
        listeners.discard(listener)
        if not listeners:
            self._idle_since_s.setdefault(channel, time.monotonic())

    async def run(self) -> None:
        """Until cancelled: keep the subscriptions up."""
        backoff_s = _BACKOFF_FIRST_S
        while True:
            pubsub = self._redis.pubsub()
            try:
                await self._serve(pubsub)
            except (RedisError, OSError, TimeoutError) as error:
                log.warning("the store's subscriptions broke", error=str(error))
                if self._pubsub is not None:
                    backoff_s = _BACKOFF_FIRST_S
            finally:
                self._pubsub = None
                self._confirmed.clear()
                with suppress(RedisError, OSError):
                    await pubsub.aclose()  # type: ignore[no-untyped-call]
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _BACKOFF_MAX_S)

    async def _serve(self, pubsub: Any) -> None:
        # A channel that is always there, so that there is a connection to wait on.
        await pubsub.subscribe(_ALWAYS)
        self._pubsub = pubsub  # from here on `listen` subscribes
        if self._listeners:
            await pubsub.subscribe(*self._listeners)
        heard_s = asked_s = time.monotonic()
        while True:
            message = await pubsub.get_message(timeout=ANSWER_S)
            now_s = time.monotonic()
            if message is not None:
                heard_s = now_s
                self._dispatch(message)
            elif now_s - heard_s > SILENCE_S + ANSWER_S:
                raise TimeoutError("the store is silent")
            elif now_s - heard_s > SILENCE_S - ANSWER_S and now_s - asked_s > ANSWER_S:
                asked_s = now_s
                await pubsub.ping()
            await self._drop_idle(pubsub, now_s)

    def _dispatch(self, message: dict[str, Any]) -> None:
        channel = bytes(message["channel"] or b"").decode()
        if message["type"] == "message":
            self._tell(channel, message["data"])
        elif message["type"] == "subscribe":
            self._confirmed.add(channel)
            event = self._confirmations.pop(channel, None)
            if event is not None:
                event.set()
            self._tell(channel, b"")

    def _tell(self, channel: str, message: bytes) -> None:
        for listener in list(self._listeners.get(channel, ())):
            try:
                listener(message)
            except Exception:
                log.exception("a message was not understood", channel=channel)

    async def _drop_idle(self, pubsub: Any, now_s: float) -> None:
        idle = [channel for channel, since_s in self._idle_since_s.items() if now_s - since_s > LINGER_S]
        for channel in idle:
            del self._idle_since_s[channel]
            self._listeners.pop(channel, None)
            self._confirmed.discard(channel)
        if idle:
            await pubsub.unsubscribe(*idle)
