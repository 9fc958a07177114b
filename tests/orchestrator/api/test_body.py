import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.body import ApiModel, Timestamp, json_response, timestamp
from tests.orchestrator.api.conftest import MAX_BYTES, is_problem

JSON = {"Content-Type": "application/json"}


async def _post(server, body, path="/items", **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await server.call("POST", path, data=data, headers={**JSON, **headers})


async def test_a_good_body_is_read_and_rendered_in_camel_case(server):
    body = {"projectName": "a \N{SNOWMAN}\n\u0000", "colour": "blue", "inner": {"deepName": "x"}, "ratio": 2}
    answer, document = await _post(server, body)
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("application/json")
    assert document["projectName"] == body["projectName"]
    assert document["colour"] == "blue"
    assert document["inner"] == {"deepName": "x"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "projectName"),
        ({"project_name": "a"}, "project_name"),
        ({"projectName": "a", "extra": 1}, "extra"),
        ({"projectName": 1}, "projectName"),
        ({"projectName": None}, "projectName"),
        ({"projectName": ""}, "projectName"),
        ({"projectName": "a" * 101}, "projectName"),
        ({"projectName": "a", "count": "1"}, "count"),
        ({"projectName": "a", "count": 1.5}, "count"),
        ({"projectName": "a", "count": True}, "count"),
        ({"projectName": "a", "flag": 1}, "flag"),
        ({"projectName": "a", "flag": "true"}, "flag"),
        ({"projectName": "a", "ratio": "1"}, "ratio"),
        ({"projectName": "a", "colour": "green"}, "colour"),
        ({"projectName": "a", "inner": {"deepName": 1}}, "inner.deepName"),
        ({"projectName": "a", "inner": {"deepName": "a", "more": 1}}, "inner.more"),
        ({"projectName": "a", "labels": {"k": 1}}, "labels.k"),
        ({"projectName": "a", "tags": ["a", 1]}, "tags.1"),
        ({"projectName": "\ud800"}, "projectName"),
        ({"projectName": "a", "inner": {"deepName": "x\udfff"}}, "inner.deepName"),
        ({"projectName": "a", "tags": ["a", "\ud83d"]}, "tags.1"),
        ({"projectName": "a", "labels": {"\ud800": "v"}}, "labels"),
        ({"\ud800": "a"}, "a field's name"),
    ],
)
async def test_a_wrong_field_is_named(server, body, field):
    answer, document = await _post(server, body)
    assert is_problem(answer, document, 400, "invalid-request")
    assert f"{field}: " in document["detail"]
    assert field in {error["field"] for error in document["errors"]}
    assert all(error["message"] for error in document["errors"])


async def test_all_wrong_fields_are_named_but_their_number_is_bounded(server):
    answer, document = await _post(server, {"count": "x", "flag": "y", "more": 1})
    assert {error["field"] for error in document["errors"]} == {"projectName", "count", "flag", "more"}
    answer, document = await _post(server, {f"x{number}" * 60: 1 for number in range(100)})
    assert is_problem(answer, document, 400, "invalid-request")
    assert len(document["errors"]) == 20
    assert "more" in document["detail"]
    assert len(document["detail"]) < 4000


async def test_a_pair_of_surrogates_is_one_character(server):
    _, document = await _post(server, b'{"projectName": "\\ud83d\\ude00"}')
    assert document["projectName"] == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"projectName": "a"} x', "not JSON"),
        (b'{"projectName": "a\x01"}', "not JSON"),
        (b"[]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"projectName": "a", "ratio": NaN}', "NaN"),
        (b'{"projectName": "a", "ratio": -Infinity}', "-Infinity"),
        (b'{"projectName": "a", "ratio": 1e999}', "ratio"),
        (b'{"projectName": "a", "projectName": "b"}', "projectName: must be given only once"),
        (b'{"projectName": "\xff"}', "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ('{"projectName": "a"}'.encode("utf-16"), "not UTF-8"),
        (b"[" * 60_000, "nested too deeply"),
        (b'{"a":' * 10_000, "nested too deeply"),
        (b'{"count": ' + b"9" * 5000 + b"}", "too long"),
    ],
)
async def test_what_is_not_a_json_object_is_400_and_says_why(server, body, said):
    answer, document = await _post(server, body)
    assert is_problem(answer, document, 400, "invalid-request")
    assert said in document["detail"]


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1", "application/jsonp",
     "json", "application/json; charset=nonsense", "multipart/form-data; boundary=a", ""],
)  # fmt: skip
async def test_a_body_that_is_not_announced_as_json_is_415(server, content_type):
    for path in ("/items", "/options"):
        answer, document = await _post(server, {"projectName": "a"}, path, **{"Content-Type": content_type})
        assert is_problem(answer, document, 415, "unsupported-media-type")
        assert "JSON" in document["detail"] or "application/json" in document["detail"]


async def test_a_body_without_a_content_type_is_415(server):
    body = b'{"projectName": "a"}'
    head = b"POST /items HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    status, _, document = await server.raw(head + body)
    assert status.split()[1] == b"415"
    assert document["code"] == "unsupported-media-type"


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "Application/JSON", "application/json; charset=UTF-8", 'application/json;charset="utf-8";x=y'],
)  # fmt: skip
async def test_parameters_and_case_of_the_content_type_do_not_matter(server, content_type):
    answer, _ = await _post(server, {"projectName": "a"}, **{"Content-Type": content_type})
    assert answer.status == 200


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_above_the_limit_is_413_and_one_at_the_limit_is_read(server, chunked):
    async def pieces(count):
        yield b'{"projectName": "a"' + b" " * (count - 20) + b"}"

    async def send(count):
        data = pieces(count) if chunked else b'{"projectName": "a"' + b" " * (count - 20) + b"}"
        return await server.call("POST", "/items", data=data, headers=JSON)

    answer, _ = await send(MAX_BYTES)
    assert answer.status == 200
    answer, document = await send(MAX_BYTES + 1)
    assert is_problem(answer, document, 413, "payload-too-large")
    assert document["limitBytes"] == MAX_BYTES


async def test_a_small_body_that_unpacks_to_a_large_one_is_413(server):
    packed = zlib.compress(b" " * (MAX_BYTES * 100))
    answer, document = await _post(server, packed, **{"Content-Encoding": "deflate"})
    assert is_problem(answer, document, 413, "payload-too-large")


@pytest.mark.parametrize(("body", "force"), [(b"", False), (b"{}", False), (b'{"force": true}', True)])
async def test_a_body_that_may_be_missing_is_taken_for_an_empty_object(server, body, force):
    answer, document = await _post(server, body, "/options")
    assert (answer.status, document) == (200, {"force": force})


async def test_no_body_needs_no_content_type_where_it_may_be_missing(server):
    status, _, document = await server.raw(b"POST /options HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    assert (status.split()[1], document) == (b"200", {"force": False})
    status, _, document = await server.raw(b"POST /options HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status.split()[1], document) == (b"200", {"force": False})
    status, _, document = await server.raw(b"POST /items HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status.split()[1], document["code"]) == (b"400", "invalid-request")


async def test_query_parameters_are_read(server):
    answer, document = await server.call("GET", "/page?afterSeq=0&limit=5&wait=1.5&verbose=true&colour=red")
    assert answer.status == 200
    assert document == {"afterSeq": 0, "limit": 5, "wait": 1.5, "verbose": True, "colour": "red"}


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        *((f"afterSeq={value}", "afterSeq") for value in
          ("-1", "1.5", "abc", "", "9" * 30, "1e3", "+1", "%201", "1_0", "0x1", "%D9%A1", "true", "nan")),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("wait=61", "wait"),
        ("wait=nan", "wait"),
        ("wait=inf", "wait"),
        ("wait=-0.1", "wait"),
        ("verbose=yes", "verbose"),
        ("verbose=1", "verbose"),
        ("colour=green", "colour"),
        ("after_seq=1", "after_seq"),
        ("unknown=1", "unknown"),
        ("limit=1&limit=1", "limit"),
        ("afterSeq=%ff", "afterSeq"),
    ],
)  # fmt: skip
async def test_a_wrong_query_parameter_is_named(server, parameters, named):
    answer, document = await server.call("GET", f"/page?{parameters}")
    assert is_problem(answer, document, 400, "invalid-request")
    assert document["errors"][0]["field"] == named
    assert document["detail"].startswith(f"{named}: ")


@given(st.integers(0, 253402300799999))
def test_a_timestamp_is_utc_with_milliseconds(ms):
    from datetime import datetime, timedelta

    text = timestamp(ms)
    assert len(text) == 24
    parsed = datetime.fromisoformat(text)
    assert parsed - datetime.fromisoformat("1970-01-01T00:00:00Z") == timedelta(milliseconds=ms)


def test_the_contracts_timestamp():
    assert timestamp(1738419720123) == "2025-02-01T14:22:00.123Z"


def test_a_model_is_rendered_with_its_timestamps_and_nulls():
    class Answer(ApiModel):
        created_at: Timestamp
        next_cursor: str | None

    answer = json_response(Answer(created_at=0, next_cursor=None), status=201, headers={"Location": "/x"})
    assert answer.body == b'{"createdAt":"1970-01-01T00:00:00.000Z","nextCursor":null}'
    assert (answer.status, answer.headers["Location"]) == (201, "/x")
