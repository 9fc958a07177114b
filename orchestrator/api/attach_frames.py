"""What goes over an attached WebSocket: the plain form, and the subprotocol `code-sessions.v1`. docs/attach.md says it
for clients.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from orchestrator.api.body import ApiModel
from orchestrator.api.terminal import ResizeRequest, SignalRequest, chunk_object
from orchestrator.errors import InvalidRequest
from orchestrator.sessions.terminals import Output
from sidecar.protocol import RecordKind

SUBPROTOCOL: Final = "code-sessions.v1"

FrameId = Annotated[str, StringConstraints(min_length=1, max_length=255)] | None


class InputFrame(ApiModel):
    type: Literal["input"]
    text: str
    id: FrameId = None


class ResizeFrame(ResizeRequest):
    type: Literal["resize"]
    id: FrameId = None


class SignalFrame(SignalRequest):
    type: Literal["signal"]
    id: FrameId = None


ClientFrame = InputFrame | ResizeFrame | SignalFrame
_FRAMES: Final[TypeAdapter[ClientFrame]] = TypeAdapter(Annotated[ClientFrame, Field(discriminator="type")])


class Sent(NamedTuple):
    """A frame, and the seq up to which the client has everything once it took this one."""

    frame: bytes | str
    seq: int


def parse(text: str) -> ClientFrame:
    """A client's JSON frame.

    Raises:
        InvalidRequest: it is none; the detail names the member.
    """
    try:
        return _FRAMES.validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        member = ".".join(str(part) for part in problem["loc"][1:]) or "frame"
        raise InvalidRequest(f"{member}: {problem['msg']}"[:500]) from None


def frame_id(text: str) -> str | None:
    """The id of a frame that is not valid otherwise, so that its sender can tell which one was refused."""
    try:
        found = json.loads(text).get("id")
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def as_json(kind: str, **members: Any) -> str:
    return json.dumps({"type": kind, **members}, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def plain_frames(output: Output) -> Iterator[Sent]:
    """The page's bytes, in one frame."""
    data = b"".join(record.data for record in output.page.records if record.kind is RecordKind.OUTPUT)
    if data:
        yield Sent(data, output.last_seq)


def marked_frames(output: Output) -> Iterator[Sent]:
    """The page's bytes and events in order. A mark follows when all of it is durable."""
    if output.truncated:
        yield Sent(as_json("truncated", afterSeq=output.after, firstSeq=output.first_seq), output.first_seq - 1)
    pieces: list[bytes] = []
    for record in output.page.records:
        if record.kind is RecordKind.OUTPUT:
            pieces.append(record.data)
            continue
        if pieces:
            yield Sent(b"".join(pieces), record.seq - 1)
            pieces = []
        event = chunk_object(record, base64_data=False)
        del event["text"]
        yield Sent(json.dumps(event, separators=(",", ":")), record.seq)
    if pieces:
        yield Sent(b"".join(pieces), output.last_seq)
