"""What a deployment of a workspace would do, found out by the pipeline's own detection without deploying."""

import asyncio
from contextlib import suppress
from typing import Any, Final

from deploy_pipeline.archive import ArchiveStore
from deploy_pipeline.errors import ArchiveRefused
from deploy_pipeline.preview import LIMITS, READ, Preview, preview
from orchestrator.errors import SessionEnded, TerminalUnavailable, WorkspaceNotArchivable
from orchestrator.sessions.registry import SessionRegistry
from orchestrator.sessions.terminals import Terminals
from orchestrator.settings import RuntimeKind
from orchestrator.terminal.link import LinkLost, RequestRefused
from sidecar.protocol import JsonObject

AT_ONCE: Final = 4
PATIENCE_S: Final = 60.0


class Previews:
    def __init__(
        self, registry: SessionRegistry, terminals: Terminals, archives: ArchiveStore, runtime: RuntimeKind
    ) -> None:
        self._registry, self._terminals, self._archives, self._runtime = registry, terminals, archives, runtime
        self._places = asyncio.Semaphore(AT_ONCE)

    async def of_session(self, organization_id: str, session_id: str) -> Preview:
        """
        Raises:
            SessionNotFound, SessionEnded: as named.
            WorkspaceNotArchivable: its files are past a limit, or cannot be read; with the reason.
            TerminalUnavailable: no link, or no answer within PATIENCE_S.
        """
        session = await self._registry.get(organization_id, session_id)
        if session.ended:
            raise SessionEnded(f"code session {session_id} has ended, its workspace is gone")
        facts: JsonObject = {}
        writer = self._archives.writer(LIMITS)
        archive = None
        try:
            async with asyncio.timeout(PATIENCE_S), self._places:
                async for piece in self._terminals.archive(session, facts, dict[str, Any](READ)):
                    writer.write(piece)
                archive = writer.close_unnamed()
                return await asyncio.to_thread(preview, archive, facts, self._runtime.value, self._archives.folder)
        except RequestRefused as refused:
            raise WorkspaceNotArchivable(f"the workspace cannot be archived: {refused.detail}") from refused
        except ArchiveRefused as refused:
            raise WorkspaceNotArchivable(f"the workspace cannot be archived: {refused}") from refused
        except LinkLost:
            raise TerminalUnavailable("the workspace's link was lost") from None
        except TimeoutError:
            raise TerminalUnavailable("the workspace gave no list of its files in time") from None
        finally:
            writer.abort()
            if archive is not None:
                with suppress(FileNotFoundError):
                    archive.unlink()
