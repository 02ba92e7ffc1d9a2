"""A tar archive read in one pass, with bounded memory: headers as values, content as it comes.

The standard library's `tarfile` is not used for it: its reader takes extended headers of any size
into memory, recurses through chains of them, goes backwards on negative sizes (CVE-2025-8194), remembers every member, and
takes an archive that is cut between two blocks for a complete one.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import tarfile
from typing import TYPE_CHECKING

from runner import errors
from runner.storage.archive.limits import refuse
from runner.storage.archive.tarheader import BLOCK_BYTES, Header, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from runner.storage.archive.limits import UnpackLimits

_ZEROS = bytes(BLOCK_BYTES)
_EXTENSIONS_IN_A_ROW = 8  # pax, global pax, long name and long link make four
_PAX = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}
_LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_DECIMAL = re.compile(r"(-?)(\d{1,15})(?:\.(\d*))?")


class Kind(enum.Enum):
    """What an entry makes."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    HARDLINK = "hard link"


_KINDS = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.AREGTYPE: Kind.FILE,
    tarfile.CONTTYPE: Kind.FILE,
    tarfile.DIRTYPE: Kind.DIRECTORY,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.LNKTYPE: Kind.HARDLINK,
}
_REFUSED = {
    tarfile.CHRTYPE: "is a device",
    tarfile.BLKTYPE: "is a device",
    tarfile.FIFOTYPE: "is a FIFO",
    tarfile.GNUTYPE_SPARSE: "is a sparse file (pack without --sparse)",
}


@dataclasses.dataclass(slots=True)
class Entry:
    """One entry, as the archive says it: nothing of it is to be trusted."""

    name: str
    kind: Kind
    size: int
    mode: int
    mtime_ns: int
    target: str


class Blocks:
    """Pieces of any size read as a stream of exact amounts."""

    def __init__(self, pieces: Iterator[bytes | memoryview]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")

    def take(self, size: int) -> bytes:
        """Exactly `size` bytes; fewer only at the end."""
        if len(self._piece) >= size:
            taken = self._piece[:size].tobytes()
            self._piece = self._piece[size:]
            return taken
        parts = bytearray()
        self._pour(size, parts.extend)
        return bytes(parts)

    def pour(self, size: int, sink: Callable[[memoryview], object]) -> None:
        """Hand exactly `size` bytes to `sink`, uncopied. Raises `errors.ArchiveRefused` when the archive ends before."""
        if self._pour(size, sink):
            raise errors.ArchiveRefused("the archive is cut off in the middle of an entry")

    def drain(self) -> None:
        """Read to the end: what is left may be padding, but the stream and its checksum end only there."""
        self._piece = memoryview(b"")
        for _ in self._pieces:
            pass

    def _pour(self, size: int, sink: Callable[[memoryview], object]) -> int:
        while size > 0:
            if not self._piece:
                self._piece = memoryview(next(self._pieces, b""))
                if not self._piece:
                    break
            part = self._piece[:size]
            self._piece = self._piece[len(part) :]
            size -= len(part)
            sink(part)
        return size


class TarReader:
    """Iterates over the entries; the content of a file must be `pour`ed before the next entry, or it is skipped.

    Raises `errors.ArchiveRefused` for damaged or truncated archives and for kinds of entries that are never made.
    """

    def __init__(self, pieces: Iterator[bytes | memoryview], limits: UnpackLimits) -> None:
        self._blocks = Blocks(pieces)
        self._limits = limits
        self._globals: dict[str, str] = {}
        self._left = 0  # of the present entry's content
        self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        while True:
            self._skip()
            extended: dict[str, str] = {}
            header = self._header()
            for _ in range(_EXTENSIONS_IN_A_ROW):
                if header is None or not self._extend(header, extended):
                    break
                header = self._header()
            else:
                raise errors.ArchiveRefused("the archive has too many extended headers before one entry")
            if header is None:
                if extended:
                    raise errors.ArchiveRefused("the archive ends after an extended header")
                self._blocks.drain()
                return
            yield self._entry(header, {**self._globals, **extended} if self._globals else extended)

    def pour(self, sink: Callable[[memoryview], object]) -> None:
        """Hand the present entry's content to `sink`, piece by piece. Only once."""
        left, self._left = self._left, 0
        self._blocks.pour(left, sink)

    def _skip(self) -> None:
        if self._left or self._padding:
            self._blocks.pour(self._left + self._padding, _nowhere)
            self._left = self._padding = 0

    def _header(self) -> Header | None:
        """The next header block; None at the end marker."""
        block = self._blocks.take(BLOCK_BYTES)
        if block == _ZEROS:
            return None
        header = parse(block)
        if header.size < 0:
            refuse(header.name, "has a negative size")
        return header

    def _extend(self, header: Header, extended: dict[str, str]) -> bool:
        """Take in an extended header; False when it is an entry's own."""
        kind = header.type
        if kind not in _PAX and kind not in _LONG and kind != tarfile.XGLTYPE:
            return False
        if header.size > self._limits.header_bytes:
            refuse(header.name, f"is an extended header of more than {self._limits.header_bytes} bytes")
        data = self._blocks.take(header.size)
        if len(data) < header.size:
            raise errors.ArchiveRefused("the archive is cut off in an extended header")
        self._blocks.pour(-header.size % BLOCK_BYTES, _nowhere)
        if kind in _LONG:
            extended.setdefault(_LONG[kind], data.partition(b"\0")[0].decode("utf-8", "surrogateescape"))
        elif kind == tarfile.XGLTYPE:
            self._globals.update(_pax_records(data))
            if sum(map(len, self._globals.values())) > self._limits.header_bytes:
                refuse(header.name, "adds too much to the global header")
        else:
            extended.update(_pax_records(data))
        return True

    def _entry(self, header: Header, extended: Mapping[str, str]) -> Entry:
        name = extended.get("path", header.name)
        kind = _KINDS.get(header.type)
        if kind is None:
            refuse(name, _REFUSED.get(header.type, "is of an unknown kind"))
        size = header.size
        mtime_ns = header.mtime * 10**9
        if extended:
            if any(key.startswith("GNU.sparse.") for key in extended):
                refuse(name, _REFUSED[tarfile.GNUTYPE_SPARSE])
            size = _size(name, extended.get("size"), size)
            mtime_ns = _nanoseconds(extended.get("mtime"), mtime_ns)
        if kind is Kind.FILE and name.endswith("/"):
            kind = Kind.DIRECTORY  # how archives said it before there was a type for it
            self._left = size
        elif kind is Kind.FILE:
            self._left = size
        else:
            size = 0  # has no content, whatever the header says
        self._padding = -self._left % BLOCK_BYTES
        return Entry(name, kind, size, header.mode, mtime_ns, extended.get("linkpath", header.target))


def _pax_records(data: bytes) -> dict[str, str]:
    """The records (length, a space, key=value, a newline) of an extended header."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 21)
        digits = data[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        if end <= space + 1 or end > len(data) or data[end - 1 : end] != b"\n":
            raise errors.ArchiveRefused("the archive is damaged: an extended header has a bad record")
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals:
            raise errors.ArchiveRefused(
                "the archive is damaged: an extended header has a record without a value"
            )
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at = end
    return records


def _size(name: str, text: str | None, otherwise: int) -> int:
    if text is None:
        return otherwise
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(2**63))):
        refuse(name, "has a size that is not a number")
    return int(text)


def _nanoseconds(text: str | None, otherwise: int) -> int:
    """Exact, which a float is not; a time that is no number is no reason to refuse an archive."""
    match = _DECIMAL.fullmatch(text or "")
    if match is None:
        return otherwise
    sign, seconds, fraction = match.groups()
    value = int(seconds) * 10**9 + int(((fraction or "") + "000000000")[:9])
    return -value if sign else value


def _nowhere(_: memoryview) -> None:
    """Let it go."""
