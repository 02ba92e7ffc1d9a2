"""`url` artifacts: read-only inputs from any web server."""

from __future__ import annotations

import contextlib
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urljoin, urlsplit

from runner import errors
from runner.storage.base import Forbidden, Location, NotFound, ObjectInfo, ObjectStore, ObjectStream
from runner.storage.download import Download, etag_of
from runner.storage.transport import Refusal, Transport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from urllib3.response import BaseHTTPResponse

_REDIRECTS = 5
_MOVED = frozenset({301, 302, 303, 307, 308})
_ABSENT = frozenset({404, 410})
_REFUSED = frozenset({401, 402, 403, 407, 451})


class HttpStore(ObjectStore):
    """One web server. A key is the rest of the URL: path, and query if there is one, which no error text repeats."""

    def __init__(self, location: Location, transport: Transport) -> None:
        self._base = f"{location.scheme}://{location.endpoint}/"
        self._transport = transport

    def stat(self, key: str) -> ObjectInfo:
        """As `ObjectStore.stat`. By GET, for a signed URL allows no HEAD; the content is left unread."""
        with self.open(key) as stream:
            return stream.info

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[ObjectStream]:
        """As `ObjectStore.open`; `info.size` is -1 where the server does not tell. Up to 5 redirects are followed."""
        response = self._get(key, {})
        modified = None
        with contextlib.suppress(ValueError, TypeError):
            modified = parsedate_to_datetime(response.headers.get("last-modified", ""))
        resumes = response.headers.get("accept-ranges", "").lower() == "bytes"
        info = ObjectInfo(
            key=key,
            size=int(response.headers.get("content-length", -1)),
            etag=etag_of(response) if resumes else "",
            modified=modified,
        )

        def reopen(*, offset: int, etag: str) -> BaseHTTPResponse:
            return self._get(key, {"If-Match": f'"{etag}"', "Range": f"bytes={offset}-"})

        endpoint = urlsplit(self._base).netloc
        download = Download(
            response, info, endpoint=endpoint, reopen=reopen, patience=self._transport.patience
        )
        with contextlib.closing(download):
            yield download

    def put(self, key: str, source: BinaryIO, size: int) -> None:
        """Raises `errors.UnsupportedRequest`."""
        del source, size
        raise errors.UnsupportedRequest(
            f"nothing can be stored at {self._shown(key)}: http addresses are read-only"
        )

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Raises `errors.UnsupportedRequest`."""
        raise errors.UnsupportedRequest(
            f"{self._shown(prefix)} cannot be listed: http addresses can only be read"
        )

    def reachable(self) -> bool:
        """As `ObjectStore.reachable`; 5xx is no answer."""
        try:
            self._transport.once("HEAD", self._base, timeout=3.0)
        except Refusal:
            return True
        except errors.RunnerError:
            return False
        return True

    def _get(self, key: str, headers: dict[str, str]) -> BaseHTTPResponse:
        url = self._base + key
        for _ in range(_REDIRECTS + 1):
            try:
                return self._transport.urlopen(
                    "GET", url, headers={"Accept-Encoding": "identity", **headers}, preload_content=False
                )
            except Refusal as refusal:
                url = self._next(refusal, url, key)
        raise errors.ArtifactFailed(f"{self._shown(key)}: more than {_REDIRECTS} redirects")

    def _next(self, refusal: Refusal, url: str, key: str) -> str:
        """Where the server sends us. Raises what its refusal means when it is no redirect."""
        said = f"{self._shown(key)}: status {refusal.status}"
        if refusal.status in _ABSENT:
            raise NotFound(said) from refusal
        if refusal.status in _REFUSED:
            raise Forbidden(said) from refusal
        target = refusal.headers.get("location") if refusal.status in _MOVED else None
        if not target:
            raise errors.ArtifactFailed(said) from refusal
        try:
            url = urljoin(url, target)
            allowed = urlsplit(url).scheme in {"http", "https"}
        except ValueError:
            allowed = False
        if not allowed:
            raise errors.ArtifactFailed(f"{said}, to an address that is no web address") from refusal
        return url

    def _shown(self, key: str) -> str:
        return self._base + key.partition("?")[0]
