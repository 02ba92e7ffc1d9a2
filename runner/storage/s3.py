"""Any server that speaks the S3 protocol, through the MinIO client. Importing this module is what costs (0.4 s)."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, BinaryIO, TypeVar
from xml.etree import ElementTree as ET

import minio
import structlog
from minio.error import MinioException

from runner import errors
from runner.storage.base import Forbidden, Location, NotFound, ObjectInfo, ObjectStore, ObjectStream
from runner.storage.download import Download, etag_of
from runner.storage.transport import Refusal, Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from minio.datatypes import Object
    from urllib3.response import BaseHTTPResponse

    from runner.storage.base import Credentials

log = structlog.get_logger(__name__)

T = TypeVar("T")

_PART_BYTES = 16 << 20  # larger objects go in parts of this size; up to four are in memory at once
_MOST_PARTS = 10_000  # S3's limit
_REGION = "us-east-1"  # what servers other than Amazon's expect when none is configured
_NO_BUCKET = "NoSuchBucket"
_NO_OBJECT = frozenset({"NoSuchKey", "NoSuchVersion", "NoSuchObject"})
_AWAY = frozenset(
    {"RequestTimeout", "NoSuchUpload", "SlowDown", "OperationAborted"}
)  # the same may succeed next time
_FORBIDDEN = frozenset(
    {
        "AccessDenied",
        "AllAccessDisabled",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
    }
)
_ADVICE = {
    "RequestTimeTooSkewed": "; the clock of this machine or of the server is wrong",
    "InvalidAccessKeyId": "; the server does not know this access key",
    "SignatureDoesNotMatch": "; the secret key is wrong",
    "ExpiredToken": "; the session token has expired",
}


class S3Store(ObjectStore):
    """One bucket of one S3 endpoint, with one set of credentials. Path-style addresses; never asks for the region.

    Reads that the credentials do not allow are tried once more without them (INTEROP.md 3.2). `transport` is shared.
    """

    def __init__(self, location: Location, transport: Transport) -> None:
        self._location = location
        self._transport = transport
        self._region = location.region or _REGION
        self._client = self._connect(location.credentials)

    def stat(self, key: str) -> ObjectInfo:
        """As `ObjectStore.stat`. Whether it is the bucket that is missing, only `open` and `put` can tell."""
        try:
            found = self._ask(lambda client: client.stat_object(self._location.bucket, key), key)
        except (
            Forbidden
        ):  # a refused HEAD has no body, hence no code: a GET tells a wrong secret from a missing right
            with self.open(key) as stream:
                return stream.info
        return _info(found)

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[ObjectStream]:
        """As `ObjectStore.open`. The stream resumes by itself while the object stays the same."""
        anonymous, response = self._read(lambda client: client.get_object(self._location.bucket, key), key)
        info = ObjectInfo(
            key=key, size=int(response.headers.get("content-length", -1)), etag=etag_of(response)
        )

        def reopen(*, offset: int, etag: str) -> BaseHTTPResponse:
            return self._ask(
                lambda client: client.get_object(
                    self._location.bucket,
                    key,
                    # "bytes=0-" and not nothing, so that the answer is always a partial one
                    request_headers={"If-Match": f'"{etag}"', "Range": f"bytes={offset}-"},
                ),
                key,
                anonymous=anonymous,
            )

        download = Download(
            response, info, endpoint=self._location.endpoint, reopen=reopen, patience=self._transport.patience
        )
        with contextlib.closing(download):
            yield download

    def put(self, key: str, source: BinaryIO, size: int) -> None:
        """As `ObjectStore.put`. Above 16 MiB in parts, three at a time; what fails is a part, tried again by itself."""
        start = source.tell()
        if source.seek(0, 2) - start < size:  # found out midway it would leave the client's threads behind
            raise errors.ArtifactFailed(f"what was to be stored at {self._location.at(key).uri} has shrunk")

        def upload(client: minio.Minio) -> None:
            source.seek(start)
            part_size = _PART_BYTES if size <= _PART_BYTES * _MOST_PARTS else 0  # 0: the client chooses
            result = client.put_object(self._location.bucket, key, source, size, part_size=part_size)
            if not result.etag:  # completing an upload in parts can fail within an answer of 200
                raise errors.StorageUnavailable(
                    f"{self._location.endpoint} did not complete an upload", endpoint=self._location.endpoint
                )

        self._ask(upload, key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As `ObjectStore.list`; a page of up to 1,000 at a time."""

        def first_page(client: minio.Minio) -> tuple[Object | None, Iterator[Object]]:
            found = client.list_objects(self._location.bucket, prefix=prefix, recursive=True)
            return next(found, None), found

        _, (item, rest) = self._read(first_page, prefix)
        while item is not None:
            yield _info(item)
            item = self._ask(lambda _: next(rest, None), prefix)

    def reachable(self) -> bool:
        """As `ObjectStore.reachable`; 5xx is no answer."""
        url = f"{'https' if self._location.tls else 'http'}://{self._location.endpoint}/"
        try:
            self._transport.once("GET", url, timeout=3.0)
        except Refusal:
            return True
        except errors.RunnerError:
            return False
        return True

    def _connect(self, credentials: Credentials | None) -> minio.Minio:
        try:
            client = minio.Minio(
                self._location.endpoint,
                access_key=credentials.access_key if credentials else None,
                secret_key=credentials.secret_key if credentials else None,
                session_token=credentials.session_token if credentials else None,
                secure=self._location.tls,
                region=self._region,
                http_client=self._transport,
            )
        except ValueError as exc:
            raise errors.UnsupportedRequest(
                f"{self._location.endpoint!r} is no address of an S3 server"
            ) from exc
        client.disable_virtual_style_endpoint()  # type: ignore[no-untyped-call]
        return client

    def _read(self, work: Callable[[minio.Minio], T], key: str) -> tuple[bool, T]:
        """What `work` gives, and whether it did so only without credentials."""
        try:
            return False, self._ask(work, key)
        except Forbidden as refused:
            if self._location.credentials is None:
                raise
            try:
                return True, self._ask(work, key, anonymous=True)
            except errors.ArtifactFailed:
                raise refused from None

    def _ask(self, work: Callable[[minio.Minio], T], key: str, *, anonymous: bool = False) -> T:
        """`work` done, its errors translated; once more where the server names another region for the bucket."""
        try:
            return self._translated(work, key, anonymous=anonymous)
        except _OtherRegion as other:
            log.info("bucket is in another region", endpoint=self._location.endpoint, region=other.region)
            self._region = other.region
            self._client = self._connect(self._location.credentials)
            return self._translated(work, key, anonymous=anonymous)

    def _translated(self, work: Callable[[minio.Minio], T], key: str, *, anonymous: bool) -> T:
        where = self._location.at(key).uri
        try:
            return work(self._connect(None) if anonymous else self._client)
        except Refusal as refusal:
            raise self._meaning(refusal, where) from refusal
        except ValueError as exc:  # the client's own checks of bucket and key; an answer that is no text
            raise errors.UnsupportedRequest(f"no S3 object can be at {where!r}") from exc
        except (MinioException, ET.ParseError) as exc:
            raise errors.StorageUnavailable(
                f"{self._location.endpoint} answers something that is not S3",
                endpoint=self._location.endpoint,
            ) from exc

    def _meaning(self, refusal: Refusal, where: str) -> errors.RunnerError:
        code = _code(refusal.body)
        said = f"{where}: {code or 'refused'} (status {refusal.status}){_ADVICE.get(code, '')}"
        region = refusal.headers.get("x-amz-bucket-region")
        if region and region != self._region and refusal.status in {301, 307, 400}:
            return _OtherRegion(said, region)
        if code in _AWAY:
            return errors.StorageUnavailable(said, endpoint=self._location.endpoint)
        if code == _NO_BUCKET or code in _NO_OBJECT or refusal.status == 404:  # noqa: PLR2004
            return NotFound(said, bucket_missing=code == _NO_BUCKET)
        if code in _FORBIDDEN or refusal.status in {401, 403}:
            return Forbidden(said)
        return errors.ArtifactFailed(said)


class _OtherRegion(errors.ArtifactFailed):
    """The bucket is elsewhere. Raised to callers only when the region that the server names leads on to yet another."""

    def __init__(self, message: str, region: str) -> None:
        super().__init__(f"{message}; the bucket is in the region {region}")
        self.region = region


def _code(body: bytes) -> str:
    """The S3 error code in an answer, or nothing."""
    found = re.search(rb"<Code>\s*([A-Za-z0-9.]{1,64})\s*</Code>", body)
    return found[1].decode() if found else ""


def _info(found: Object) -> ObjectInfo:
    return ObjectInfo(
        key=found.object_name or "", size=found.size or 0, etag=found.etag or "", modified=found.last_modified
    )
