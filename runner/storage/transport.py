"""HTTP as object stores need it: one pool of connections, a deadline on every wait, and retries.

Everything that a server's absence can look like (no connection, a stall, a reset, 5xx) leaves here as
`errors.StorageUnavailable`; every other answer that is no success leaves as `Refusal`, for the adapter to translate.
"""

from __future__ import annotations

import dataclasses
import ssl
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import stamina
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    LocationValueError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from runner import errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from urllib3.response import BaseHTTPResponse

    from runner import config

_POOL_SIZE = 32  # idle connections kept per server; more may be open at once
_SERVERS = 64  # servers of which connections are kept
_ANSWER_BYTES = 16 << 20  # of an answer that is not an object's content; a page of a listing has about 1 MiB
_REFUSAL_BYTES = 64 << 10
_SLICE_BYTES = 256 << 10  # sent under one time limit
_BUSY = frozenset(
    {408, 429, 500, 502, 503, 504, 507, 509}
)  # other 5xx (501, 505) would be the same next time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a server is waited for, and how often it is asked again."""

    connect_secs: float = 10.0  #: also for each 256 KiB on their way to the server
    stall_secs: float = 30.0  #: without a byte from the server
    attempts: int = 4  #: of each request, and of resuming a download at one place
    retry_secs: float = 60.0  #: after so long no further attempt is begun

    def attempt(self) -> Iterator[AbstractContextManager[object]]:
        """Contexts to try something in, until one ends without `errors.StorageUnavailable`; the last one's is raised."""
        return iter(
            stamina.retry_context(
                on=errors.StorageUnavailable,
                attempts=self.attempts,
                timeout=self.retry_secs,
                wait_initial=0.2,
                wait_jitter=0.3,
            )
        )


class Refusal(Exception):  # noqa: N818 - an answer, not an error of ours; it never leaves the adapters
    """An answer of 3xx or 4xx. Its text holds neither address nor content."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"status {status}")
        self.status = status
        self.headers = headers
        self.body = body  #: its first 64 KiB


class Transport(urllib3.PoolManager):
    """Keep-alive connections to any number of servers, shared by the clients of all stores. Thread-safe.

    It is a `urllib3.PoolManager` because the S3 client takes nothing else. Redirects are not followed.
    """

    def __init__(self, *, patience: Patience | None = None, tls: config.S3 | None = None) -> None:
        self.patience = patience or Patience()
        super().__init__(
            num_pools=_SERVERS,
            maxsize=_POOL_SIZE,
            timeout=urllib3.Timeout(connect=self.patience.connect_secs, read=self.patience.stall_secs),
            retries=False,
            ssl_context=_tls_context(tls),
        )
        self.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def urlopen(  # type: ignore[override]  # as in urllib3 itself
        self, method: str, url: str, redirect: bool = False, **kw: Any
    ) -> BaseHTTPResponse:
        """One request, tried again while the server is away. A body must be bytes.

        With `preload_content=False` the content is the caller's to read. Raises `Refusal`, `errors.StorageUnavailable`,
        and `errors.UnsupportedRequest` for an address that is none.
        """
        del redirect
        first: errors.StorageUnavailable | None
        try:
            return self.once(method, url, **kw)
        except errors.StorageUnavailable as exc:
            first = exc  # only now is what counts and waits worth its price
        for attempt in self.patience.attempt():
            with attempt:
                if first is not None:
                    failed, first = first, None
                    raise failed
                return self.once(method, url, **kw)
        raise AssertionError  # the last attempt has returned or raised

    def once(self, method: str, url: str, *, preload_content: bool = True, **kw: Any) -> BaseHTTPResponse:
        """As `urlopen`, tried once."""
        endpoint = urlsplit(url).netloc
        try:
            response = super().urlopen(
                method, url, redirect=False, preload_content=False, decode_content=False, **kw
            )
            if response.status >= 300:  # noqa: PLR2004 - what HTTP calls success ends here
                _refuse(response, endpoint)
            return _loaded(response, endpoint) if preload_content else response
        except LocationValueError as exc:
            raise errors.UnsupportedRequest(f"{endpoint!r} is no address of a server") from exc
        except HTTPError as exc:
            raise unavailable(endpoint, exc) from exc

    def clear(self) -> None:
        """Nothing: an S3 client clears the pool it was lent when it is collected, but this one serves others too."""

    def close(self) -> None:
        """Close the idle connections; those in use close when they are given back."""
        super().clear()


def unavailable(endpoint: str, exc: HTTPError) -> errors.StorageUnavailable:
    """What went wrong, in words that hold no address but the endpoint's (urllib3's own hold signed URLs)."""
    if isinstance(exc, NameResolutionError):
        why = "its name cannot be resolved"
    elif isinstance(exc, NewConnectionError):
        why = f"no connection ({getattr(exc.__cause__, 'strerror', None) or 'refused'})"
    elif isinstance(exc, ConnectTimeoutError):
        why = "no connection within the time limit"
    elif isinstance(exc, ReadTimeoutError):
        why = "no answer within the time limit"
    elif isinstance(exc, SSLError):
        why = (
            f"no TLS connection ({getattr(exc.args[0], 'reason', None) or 'failed'})"
            if exc.args
            else "no TLS connection"
        )
    else:
        why = f"the connection broke ({type(exc).__name__})"
    return errors.StorageUnavailable(
        f"the storage server {endpoint} does not answer: {why}", endpoint=endpoint
    )


def _refuse(response: BaseHTTPResponse, endpoint: str) -> None:
    body = response.read(_REFUSAL_BYTES, decode_content=False)
    response.close()  # a body read to its end has given the connection back already
    if response.status in _BUSY:
        raise errors.StorageUnavailable(
            f"{endpoint} answers with status {response.status}", endpoint=endpoint
        )
    raise Refusal(response.status, response.headers, body)


def _loaded(response: BaseHTTPResponse, endpoint: str) -> BaseHTTPResponse:
    content = bytearray()
    for chunk in response.stream(_REFUSAL_BYTES, decode_content=False):
        content += chunk
        if len(content) > _ANSWER_BYTES:
            response.close()
            raise errors.StorageUnavailable(f"{endpoint} answers without end", endpoint=endpoint)
    return urllib3.HTTPResponse(
        bytes(content),
        headers=response.headers,
        status=response.status,
        preload_content=False,
        decode_content=False,
    )


def _tls_context(tls: config.S3 | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    try:
        if tls is not None and tls.ca is not None:
            context.load_verify_locations(tls.ca)
        if tls is not None and tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except OSError as exc:
        raise errors.UsageError(
            f"the TLS files for S3 (--s3-ca, --s3-cert, --s3-key) cannot be used: {exc}"
        ) from exc
    return context


class _Sliced(HTTPConnection):
    """Sends large bodies slice by slice: a socket's time limit covers one `sendall` as a whole, however much it sends."""

    def send(self, data: Any) -> None:
        if not isinstance(data, bytes) or len(data) <= _SLICE_BYTES:
            super().send(data)
            return
        view = memoryview(data)
        for start in range(0, len(view), _SLICE_BYTES):
            super().send(view[start : start + _SLICE_BYTES])


class _SlicedTls(_Sliced, HTTPSConnection):
    """The same over TLS."""


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Sliced


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SlicedTls
