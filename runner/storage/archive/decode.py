"""From compressed bytes to bytes, a piece at a time: gzip, bzip2, xz and lzma, of one member or of many."""

from __future__ import annotations

import bz2
import enum
import lzma
import zlib
from typing import TYPE_CHECKING, Protocol

from runner import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from runner.storage.archive.limits import Budget

PLAIN_READ_BYTES = 1 << 20  #: asked of the stream at once, uncompressed
_READ_BYTES = (
    64 << 10
)  # compressed; small, for a decoder copies what follows a member, and members may be tiny
_PIECE_BYTES = 1 << 20  # what one step of a decoder may make


class Compression(enum.StrEnum):
    """How an archive is compressed."""

    NONE = "none"
    GZIP = "gzip"
    BZIP2 = "bzip2"
    XZ = "xz"
    LZMA = "lzma"  #: the format before xz, without a checksum


class Readable(Protocol):
    """What an archive is read from; `storage.base.ObjectStream` is one."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes, b"" at the end."""


class Feed:
    """A stream of which the first bytes have been looked at already. What the stream raises passes unchanged."""

    def __init__(self, stream: Readable, budget: Budget, *, head: bytes = b"") -> None:
        self._stream = stream
        self._head = memoryview(head)
        self._budget = budget

    def read(self, size: int) -> bytes | memoryview:
        """Up to `size` bytes, empty at the end. Raises `Stopped`."""
        if self._head:
            piece: bytes | memoryview = self._head[:size]
            self._head = self._head[size:]
        else:
            piece = self._stream.read(size)
        self._budget.take(len(piece))
        return piece


class _Decoder(Protocol):
    """What `bz2.BZ2Decompressor` and `lzma.LZMADecompressor` have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes: ...


class _Gzip:
    """zlib in the manner of `bz2.BZ2Decompressor`; it checks the length and the checksum at a member's end."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes:
        piece = self._zlib.decompress(data or self._zlib.unconsumed_tail, max_length)
        # A full piece may leave more inside zlib, even when all input is consumed.
        self.needs_input = not self._zlib.unconsumed_tail and len(piece) < max_length
        return piece


def _maker(compression: Compression, memory_bytes: int) -> Callable[[], _Decoder]:
    if compression is Compression.GZIP:
        return _Gzip
    if compression is Compression.BZIP2:
        return bz2.BZ2Decompressor
    form = lzma.FORMAT_XZ if compression is Compression.XZ else lzma.FORMAT_ALONE
    return lambda: lzma.LZMADecompressor(form, memlimit=memory_bytes)


def decoded(feed: Feed, compression: Compression, budget: Budget) -> Iterator[bytes | memoryview]:
    """The decompressed bytes in non-empty pieces of at most 1 MiB.

    Raises `errors.ArchiveRefused` on damaged or truncated data, on what follows the last member (zeros may), when a decoder
    wants too much memory, and on a bomb; `Stopped`; and whatever the stream raises, unchanged.
    """
    if compression is Compression.NONE:
        while piece := feed.read(PLAIN_READ_BYTES):
            yield piece
        return
    make = _maker(compression, budget.limits.decoder_bytes)
    waiting = feed.read(_READ_BYTES)
    while waiting:
        decoder = make()
        while not decoder.eof:
            if not waiting and decoder.needs_input and not (waiting := feed.read(_READ_BYTES)):
                raise errors.ArchiveRefused(f"the archive ends in the middle of its {compression} data")
            piece = _step(decoder, waiting, compression)
            waiting = b""
            if piece:
                budget.decode(len(piece))
                yield piece
        waiting = decoder.unused_data.lstrip(b"\0")
        while not waiting and (more := feed.read(_READ_BYTES)):
            waiting = bytes(more).lstrip(b"\0")


def _step(decoder: _Decoder, data: bytes | memoryview, compression: Compression) -> bytes:
    try:
        return decoder.decompress(data, _PIECE_BYTES)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
        raise errors.ArchiveRefused(f"the archive's {compression} data is damaged: {error}") from error
