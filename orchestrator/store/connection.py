"""The client to Redis or Valkey, and which of its failures mean "try again later"."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast
from urllib.parse import unquote, urlsplit

from redis import exceptions as redis_errors
from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from orchestrator.errors import StoreUnavailable
from orchestrator.settings import SettingsError

CONNECT_TIMEOUT_S: Final = 2.0
SOCKET_TIMEOUT_S: Final = 5.0
_RETRIES: Final = 4
_RETRY_BASE_S: Final = 0.05
_RETRY_CAP_S: Final = 0.4
_HEALTH_CHECK_S: Final = 15
_MAX_CONNECTIONS: Final = 4096  # Valkey's own limit is 10000 for all clients

_PORT: Final = 6379

_BLOCKING_READ: Final = "blocking_read"
_UNAVAILABLE: Final = (
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.BusyLoadingError,
    redis_errors.ClusterError,
    redis_errors.ClusterDownError,
    redis_errors.RedisClusterException,
    redis_errors.OutOfMemoryError,
    redis_errors.ReadOnlyError,
    redis_errors.TryAgainError,
)
# Errors that redis-py knows only by their first word: cannot persist, script busy, primary gone, too few replicas.
_UNAVAILABLE_CODES: Final = ("MISCONF", "BUSY", "MASTERDOWN", "NOREPLICAS", "LOADING", "OOM", "CLUSTERDOWN", "TRYAGAIN")


T = TypeVar("T")


class StoreClient(Redis):
    """redis-py's client, in which a blocking read may take as long as it asked for.

    redis-py applies `socket_timeout` to every answer, so that XREAD with BLOCK above it would always time out. Here
    such a command is given its own time plus `SOCKET_TIMEOUT_S`; BLOCK 0 waits for ever.
    """

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        block_s = _block_s(args)
        if block_s is None:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(block_s + SOCKET_TIMEOUT_S if block_s else None):
                options[_BLOCKING_READ] = True
                return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except TimeoutError:
            raise redis_errors.TimeoutError("no answer to a blocking read") from None

    async def parse_response(self, connection: Any, command_name: str | bytes, **options: Any) -> Any:
        if not options.pop(_BLOCKING_READ, False):
            return await super().parse_response(connection, command_name, **options)
        socket_timeout_s, connection.socket_timeout = connection.socket_timeout, None
        try:
            return await super().parse_response(connection, command_name, **options)
        finally:
            connection.socket_timeout = socket_timeout_s


class _ConnectionRetry(Retry):
    """Repeats what a broken connection cut off, but not what timed out.

    redis-py reports a handshake without an answer (a server that is stopped or hangs accepts connections all the same)
    as a ConnectionError. Repeating that one would make `SOCKET_TIMEOUT_S` of waiting into five times as much.
    """

    def __init__(self) -> None:
        backoff = ExponentialBackoff(cap=_RETRY_CAP_S, base=_RETRY_BASE_S)
        super().__init__(backoff, _RETRIES, (redis_errors.ConnectionError,))

    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[T]],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        async def once() -> T:
            try:
                return await do()
            except redis_errors.ConnectionError as error:
                if not isinstance(error.__cause__, redis_errors.TimeoutError):
                    raise
                # Closes the connection: its handshake is half-done.
                await (fail(error, self.get_retries() + 1) if with_failure_count else fail(error))
                raise redis_errors.TimeoutError(str(error)) from error

        return await super().call_with_retry(once, fail, is_retryable, with_failure_count)


def _block_s(args: tuple[Any, ...]) -> float | None:
    """Seconds that a command may block; 0 for ever, None when it does not block."""
    if args[0] in {"XREAD", "XREADGROUP"}:
        # The option stands before STREAMS, behind which a stream could have that very name.
        options = args[: args.index(b"STREAMS")] if b"STREAMS" in args else args
        return int(options[options.index(b"BLOCK") + 1]) / 1000 if b"BLOCK" in options else None
    if args[0] in {"BLPOP", "BRPOP", "BLMOVE", "BZPOPMIN", "BZPOPMAX"}:
        return float(args[-1])
    return None


class StoreCluster(RedisCluster):
    """redis-py's client for a cluster; everything that is asked for together has one hash tag, and so one slot."""


def connect(target: str | Path) -> StoreClient:
    """A client for a URL (`redis://`, `rediss://`, `unix://`, also with `valkey`) or a Unix socket's path.

    `redis-cluster://[user:password@]host:port,host:port,…` and `rediss-cluster://…` are a cluster by some of its nodes;
    what comes back then is a `StoreCluster`, which has the same commands.

    Nothing is connected yet; connections are made, checked and made again as commands need them. A connection that
    breaks is retried for about a second, so **a command may run twice**: write so that this does no harm. An answer
    that does not come in time is not asked for again. Answers are bytes. Close it with `aclose()`.

    Raises:
        SettingsError: the URL cannot be understood. Its text is not repeated, it may hold a password.
    """
    common: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": SOCKET_TIMEOUT_S,
        "health_check_interval": _HEALTH_CHECK_S,
        "max_connections": _MAX_CONNECTIONS,
        "retry": _ConnectionRetry(),
    }
    if isinstance(target, Path):
        return StoreClient(unix_socket_path=str(target), **common)
    scheme, separator, rest = target.partition("://")
    url = scheme.replace("valkey", "redis") + separator + rest
    if url.startswith(("redis-cluster://", "rediss-cluster://")):
        return cast("StoreClient", _connect_cluster(url))
    try:
        return cast("StoreClient", StoreClient.from_url(url, **common))
    except ValueError:
        raise SettingsError("CODE_SESSIONS_REDIS_URL: not a redis://, rediss:// or unix:// URL") from None


def _connect_cluster(url: str) -> StoreCluster:
    scheme, _, rest = url.partition("://")
    login, _, hosts = rest.rstrip("/").rpartition("@")
    user, _, password = login.partition(":")
    nodes = []
    for host in hosts.split(","):
        try:
            parts = urlsplit(f"//{host}")
            nodes.append(ClusterNode(parts.hostname or "", parts.port or _PORT))
        except ValueError:
            nodes.clear()
            break
    if not nodes or not all(node.host for node in nodes):
        raise SettingsError("CODE_SESSIONS_REDIS_URL: not a redis-cluster://host:port,host:port URL") from None
    return StoreCluster(
        startup_nodes=nodes,
        ssl=scheme == "rediss-cluster",
        username=unquote(user) or None,
        password=unquote(password) or None,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=SOCKET_TIMEOUT_S,
        health_check_interval=_HEALTH_CHECK_S,
        max_connections=_MAX_CONNECTIONS,
    )


async def store_identity(redis: StoreClient) -> str:
    """Something else whenever the store, or a node of it, was restarted or another one took over."""
    if isinstance(redis, RedisCluster):
        nodes: dict[str, dict[str, Any]] = await redis.info("server", target_nodes=RedisCluster.PRIMARIES)
        return " ".join(sorted(str(facts["run_id"]) for facts in nodes.values()))
    return str((await redis.info("server"))["run_id"])


def is_unavailable(error: BaseException) -> bool:
    """Whether a failure of the client means that the store is out of reach or takes no writes now."""
    if isinstance(error, _UNAVAILABLE):
        return True
    return isinstance(error, redis_errors.ResponseError) and str(error).startswith(_UNAVAILABLE_CODES)


def store_unavailable(error: redis_errors.RedisError) -> StoreUnavailable:
    """The domain error for a failure that `is_unavailable`. The cause stays out of the text: it may hold addresses."""
    unavailable = StoreUnavailable("The store does not answer or takes no writes at the moment. Try again.")
    unavailable.__cause__ = error
    return unavailable
