"""The workspace's files: now, its archive for a deployment, made by a helper that runs as the workspace's user."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from sidecar.processes import Reaper, User, become
from sidecar.protocol import STREAM_PIECE_BYTES, JsonObject
from sidecar.terminal import Refused

_FACTS_MAX_BYTES: Final = 64 * 1024


class ArchiveStream:
    """`async for piece in stream`, then `stream.facts`. Closing it early ends the helper."""

    def __init__(self, root: Path, user: User, reaper: Reaper) -> None:
        self._root, self._user, self._reaper = root, user, reaper
        self.facts: JsonObject = {}

    async def pieces(self) -> AsyncIterator[bytes]:
        """
        Raises:
            Refused: `archive-failed`, with the reason.
        """
        facts_read, facts_write = os.pipe()
        user = self._user
        try:
            helper = subprocess.Popen(  # noqa: S603, ASYNC220 - our own program; the fork is short
                [sys.executable, "-I", "-m", "sidecar.zip_folder", str(self._root)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=facts_write,
                env={"PATH": os.defpath, "LANG": "C.UTF-8"},
                start_new_session=True,
                preexec_fn=lambda: become(user),  # noqa: PLW1509 - one thread only in the sidecar
            )
        except (OSError, subprocess.SubprocessError) as error:
            os.close(facts_read)
            raise Refused("archive-failed", f"the archive helper could not be started: {error}") from error
        finally:
            os.close(facts_write)
        exited = self._reaper.watch(helper.pid)
        assert helper.stdout is not None
        try:
            reader, transport = await _reader_of(helper.stdout)
            try:
                while piece := await reader.read(STREAM_PIECE_BYTES):
                    yield piece
            finally:
                transport.close()
            code = await exited
            facts = _read_facts(facts_read)
        finally:
            os.close(facts_read)
            if not exited.done():
                with suppress(ProcessLookupError):
                    os.killpg(helper.pid, signal.SIGKILL)
            helper.returncode = exited.result() if exited.done() else -signal.SIGKILL  # it is reaped, or will be
        if code != 0:
            raise Refused("archive-failed", str(facts.get("error") or f"the archive helper ended with {code}"))
        self.facts = facts


async def _reader_of(pipe: object) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=4 * STREAM_PIECE_BYTES)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader, transport


def _read_facts(fd: int) -> JsonObject:
    """What the helper wrote about its work; it runs as the workspace's user, so anything may come."""
    os.set_blocking(fd, False)
    try:
        facts = json.loads(os.read(fd, _FACTS_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
