"""`GET /api/v1/code-sessions/{id}/recording`: the whole session so far, to be played or read."""

from collections.abc import Callable
from typing import Final, Literal

from aiohttp import hdrs, web

from orchestrator.access.scopes import Scope
from orchestrator.api.auth import require_scope
from orchestrator.api.body import QueryModel, query
from orchestrator.api.keys import REGISTRY, TERMINALS
from orchestrator.api.live import ClientStalled, Pace
from orchestrator.sessions.terminals import Output
from orchestrator.terminal.asciicast import Asciicast
from orchestrator.terminal.plain_text import PlainText
from sidecar.protocol import RecordKind

_PAGE_RECORDS: Final = 4096
_PAGE_BYTES: Final = 256 * 1024

Render = Callable[[Output], bytes]
End = Callable[[], bytes]


class RecordingQuery(QueryModel):
    download: Literal["cast", "txt"] = "cast"


async def send_recording(request: web.Request) -> web.StreamResponse:
    caller = require_scope(request, Scope.READ)
    asked = query(request, RecordingQuery)
    session = await request.app[REGISTRY].get(caller.organization_id, request.match_info["id"])
    terminals = request.app[TERMINALS]

    async def read(after: int) -> Output:
        return await terminals.read(
            caller.organization_id, session.id, after=after, limit=_PAGE_RECORDS, wait_s=0, max_bytes=_PAGE_BYTES
        )

    output = await read(0)  # before the answer begins, so that an error can still be told
    until_seq = output.page.last_seq  # what a terminal writes meanwhile is not waited for
    if asked.download == "txt":
        render, end = _plain_text()
        content_type = "text/plain; charset=utf-8"
    else:
        state = await terminals.state(session)
        render, end = _asciicast(Asciicast(title=session.project_name, cols=state.cols, rows=state.rows))
        content_type = "application/x-asciicast"
    disposition = f'attachment; filename="{session.id}.{asked.download}"'
    answer = web.StreamResponse(headers={hdrs.CONTENT_TYPE: content_type, hdrs.CONTENT_DISPOSITION: disposition})
    await answer.prepare(request)
    pace = Pace(request)
    try:
        while output.page.records:
            piece = render(output)
            await pace.sent(answer.write(piece), len(piece))
            if output.last_seq >= until_seq:
                break
            output = await read(output.last_seq)
        await answer.write(end())
    except ClientStalled:
        pace.abort()
    return answer


def _asciicast(cast: Asciicast) -> tuple[Render, End]:
    def render(output: Output) -> bytes:
        first_seq = output.page.records[0].seq
        return cast.feed(output.page.records, truncated_before=first_seq if output.truncated else 0)

    return render, cast.end


def _plain_text() -> tuple[Render, End]:
    plain = PlainText()

    def render(output: Output) -> bytes:
        pieces = (record.data.decode(errors="replace") for record in output.page.records if _is_output(record.kind))
        return plain.feed("".join(pieces)).encode()

    return render, lambda: plain.rest().encode()


def _is_output(kind: RecordKind) -> bool:
    return kind is RecordKind.OUTPUT


def add_routes(router: web.UrlDispatcher) -> None:
    router.add_get("/api/v1/code-sessions/{id}/recording", send_recording, allow_head=False)
