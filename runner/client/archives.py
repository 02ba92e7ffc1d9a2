"""Packs what an experiment brings along, as the new client does (INTEROP.md 3.1): a plain tar, named by its own SHA-256."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import tarfile
import tempfile
from typing import TYPE_CHECKING, BinaryIO, Self, cast

from runner import errors
from runner.storage.archive import PackStyle, pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

#: Smaller archives never touch the disk.
_SPOOL_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Archive:
    """A packed directory or file, ready to be read from its beginning."""

    file: BinaryIO
    size: int  #: bytes
    digest: str  #: SHA-256 of the bytes, hexadecimal
    warnings: tuple[str, ...] = ()  #: what was left out, one sentence each


@contextlib.contextmanager
def packed(source: Path, *, progress: Callable[[int], None] = lambda _: None) -> Iterator[Archive]:
    """An archive of a directory or a single file, in a temporary file that is gone afterwards. Blocking, streams.

    A directory's entries have no leading `./`, a single file is `./<name>`: both as the client has them. `progress` is told of
    bytes as they are packed. Raises errors.UsageError when `source` cannot be read.
    """
    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as spool:
        out = _Hashing(cast("BinaryIO", spool), progress)
        try:
            if source.is_dir():
                warnings = pack(source, cast("BinaryIO", out), style=PackStyle.BARE).warnings
            else:
                warnings = ()
                _pack_file(source, out)
        except OSError as exc:
            raise errors.UsageError(f"{source} cannot be packed: {exc.strerror or exc}") from exc
        size = spool.tell()
        spool.seek(0)
        yield Archive(
            file=cast("BinaryIO", spool), size=size, digest=out.digest.hexdigest(), warnings=warnings
        )


def _pack_file(source: Path, out: _Hashing) -> None:
    with (
        source.open("rb") as content,
        tarfile.open(
            fileobj=cast("BinaryIO", out), mode="w|", format=tarfile.PAX_FORMAT, dereference=True
        ) as tar,
    ):
        entry = tar.gettarinfo(arcname=f"./{source.name}", fileobj=content)
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        tar.addfile(entry, content)


class _Hashing:
    """A sink that hashes, counts and passes on."""

    def __init__(self, sink: BinaryIO, progress: Callable[[int], None]) -> None:
        self.digest = hashlib.sha256()
        self._sink = sink
        self._progress = progress

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self._progress(len(data))
        return self._sink.write(data)


class Counted(io.RawIOBase):
    """A source that tells how far it was read. Going back, as a retry does, counts back."""

    def __init__(self, source: BinaryIO, progress: Callable[[int], None]) -> None:
        self._source = source
        self._progress = progress
        self._told = 0

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def read(self, size: int = -1, /) -> bytes:
        """As a file's."""
        data = self._source.read(size)
        self._tell_progress()
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """As a file's. A look at the end is no progress: only reads tell."""
        return self._source.seek(offset, whence)

    def tell(self) -> int:
        """As a file's."""
        return self._source.tell()

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def _tell_progress(self) -> None:
        where = self._source.tell()
        self._progress(where - self._told)
        self._told = where
