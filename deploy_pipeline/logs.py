"""The logs of deployments and applications: numbered chunks of text in a Redis stream, bounded in bytes.

One log for each deployment, written by the worker that holds it and by no other, and one for each application, copied
from what its releases write. Writers say from where to where in their source a piece goes, so that nothing is
written twice, whoever repeats what.
"""

import asyncio
import contextlib
import importlib.resources
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog
from redis.exceptions import RedisError

from deploy_pipeline.records import app_key, text_of
from deploy_pipeline.tasks import end_task

if TYPE_CHECKING:
    from redis.asyncio import Redis

BUILD_LOG_BYTES: Final = 2 * 1024 * 1024  # of each of the last deployments; `queue.lua` knows how many
APP_LOG_BYTES: Final = 8 * 1024 * 1024
CHUNK_BYTES: Final = 16 * 1024
_PAGE_BYTES: Final = 1024 * 1024
_BATCH_CHUNKS: Final = 16
_FLUSH_S: Final = 0.2
_BUFFER_BYTES: Final = 1024 * 1024  # while the store is out of reach; then the oldest are dropped, and that is said
_LOOK_S: Final = 1.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Log:
    """Which log is meant."""

    app_id: str
    deployment_id: str = ""  # empty: the application's own

    @property
    def keys(self) -> list[str]:
        base = f"{app_key(self.app_id)}:{self.deployment_id}" if self.deployment_id else app_key(self.app_id)
        return [app_key(self.app_id), f"{base}:log", f"{base}:log-tail"]

    @property
    def kept_bytes(self) -> int:
        return BUILD_LOG_BYTES if self.deployment_id else APP_LOG_BYTES


@dataclass(frozen=True, slots=True)
class Chunk:
    seq: int
    time_ms: int
    source: str  # who wrote it: in an application's log the release's deployment id
    text: str


@dataclass(frozen=True, slots=True)
class Page:
    """Chunks after a seq. `first_seq` and `last_seq` are the oldest kept and the newest of the whole log."""

    chunks: list[Chunk]
    first_seq: int
    last_seq: int


class LogStore:
    """Any call may raise redis-py's `RedisError`."""

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis
        source = importlib.resources.files("deploy_pipeline").joinpath("log.lua").read_text("utf-8")
        self._append = redis.register_script(source)

    async def append(
        self, log: Log, chunks: list[bytes], *, source: str, at: str, then: str, fence: int | None = None
    ) -> str | None:
        """Append when the source stands at `at`; then it stands at `then`. Its position afterwards, so `then` means
        that it is done, now or by an earlier try. None when the fence has moved on, and nothing was written."""
        arguments: list[str | bytes] = [
            "" if fence is None else str(fence),
            source,
            at,
            then,
            str(log.kept_bytes),
            *chunks,
        ]
        position = text_of(await self._append(keys=log.keys, args=arguments))
        return None if position == "-1" else position

    async def position(self, log: Log, source: str) -> str:
        """Up to where the source was copied; empty for not at all."""
        raw: Any = await self._redis.hget(log.keys[2], f"at:{source}")
        return text_of(raw or b"")

    async def read(self, log: Log, *, after: int, limit: int) -> Page:
        """At most `limit` chunks after `after`, and about 1 MiB of text."""
        count = min(limit, _PAGE_BYTES // CHUNK_BYTES)
        chunks: list[Chunk] = []
        size = 0
        while True:
            start = chunks[-1].seq if chunks else after
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.xrange(log.keys[1], min=f"({start}-0", max="+", count=count)
                pipe.hmget(log.keys[2], ["first", "last"])
                entries, (first, last) = await pipe.execute()
            for raw_id, fields in entries:
                chunk = _chunk(raw_id, fields)
                if (chunks and chunk.seq != chunks[-1].seq + 1) or len(chunks) == limit or size > _PAGE_BYTES:
                    entries = []  # trimmed meanwhile, or enough
                    break
                chunks.append(chunk)
                size += len(chunk.text)
            if len(entries) < count or len(chunks) == limit:
                return Page(chunks, int(first or 1), int(last or 0))

    async def wait(self, log: Log, *, after: int, wait_s: float) -> None:
        """Return when there is a chunk after `after`, or at the latest after `wait_s`."""
        block_ms = max(1, int(min(wait_s, _LOOK_S) * 1000))  # zero would mean "for ever" to Redis
        await self._redis.xread({log.keys[1]: f"{after}-0"}, count=1, block=block_ms)


class LogWriter:
    """Takes the pieces of one deployment's log at once, and stores them a little later, in order."""

    def __init__(self, store: LogStore, log: Log, *, fence: int) -> None:
        self._store, self._log, self._fence = store, log, fence
        self._source = f"worker-{fence}-{secrets.token_hex(4)}"
        self._buffer = bytearray()
        self._dropped = 0
        self._stored = 0

    def write(self, data: bytes) -> None:
        """Never waits: what the store cannot take in time is dropped, the oldest first."""
        self._buffer += data
        if len(self._buffer) > _BUFFER_BYTES:
            excess = len(self._buffer) - _BUFFER_BYTES
            del self._buffer[:excess]
            self._dropped += excess

    def say(self, line: str) -> None:
        self.write(f"{line}\n".encode())

    async def flush(self, *, final: bool = False) -> None:
        """Store what there is. `final`: also the beginning of a character that never got its end."""
        while self._buffer:
            whole = len(self._buffer) if final else complete_utf8(self._buffer)
            if whole == 0:
                return
            data = bytes(self._buffer[: min(whole, CHUNK_BYTES * _BATCH_CHUNKS)])
            chunks = in_chunks(data)
            if self._dropped:
                chunks.insert(0, f"[{self._dropped} bytes of output are missing here]\n".encode())
            then = self._stored + len(data)
            at = str(self._stored) if self._stored else ""
            await self._store.append(self._log, chunks, source=self._source, at=at, then=str(then), fence=self._fence)
            # Also when the claim is lost: whoever has it now writes the log.
            self._stored, self._dropped = then, 0
            del self._buffer[: len(data)]

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_S)
            with contextlib.suppress(RedisError, OSError):  # kept for the next round
                await self.flush()


@asynccontextmanager
async def deployment_log(store: LogStore, log: Log, *, fence: int) -> AsyncIterator[LogWriter]:
    """The writer of a deployment's log; what was written is stored when this ends, if the store can be reached."""
    writer = LogWriter(store, log, fence=fence)
    flushing = asyncio.create_task(writer._flush_forever())  # noqa: SLF001 - its own module's
    try:
        yield writer
    finally:
        await end_task(flushing)
        try:
            await writer.flush(final=True)
        except (RedisError, OSError) as error:
            _log.warning("deploy.log_not_stored", deployment=log.deployment_id, error=str(error))


def in_chunks(data: bytes) -> list[bytes]:
    """Pieces of at most `CHUNK_BYTES`, with no character split between two."""
    pieces = []
    while data:
        piece = data[:CHUNK_BYTES]
        if len(data) > CHUNK_BYTES:
            piece = piece[: complete_utf8(piece) or len(piece)]
        pieces.append(piece)
        data = data[len(piece) :]
    return pieces


def complete_utf8(data: bytes | bytearray) -> int:
    """How many bytes there are without the beginning of a character at the end; all of them when they are no text."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:  # noqa: PLR2004 - RFC 3629: one byte
            break
        if byte >= 0xC0:  # noqa: PLR2004 - the first byte of several
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4  # noqa: PLR2004
            return len(data) - back if back < wanted else len(data)
    return len(data)


def _chunk(raw_id: bytes, fields: Any) -> Chunk:
    seq = int(raw_id.partition(b"-")[0])
    return Chunk(seq, int(fields[b"t"]), text_of(fields[b"s"]), fields[b"d"].decode("utf-8", "replace"))
