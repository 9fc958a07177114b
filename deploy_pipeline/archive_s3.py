"""Archives in a bucket of an S3-compatible store, for a control plane and workers that share no folder.

boto3 comes with the extra `s3`, and finds credentials and region as it does everywhere: in `AWS_…` variables, its
files, or the machine's role. It blocks, so it runs in threads.
"""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from deploy_pipeline.archive import ArchiveStore, ArchiveWriter, Limits, is_sha256
from deploy_pipeline.errors import ArchiveRefused, ArchivesUnavailable

_SUFFIX: Final = ".zip"
_ABSENT: Final = frozenset({"404", "NoSuchKey", "NotFound"})
_CONNECT_S: Final = 10
_READ_S: Final = 60
_ATTEMPTS: Final = 4
_PIECE_BYTES: Final = 1024 * 1024
_FRESH_S: Final = 600.0  # much less than the age at which housekeeping removes what nothing needs


class S3ArchiveStore(ArchiveStore):
    """`folder` holds what is on its way; nothing stays there."""

    look_every_s = 600.0  # every look is a request that is paid for
    is_shared = True

    def __init__(self, folder: Path, url: str, endpoint_url: str = "", limits: Limits | None = None) -> None:
        """`url` is `s3://bucket` or `s3://bucket/prefix`; `endpoint_url` is for stores other than Amazon's.

        Raises:
            ValueError: it is no such URL, or boto3 is missing.
        """
        super().__init__(folder, limits)
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc:
            raise ValueError(f"not a bucket's URL (s3://bucket/prefix): {url}")
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._client = _client(endpoint_url)

    def writer(self, limits: Limits | None = None) -> "S3ArchiveWriter":
        return S3ArchiveWriter(self, limits or self.limits)

    @asynccontextmanager
    async def local(self, sha256: str) -> AsyncIterator[Path]:
        path = self.folder / f".{secrets.token_hex(8)}.part"
        try:
            await asyncio.to_thread(self._download, sha256, path)
            yield path
        finally:
            path.unlink(missing_ok=True)

    async def remove(self, sha256: str) -> None:
        if is_sha256(sha256):
            await asyncio.to_thread(self._call, "delete_object", sha256)

    async def stored_before(self, age_s: float) -> set[str]:
        return await asyncio.to_thread(self._stored_before, age_s)

    def _stored_before(self, age_s: float) -> set[str]:
        oldest, found = time.time() - age_s, set()
        pages = self._client.get_paginator("list_objects_v2")
        with _translated():
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._key("")):
                for entry in page.get("Contents", []):
                    sha256 = entry["Key"].removeprefix(self._key("")).removesuffix(_SUFFIX)
                    # Whatever else is in the bucket is none of our business.
                    if is_sha256(sha256) and entry["LastModified"].timestamp() < oldest:
                        found.add(sha256)
        return found

    def upload(self, path: Path, sha256: str) -> None:
        """Unless it was stored lately: the same hash is the same bytes. An older one is stored again, so that nobody
        removes it before its new deployment names it. Blocking.

        Raises:
            ArchivesUnavailable: the bucket cannot be reached.
        """
        found = self._call("head_object", sha256)
        if found is None or time.time() - found["LastModified"].timestamp() > _FRESH_S:
            with path.open("rb") as body:
                self._call("put_object", sha256, Body=body, ContentType="application/zip")

    def _download(self, sha256: str, path: Path) -> None:
        found = self._call("get_object", sha256) if is_sha256(sha256) else None
        if found is None:
            raise ArchiveRefused("The workspace's archive is no longer stored; deploy again.")
        digest = hashlib.sha256()
        with path.open("xb") as sink, contextlib.closing(found["Body"]) as body, _translated():
            while piece := body.read(_PIECE_BYTES):
                digest.update(piece)
                sink.write(piece)
        if digest.hexdigest() != sha256:
            raise ArchiveRefused("The workspace's archive was changed where it is stored; deploy again.")

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _call(self, operation: str, sha256: str, **arguments: Any) -> Any:
        """The answer; None when there is no such archive."""
        key = self._key(f"{sha256}{_SUFFIX}")
        with _translated():
            try:
                return getattr(self._client, operation)(Bucket=self._bucket, Key=key, **arguments)
            except self._client.exceptions.ClientError as error:
                if error.response["Error"]["Code"] in _ABSENT and operation != "put_object":
                    return None
                raise


class S3ArchiveWriter(ArchiveWriter):
    def __init__(self, store: S3ArchiveStore, limits: Limits) -> None:
        super().__init__(store.folder, limits)
        self._store = store

    async def commit(self) -> tuple[str, int]:
        """Keep the archive, in the bucket before this returns.

        Raises:
            ArchivesUnavailable: the bucket cannot be reached; nothing is kept.
        """
        size_bytes, digest = self.size_bytes, self.sha256
        path = self.close_unnamed()
        try:
            await asyncio.to_thread(self._store.upload, path, digest)
        finally:
            path.unlink(missing_ok=True)
        return digest, size_bytes


@contextlib.contextmanager
def _translated() -> Any:
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - only with the extra

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise ArchivesUnavailable(f"The archive store cannot be reached: {error}") from error


def _client(endpoint_url: str) -> Any:
    try:
        import boto3  # noqa: PLC0415 - 30 MB that only this needs
        from botocore.config import Config  # noqa: PLC0415
    except ImportError:
        raise ValueError("archives in a bucket need boto3: install code-sessions[s3]") from None
    config = Config(
        connect_timeout=_CONNECT_S,
        read_timeout=_READ_S,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        # Checksums that others than Amazon may not know are sent only where they are asked for.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.client("s3", endpoint_url=endpoint_url or None, config=config)


def open_archives(folder: Path, url: str = "", endpoint_url: str = "") -> ArchiveStore:
    """Archives in the folder, or in the bucket that `url` names.

    Raises:
        ValueError: the URL is wrong, or boto3 is missing.
    """
    return S3ArchiveStore(folder, url, endpoint_url) if url else ArchiveStore(folder)
