"""What every object store does. Calls block: they run in worker threads, never in the daemon's loop.

Vendors' libraries are blocking, and a download, its decompression and its unpacking are one stream (DESIGN.md 5.5) that
lives in one thread. Every network call has a deadline of its own: a stall is `errors.StorageUnavailable`. Errors leave as
`NotFound`, `Forbidden` (both `errors.ArtifactFailed`, as is what fits neither) or `errors.StorageUnavailable`, without
secrets in their texts; `errors.UnsupportedRequest` is for a key that no object of such a store can have.
Retrying is inside: what is raised has been tried often enough for one call.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, BinaryIO

from runner import errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from datetime import datetime


class NotFound(errors.ArtifactFailed):
    """There is no such object, or no such bucket. `bucket_missing` tells them apart where the server does."""

    def __init__(self, message: str, *, bucket_missing: bool = False) -> None:
        super().__init__(message)
        self.bucket_missing = bucket_missing


class Forbidden(errors.ArtifactFailed):
    """The credentials are wrong, or do not allow it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credentials:
    """An access key pair. Never shows its secrets."""

    access_key: str
    secret_key: str = dataclasses.field(repr=False)
    session_token: str | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Location:
    """Where one object is, everything decided (scheme, TLS, region, credentials). Made by `storage.location.locate`."""

    scheme: str  #: "s3" | "file" | "http" | "https"
    endpoint: str = ""  #: host[:port]; empty for files
    tls: bool = False
    bucket: str = ""  #: for files the root directory (`qualified` minus `key`, DESIGN.md 5.6)
    key: str = ""
    region: str | None = None
    credentials: Credentials | None = None  #: None is anonymous

    @property
    def uri(self) -> str:
        """For people, logs and metadata documents: the address, never the credentials."""
        if self.scheme == "s3":
            return f"s3://{self.endpoint}/{self.bucket}/{self.key}"
        if self.scheme == "file":
            return f"file://{self.bucket.rstrip('/')}/{self.key}"
        return f"{self.scheme}://{self.endpoint}/{self.key.partition('?')[0]}"  # a query may be a signature

    def at(self, key: str) -> Location:
        """The same place, another key."""
        return dataclasses.replace(self, key=key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """What a store says of an object."""

    key: str
    size: int  #: bytes; -1 where a web server does not tell
    etag: str  #: quotes stripped; empty where the store has none. Equal etags (same store, key, size): equal bytes
    modified: datetime | None = None


class ObjectStream(abc.ABC):
    """The bytes of one object on their way. A reader in the manner of a raw binary file."""

    info: ObjectInfo

    @abc.abstractmethod
    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes, b"" at the end. Raises `errors.StorageUnavailable` on a stall, a reset, or an early end."""


class ObjectStore(abc.ABC):
    """One endpoint with one set of credentials and one bucket (or root directory). Safe to use from several threads."""

    @abc.abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Size and etag. Raises `NotFound`, `Forbidden`, `errors.StorageUnavailable`."""

    @abc.abstractmethod
    def open(self, key: str) -> AbstractContextManager[ObjectStream]:
        """The object's bytes, as a stream; entering it makes the request. Raises as `stat`."""

    @abc.abstractmethod
    def put(self, key: str, source: BinaryIO, size: int) -> None:
        """Store `size` bytes of `source`, from where it stands, in one atomic operation: no partial object is ever seen.

        `source` is seekable: a retry rewinds to where it stood. Raises as `stat`.
        """

    @abc.abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects whose keys begin with `prefix`, in byte order where the server sorts so (SeaweedFS does not)."""

    @abc.abstractmethod
    def reachable(self) -> bool:
        """Whether the other side answers at all (any answer, also a refusal). A few seconds at the most; never raises."""
