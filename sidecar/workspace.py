"""The workspace's files: its archive for a deployment and a preview of it, made by a helper that runs as its user.

Operations of the link: `archive {}` streams the zip; `preview {read, depth, fileBytes, totalBytes}` streams a zip with
little of the content and ends with longer facts. See `zip_folder.py`.
"""

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

_FACTS_MAX_BYTES: Final = 1024 * 1024
_LAST_FACTS_S: Final = 1.0  # for what is still in the pipe when the helper has ended


class ArchiveStream:
    """`async for piece in stream`, then `stream.facts`. Closing it early ends the helper."""

    def __init__(self, root: Path, user: User, reaper: Reaper, preview: JsonObject | None = None) -> None:
        self._root, self._user, self._reaper = root, user, reaper
        self._options = [] if preview is None else ["--preview", json.dumps(preview)]
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
                [sys.executable, "-I", "-m", "sidecar.zip_folder", str(self._root), *self._options],
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
        reading_facts = asyncio.create_task(_read_facts(os.fdopen(facts_read, "rb", buffering=0)))
        assert helper.stdout is not None
        try:
            reader, transport = await _reader_of(helper.stdout)
            try:
                while piece := await reader.read(STREAM_PIECE_BYTES):
                    yield piece
            finally:
                transport.close()
            code = await exited
            await asyncio.wait({reading_facts}, timeout=_LAST_FACTS_S)
        finally:
            reading_facts.cancel()
            if not exited.done():
                with suppress(ProcessLookupError):
                    os.killpg(helper.pid, signal.SIGKILL)
            helper.returncode = exited.result() if exited.done() else -signal.SIGKILL  # it is reaped, or will be
        await asyncio.wait({reading_facts})
        facts = {} if reading_facts.cancelled() else reading_facts.result()
        if code != 0:
            raise Refused("archive-failed", str(facts.get("error") or f"the archive helper ended with {code}"))
        self.facts = facts


async def _reader_of(pipe: object) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=4 * STREAM_PIECE_BYTES)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader, transport


async def _read_facts(pipe: object) -> JsonObject:
    """What the helper writes about its work; it runs as the workspace's user, so anything may come."""
    reader, transport = await _reader_of(pipe)
    data = bytearray()
    try:
        while len(data) <= _FACTS_MAX_BYTES and (piece := await reader.read(STREAM_PIECE_BYTES)):
            data += piece
    finally:
        transport.close()
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
