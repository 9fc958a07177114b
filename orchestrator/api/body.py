"""Requests parsed into models, models rendered as JSON. What is wrong with a request is said by field."""

import codecs
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Final, NoReturn, TypeVar, Union, get_args, get_origin

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError, ValidationInfo, field_validator
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails, PydanticCustomError, to_json

from orchestrator.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType

MAX_BODY_BYTES: Final = 8 * 1024 * 1024
"""For `web.Application(client_max_size=…)`."""
_MAX_NAMED_FIELDS: Final = 20
_MAX_FIELD_CHARACTERS: Final = 100
_NUMBERS: Final = {
    int: (re.compile(r"-?[0-9]{1,18}"), "must be a whole number"),
    float: (re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,9})?"), "must be a number"),
    bool: (re.compile(r"true|false"), "must be true or false"),
}
_MESSAGES: Final = {"missing": "is missing", "extra_forbidden": "is not a known field"}


class ApiModel(BaseModel):
    """What goes over the wire: camelCase there, snake_case here; no coercion, nothing unknown."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


class QueryModel(ApiModel):
    """Query parameters: text, of which numbers are read strictly (no blanks, `+`, `_`, exponents or other digits)."""

    model_config = ConfigDict(strict=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values_only(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str) or info.field_name is None:
            return value
        wanted = _plain_type(cls.model_fields[info.field_name].annotation)
        if wanted is not None:
            pattern, message = _NUMBERS[wanted]
            if not pattern.fullmatch(value):
                raise PydanticCustomError("query_value", "{message}", {"message": message})
        return value


Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: web.Request, model: type[Model], *, allow_empty: bool = False) -> Model:
    """The request's JSON object as `model`. `allow_empty`: no body at all is taken for `{}`.

    Raises:
        UnsupportedMediaType: the body is not announced as JSON in UTF-8.
        PayloadTooLarge: it has more bytes than the application's `client_max_size`.
        InvalidRequest: it is not a JSON object, or not this model's; `facts["errors"]` names each field.
    """
    body = await _read_bytes(request)
    if not body:
        if allow_empty:
            body = b"{}"
        else:
            raise InvalidRequest("The request body is empty; a JSON object is expected.")
    _check_json(body)
    try:
        # From the text and not from the parsed object: in strict mode only that takes "running" for an enum's member.
        return model.model_validate_json(body, by_alias=True, by_name=False)
    except ValidationError as error:
        _refuse([_named(problem) for problem in error.errors(include_url=False, include_input=False)])


def query(request: web.Request, model: type[Model]) -> Model:
    """The request's query parameters as `model`.

    Raises:
        InvalidRequest: one is unknown, repeated, missing or mistyped; `facts["errors"]` names each.
    """
    given = request.query
    repeated = [name for name in dict.fromkeys(given) if len(given.getall(name)) > 1]
    if repeated:
        _refuse([(name, "must be given only once") for name in repeated])
    try:
        return model.model_validate(dict(given), by_alias=True, by_name=False)
    except ValidationError as error:
        _refuse([_named(problem) for problem in error.errors(include_url=False, include_input=False)])


def json_response(
    content: BaseModel | Mapping[str, object], *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """A model with camelCase names, or a mapping as it is, as JSON."""
    if isinstance(content, BaseModel):
        body = content.model_dump_json(by_alias=True).encode()
    else:
        body = to_json(content, inf_nan_mode="constants")
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def timestamp(ms: int) -> str:
    """Milliseconds since 1970 as `2025-02-01T14:22:00.123Z`."""
    seconds, rest_ms = divmod(ms, 1000)
    return f"{_to_the_second(seconds)}.{rest_ms:03d}Z"


Timestamp = Annotated[int, PlainSerializer(timestamp, return_type=str)]
"""A model's field that holds milliseconds since 1970 and is rendered as text."""


@lru_cache(maxsize=4096)  # a page of output has a thousand chunks of a few seconds
def _to_the_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


async def _read_bytes(request: web.Request) -> bytes:
    if request.body_exists:  # some clients announce a type for a body that they do not send
        _check_content_type(request)
    limit_bytes = request.client_max_size
    too_large = PayloadTooLarge(f"The request body may have {limit_bytes} bytes.", limit_bytes=limit_bytes)
    if (request.content_length or 0) > limit_bytes:
        raise too_large
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise InvalidRequest("The request body is cut short, or not encoded as its headers say.") from error


def _check_content_type(request: web.Request) -> None:
    given = request.headers.get(hdrs.CONTENT_TYPE)
    if given is None:
        # With a body and no type: RFC 9110 8.3 lets us guess, but a client that means JSON can say so.
        if request.content_length == 0:
            return
        raise UnsupportedMediaType("The request has no Content-Type; application/json is expected.")
    if request.content_type != "application/json":
        raise UnsupportedMediaType(
            f"The Content-Type is {given[:_MAX_FIELD_CHARACTERS]}; application/json is expected."
        )
    try:
        charset = codecs.lookup(request.charset or "utf-8").name
    except (LookupError, ValueError):
        charset = ""
    if charset not in {"utf-8", "ascii"}:
        raise UnsupportedMediaType("JSON comes in UTF-8, not in another charset.")


def _check_json(body: bytes) -> None:
    """What pydantic's parser would let pass or not name: repeated names, NaN, lone surrogates with their field."""
    try:
        parsed = json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The request body is not UTF-8 (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"The request body is not JSON ({error.msg}, {where}).") from None
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.") from None
    except ValueError:  # an integer of more digits than Python converts
        raise InvalidRequest("The request body holds a number that is too long.") from None
    if not isinstance(parsed, dict):
        raise InvalidRequest("The request body is not a JSON object.")
    if b"\\u" in body and (found := _lone_surrogate(parsed, "")) is not None:
        _refuse([(found, "holds half of a surrogate pair, which is no character")])


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        _refuse([(name, "must be given only once") for name, _ in pairs if name in seen or seen.add(name)])  # type: ignore[func-returns-value]
    return members


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"The request body is not JSON: it holds {name}.")


def _lone_surrogate(value: object, path: str) -> str | None:
    """The path of the first text that cannot be UTF-8. The depth is bounded by the parser's."""
    if isinstance(value, str):
        return None if _is_text(value) else path
    if isinstance(value, dict):
        members = [(name, f"{path}.{name}" if path else name, member) for name, member in value.items()]
        if any(not _is_text(name) for name, _, _ in members):
            return path or "a field's name"
        return next((bad for _, below, member in members if (bad := _lone_surrogate(member, below)) is not None), None)
    if isinstance(value, list):
        items = ((f"{path}.{place}", item) for place, item in enumerate(value))
        return next((bad for below, item in items if (bad := _lone_surrogate(item, below)) is not None), None)
    return None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain_type(annotation: Any) -> type | None:
    """The one of int, float and bool that a parameter is, when it is one (or that or None)."""
    if get_origin(annotation) is Annotated:
        return _plain_type(get_args(annotation)[0])
    options = get_args(annotation) if get_origin(annotation) in {Union, UnionType} else (annotation,)
    if len(options) > 1:
        return next((wanted for option in options if (wanted := _plain_type(option)) is not None), None)
    return annotation if annotation in _NUMBERS else None


def _named(problem: ErrorDetails) -> tuple[str, str]:
    field = ".".join(str(part) for part in problem["loc"]) or "body"
    message = _MESSAGES.get(problem["type"])
    if message is None:
        message = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
        message = message.replace("should be", "must be").replace("should have", "must have")
        message = message[:1].lower() + message[1:]
    return field[:_MAX_FIELD_CHARACTERS], message


def _refuse(errors: list[tuple[str, str]]) -> NoReturn:
    shown = errors[:_MAX_NAMED_FIELDS]
    detail = "; ".join(f"{field}: {message}" for field, message in shown)
    if len(errors) > len(shown):
        detail += f"; and {len(errors) - len(shown)} more"
    raise InvalidRequest(detail, errors=[{"field": field, "message": message} for field, message in shown])
