"""A zip archive, read through `zipfile` from a seekable file: only its headers and its inflating are trusted, not its names."""

from __future__ import annotations

import datetime as dt
import io
import os
import stat
import struct
import zipfile
import zlib
from typing import IO, TYPE_CHECKING

from runner import errors
from runner.storage.archive.limits import refuse, shown
from runner.storage.archive.tarread import Entry, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from runner.storage.archive.limits import Budget

_READ_BYTES = 256 << 10
_ENCRYPTED = 0x1
_UNIX = 3
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # the others' decoders take memory without a limit
_LINK_BYTES = 4096
_KINDS = {0: Kind.FILE, stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK}
_DAMAGE = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    LookupError,
    OverflowError,
    OSError,
)  # fmt: skip - what `zipfile` raises on bytes of a stranger's choice, as fuzzing showed


class _Bounded(io.FileIO):
    """A file that hands out no more than so much at once: `zipfile` reads the central directory whole."""

    limit_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # the last 64 KiB, where the end record must be
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > self.limit_bytes:
            raise errors.ArchiveRefused(f"the archive's directory is larger than {self.limit_bytes} bytes")
        return super().read(size) or b""


class ZipReader:
    """Iterates over the entries of a zip in an open file, as `TarReader` does over those of a tar.

    Raises `errors.ArchiveRefused` for damaged archives, encrypted entries and kinds that are never made.
    """

    def __init__(self, file: IO[bytes], budget: Budget) -> None:
        raw = _Bounded(file.fileno(), closefd=False)
        raw.limit_bytes = budget.limits.directory_bytes
        self._budget = budget
        self._present: zipfile.ZipInfo | None = None
        try:
            self._zip = zipfile.ZipFile(raw)
        except _DAMAGE as error:
            raise _damaged(error) from error

    def __iter__(self) -> Iterator[Entry]:
        for info in self._zip.infolist():
            self._present = info
            yield self._entry(info)

    def pour(self, sink: Callable[[memoryview], object]) -> None:
        """Hand the present entry's content to `sink`, piece by piece, checked against its checksum."""
        info = self._present
        assert info is not None
        try:
            content = self._zip.open(info)
        except _DAMAGE as error:
            raise _damaged(error) from error
        with content:
            while True:
                try:
                    piece = content.read(_READ_BYTES)
                except _DAMAGE as error:
                    raise _damaged(error) from error
                if not piece:
                    return
                self._budget.take(0)
                self._budget.decode(len(piece))
                sink(memoryview(piece))

    def _entry(self, info: zipfile.ZipInfo) -> Entry:
        name = info.orig_filename
        if "\\" in name:
            refuse(name, "has a backslash in its name")
        if info.flag_bits & _ENCRYPTED:
            refuse(name, "is encrypted")
        if info.compress_type not in _METHODS:
            refuse(name, f"is compressed with method {info.compress_type}, which is not supported")
        mode = info.external_attr >> 16 if info.create_system == _UNIX else 0
        kind = self._kind(name, mode)
        target = ""
        if kind is Kind.SYMLINK:
            parts = bytearray()
            if info.file_size > _LINK_BYTES:
                refuse(name, "is a link with a target that is too long")
            self.pour(parts.extend)
            target = parts.decode("utf-8", "surrogateescape")
        permissions = stat.S_IMODE(mode) or (0o755 if kind is Kind.DIRECTORY else 0o644)
        return Entry(name, kind, info.file_size, permissions, _nanoseconds(info), target)

    @staticmethod
    def _kind(name: str, mode: int) -> Kind:
        if name.endswith("/"):
            return Kind.DIRECTORY
        kind = _KINDS.get(stat.S_IFMT(mode))
        if kind is None:
            refuse(name, "is a device, a FIFO or a socket")
        return kind


def _damaged(error: Exception) -> errors.ArchiveRefused:
    return errors.ArchiveRefused(
        f"the archive is damaged: {shown(str(error))}"
    )  # `zipfile` quotes what it read


def _nanoseconds(info: zipfile.ZipInfo) -> int:
    """Zip knows the local time of wherever it was packed; this host's zone is the best guess."""
    try:
        return int(dt.datetime(*info.date_time).astimezone().timestamp()) * 10**9
    except (ValueError, OverflowError, OSError):
        return 0
