import asyncio
import time
from pathlib import Path

import pytest
from redis import exceptions as redis_errors

from orchestrator.errors import StoreUnavailable
from orchestrator.settings import SettingsError
from orchestrator.store import connection
from orchestrator.store.connection import connect, is_unavailable, store_unavailable


async def test_a_blocking_read_waits_longer_than_the_socket_timeout(valkey, redis, monkeypatch):
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_S", 0.2)
    async with connect(valkey) as client:
        reading = asyncio.create_task(client.xread({"stream": "$"}, block=5000))
        await asyncio.sleep(0.6)
        await redis.xadd("stream", {"field": "value"}, id="1-0")
        assert await reading == [[b"stream", [(b"1-0", {b"field": b"value"})]]]


async def test_a_blocking_read_that_finds_nothing_is_empty_and_the_connection_serves_on(valkey, redis, monkeypatch):
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_S", 0.3)  # the server looks after blocked clients every 0.1 s
    async with connect(valkey) as client:
        assert not await client.xread({"stream": "0"}, block=600)
        assert await client.ping()
        assert not await client.blpop(["list"], timeout=0.6)
        assert client.connection_pool.get_connection_count()[0][0] == 1


async def test_a_stream_named_block_is_no_option(redis):
    assert not await redis.xread({b"BLOCK": "0"})


async def test_a_command_that_is_not_answered_fails_after_the_socket_timeout(valkey, monkeypatch):
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_S", 0.2)
    async with connect(valkey) as client, connect(valkey) as pausing:
        await client.ping()
        await pausing.client_pause(700)
        began_s = time.monotonic()
        with pytest.raises(redis_errors.TimeoutError):
            await client.set("a", "b")
        assert time.monotonic() - began_s < 0.6
        await asyncio.sleep(0.6)
        assert await client.set("a", "b")


async def test_a_stopped_server_costs_one_socket_timeout_also_where_a_new_connection_is_needed(tmp_path, monkeypatch):
    """It still accepts connections, whose handshake nobody answers."""
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_S", 0.3)
    socket_path = tmp_path / "silent.sock"
    connections = []

    async def silent(reader, writer):
        connections.append(writer)
        await reader.read()  # until the client hangs up
        writer.close()

    server = await asyncio.start_unix_server(silent, socket_path)
    async with server, connect(socket_path) as client:
        began_s = time.monotonic()
        results = await asyncio.gather(client.ping(), client.set("a", "b"), return_exceptions=True)
        assert time.monotonic() - began_s < 0.9
        assert all(is_unavailable(error) for error in results), results
        await asyncio.sleep(0.05)
        assert [writer.is_closing() for writer in connections] == [True, True]


async def test_a_dead_socket_fails_within_two_seconds_as_unavailable():
    async with connect(Path("/nonexistent/valkey.sock")) as client:
        began_s = time.monotonic()
        with pytest.raises(redis_errors.ConnectionError) as caught:
            await client.ping()
        assert time.monotonic() - began_s < 2
        assert is_unavailable(caught.value)


async def test_answers_are_bytes(redis):
    await redis.set("name", b"\xff\x00")
    assert await redis.get("name") == b"\xff\x00"


async def test_a_server_that_takes_no_writes_is_unavailable(redis):
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(redis_errors.RedisError) as caught:
            await redis.set("a", "b")
    finally:
        await redis.config_set("maxmemory", "0")
    assert is_unavailable(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (redis_errors.ConnectionError("refused"), True),
        (redis_errors.TimeoutError("slow"), True),
        (redis_errors.BusyLoadingError("loading"), True),
        (redis_errors.ReadOnlyError("replica"), True),
        (redis_errors.ResponseError("MISCONF Errors writing to the AOF file"), True),
        (redis_errors.ResponseError("WRONGTYPE Operation against a key"), False),
        (redis_errors.DataError("not a number"), False),
        (ConnectionError("of somebody else"), False),
    ],
)
def test_only_what_passes_by_itself_is_unavailable(error, expected):
    assert is_unavailable(error) is expected


def test_the_domain_error_does_not_repeat_addresses():
    error = store_unavailable(redis_errors.ConnectionError("Error 111 connecting to 10.0.0.7:6379"))
    assert isinstance(error, StoreUnavailable)
    assert "10.0.0.7" not in error.detail


def test_a_wrong_url_is_refused_without_repeating_its_password():
    with pytest.raises(SettingsError) as caught:
        connect("http://:hunter2@host/")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["redis", "valkey"])
def test_both_schemes_name_the_same_server(scheme):
    client = connect(f"{scheme}://host:7000/2")
    assert client.connection_pool.connection_kwargs["host"] == "host"
    assert client.connection_pool.connection_kwargs["db"] == 2
