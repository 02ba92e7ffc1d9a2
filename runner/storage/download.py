"""The content of an object on its way over HTTP: it resumes by itself after a stall, a reset or an early end."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from urllib3.exceptions import HTTPError

from runner import errors
from runner.storage.base import ObjectInfo, ObjectStream
from runner.storage.transport import unavailable

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

    from runner.storage.transport import Patience

log = structlog.get_logger(__name__)

_CHUNK_BYTES = 256 << 10  # received at once; what a break can lose


class Reopen(Protocol):
    """Asks for the content from `offset` on, provided that it still is the one with `etag`."""

    def __call__(self, *, offset: int, etag: str) -> BaseHTTPResponse: ...  # noqa: D102


class Download(ObjectStream):
    """An object's content as a stream. One reader at a time; `close` gives the connection back.

    A broken stream goes on where it broke, by a ranged request for the same etag (If-Match). Without a strong etag it
    cannot, and the break is raised.
    """

    def __init__(
        self,
        response: BaseHTTPResponse,
        info: ObjectInfo,
        *,
        endpoint: str,
        reopen: Reopen,
        patience: Patience,
    ) -> None:
        self.info = info
        self._raw = _Resuming(response, info, endpoint=endpoint, reopen=reopen, patience=patience)
        self._buffered = io.BufferedReader(self._raw, _CHUNK_BYTES)  # makes small reads cheap

    def read(self, size: int = -1, /) -> bytes:
        """As `ObjectStream.read`; less than `size` bytes only at the end."""
        return self._buffered.read(size)

    def close(self) -> None:
        """Give up the connection; idempotent."""
        self._raw.drop()
        self._buffered.close()


class _Resuming(io.RawIOBase):
    """The unbuffered inside of a `Download`."""

    def __init__(
        self,
        response: BaseHTTPResponse,
        info: ObjectInfo,
        *,
        endpoint: str,
        reopen: Reopen,
        patience: Patience,
    ) -> None:
        self._response: BaseHTTPResponse | None = response
        self._info = info
        self._endpoint = endpoint
        self._reopen = reopen
        self._patience = patience
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        limit = min(len(buffer), _CHUNK_BYTES)
        try:
            data = self._receive(limit)
        except errors.StorageUnavailable as exc:
            data = self._resume(limit, exc)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def _receive(self, limit: int) -> bytes:
        if self._response is None:
            self._response = self._continued()
        try:
            data = self._response.read(limit, decode_content=False)
        except HTTPError as exc:
            raise unavailable(self._endpoint, exc) from exc
        if not data and self._position < self._info.size:
            raise errors.StorageUnavailable(
                f"{self._endpoint} ended a download early", endpoint=self._endpoint
            )
        return data

    def _resume(self, limit: int, broken: errors.StorageUnavailable) -> bytes:
        self.drop()
        if not self._info.etag or self._info.etag.startswith("W/"):
            raise broken
        log.info("download resumes", endpoint=self._endpoint, key=self._info.key, offset=self._position)
        for attempt in self._patience.attempt():
            with attempt:
                try:
                    return self._receive(limit)
                except errors.StorageUnavailable:
                    self.drop()
                    raise
        raise AssertionError  # the last attempt has returned or raised

    def _continued(self) -> BaseHTTPResponse:
        changed = f"an object on {self._endpoint} changed while it was read: {self._info.key}"
        try:
            response = self._reopen(offset=self._position, etag=self._info.etag)
        except errors.ArtifactFailed as exc:
            raise errors.StorageUnavailable(changed, endpoint=self._endpoint) from exc
        begins = response.headers.get("content-range", "").startswith(f"bytes {self._position}-")
        if (self._position and not begins) or etag_of(response) != self._info.etag:
            response.close()
            raise errors.StorageUnavailable(changed, endpoint=self._endpoint)
        return response


def etag_of(response: BaseHTTPResponse) -> str:
    """The answer's etag without its quotes; a weak one keeps its mark."""
    return response.headers.get("etag", "").replace('"', "")
