"""`/api/v1/code-sessions/{id}/input`, `/output`, `/terminal`, `/resize`, `/signal`: the terminal over plain HTTP."""

import base64
from typing import Annotated, Any, Final, Literal

from aiohttp import web
from pydantic import Field

from orchestrator.access.scopes import Scope
from orchestrator.api.auth import require_scope
from orchestrator.api.body import ApiModel, QueryModel, idempotency_key, json_response, query, read_body, timestamp
from orchestrator.api.keys import REGISTRY, TERMINALS
from orchestrator.api.sessions import terminal_object
from orchestrator.errors import PayloadTooLarge
from orchestrator.sessions.terminals import Output
from orchestrator.terminal.output_store import record_facts
from sidecar.protocol import MAX_INPUT_BYTES, Record, RecordKind

_KIND_NAMES: Final = {
    RecordKind.START: "start",
    RecordKind.EXIT: "exit",
    RecordKind.RESIZE: "resize",
    RecordKind.GAP: "gap",
}
SignalName = Literal[
    "SIGINT",
    "SIGQUIT",
    "SIGTERM",
    "SIGKILL",
    "SIGHUP",
    "SIGTSTP",
    "SIGCONT",
    "SIGUSR1",
    "SIGUSR2",
    "SIGWINCH",
]
"""What a person at a terminal, or who supervises a program in it, has a use for."""


class InputRequest(ApiModel):
    text: str


class OutputQuery(QueryModel):
    after_seq: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=1, le=10_000)] = 1000
    wait: Annotated[float, Field(ge=0, le=60)] = 0
    encoding: Literal["utf-8", "base64"] = "utf-8"


class TerminalRequest(ApiModel):
    cols: Annotated[int, Field(ge=1, le=1000)] | None = None
    rows: Annotated[int, Field(ge=1, le=1000)] | None = None


class ResizeRequest(ApiModel):
    cols: Annotated[int, Field(ge=1, le=1000)]
    rows: Annotated[int, Field(ge=1, le=1000)]


class SignalRequest(ApiModel):
    signal: SignalName


async def send_input(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.WRITE)
    body = await read_body(request, InputRequest)
    data = body.text.encode()
    if len(data) > MAX_INPUT_BYTES:
        raise PayloadTooLarge(f"text: {len(data)} bytes of UTF-8, at most {MAX_INPUT_BYTES} are taken at once")
    written = await request.app[TERMINALS].write(
        caller.organization_id,
        request.match_info["id"],
        data,
        caller=caller.id,
        idempotency_key=idempotency_key(request),
    )
    return json_response({"sent": True, "bytes": written})


async def read_output(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.READ)
    asked = query(request, OutputQuery)
    session_id = request.match_info["id"]
    output = await request.app[TERMINALS].read(
        caller.organization_id, session_id, after=asked.after_seq, limit=asked.limit, wait_s=asked.wait, until_stop=True
    )
    return json_response(_output_object(session_id, output, base64_data=asked.encoding == "base64"))


def _output_object(session_id: str, output: Output, *, base64_data: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "sessionId": session_id,
        "chunks": [chunk_object(record, base64_data=base64_data) for record in output.page.records],
        "lastSeq": output.last_seq,
        "firstSeq": output.page.first_seq,
        "hasMore": output.has_more,
    }
    if output.truncated:
        body["truncated"] = True
    return body


def chunk_object(record: Record, *, base64_data: bool) -> dict[str, Any]:
    chunk: dict[str, Any] = {"seq": record.seq, "offset": record.offset}
    is_output = record.kind is RecordKind.OUTPUT
    if base64_data:
        chunk["data"] = base64.b64encode(record.data).decode() if is_output else ""
    else:
        chunk["text"] = record.data.decode(errors="replace") if is_output else ""
    chunk["createdAt"] = timestamp(record.time_ms)
    if not is_output:  # an event of the terminal at this place of its output, with no text of its own
        chunk |= {"type": _KIND_NAMES[record.kind], **record_facts(record.data)}
    return chunk


async def start_terminal(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.WRITE)
    body = await read_body(request, TerminalRequest, allow_empty=True)
    size = body.model_dump(exclude_none=True)
    session_id = request.match_info["id"]
    terminal = await request.app[TERMINALS].start(caller.organization_id, session_id, size)
    return json_response({"sessionId": session_id, "terminal": terminal_object(terminal)}, status=201)


async def show_terminal(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.READ)
    session = await request.app[REGISTRY].get(caller.organization_id, request.match_info["id"])
    terminal = await request.app[TERMINALS].state(session)
    return json_response({"sessionId": session.id, "terminal": terminal_object(terminal)})


async def resize_terminal(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.WRITE)
    body = await read_body(request, ResizeRequest)
    session_id = request.match_info["id"]
    terminal = await request.app[TERMINALS].resize(caller.organization_id, session_id, cols=body.cols, rows=body.rows)
    return json_response({"sessionId": session_id, "terminal": terminal_object(terminal)})


async def send_signal(request: web.Request) -> web.Response:
    caller = require_scope(request, Scope.WRITE)
    body = await read_body(request, SignalRequest)
    await request.app[TERMINALS].signal(caller.organization_id, request.match_info["id"], body.signal)
    return json_response({"sent": True})


def add_routes(router: web.UrlDispatcher) -> None:
    base = "/api/v1/code-sessions/{id}"
    router.add_post(f"{base}/input", send_input)
    router.add_get(f"{base}/output", read_output)
    router.add_post(f"{base}/terminal", start_terminal)
    router.add_get(f"{base}/terminal", show_terminal)
    router.add_post(f"{base}/resize", resize_terminal)
    router.add_post(f"{base}/signal", send_signal)
