"""What an object is, by its first bytes alone: names lie (INTEROP.md 3.1: `.tar.bz2` that is a plain tar)."""

from __future__ import annotations

import dataclasses
import enum
import io

from runner import errors
from runner.storage.archive.decode import Compression, Feed, decoded
from runner.storage.archive.limits import Budget, UnpackLimits
from runner.storage.archive.tarheader import BLOCK_BYTES, parse

HEAD_BYTES = 1 << 20  #: what `sniff` wants to see: a bzip2 block (900 kB) says nothing before it is complete
_WINDOW_BYTES = (
    64 << 10
)  # of decompressed data: an archive without entries is a run of zeros, ten blocks as a rule

_MAGIC = {
    b"\x1f\x8b": Compression.GZIP,
    b"BZh": Compression.BZIP2,
    b"\xfd7zXZ\x00": Compression.XZ,
    b"\x5d\x00\x00": Compression.LZMA,
}
_FOREIGN = {
    b"\x89LZO\x00\r\n\x1a\n": "lzop",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
}


class Container(enum.StrEnum):
    """What holds the entries."""

    TAR = "tar"
    ZIP = "zip"
    FILE = "file"  #: nothing: it is one file


@dataclasses.dataclass(frozen=True)
class Format:
    """What an object is."""

    container: Container
    compression: Compression = Compression.NONE
    flaw: str = (
        ""  #: why something that began as an archive cannot be one, for a person; empty when nothing is wrong
    )

    def __str__(self) -> str:
        return (
            self.container if self.compression is Compression.NONE else f"{self.container}+{self.compression}"
        )


def sniff(head: bytes, *, complete: bool) -> Format:
    """Decide by the first `HEAD_BYTES` of an object; `complete` says that there are no more.

    A compressed file is an archive only when a tar is inside; otherwise it is a file. Raises nothing.
    """
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return Format(Container.ZIP)
    compression = next((each for magic, each in _MAGIC.items() if head.startswith(magic)), None)
    if compression is not None and not _has_header(head):
        return _inside(head, compression)
    if _is_tar(head, complete=complete):
        return Format(Container.TAR)
    foreign = next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), None)
    return Format(Container.FILE, flaw=f"{foreign} is not supported" if foreign else "")


def _inside(head: bytes, compression: Compression) -> Format:
    budget = Budget(UnpackLimits(total_bytes=0), None)
    begin, ended, flaw = bytearray(), False, ""
    try:
        for piece in decoded(Feed(io.BytesIO(head), budget), compression, budget):
            begin += piece
            if len(begin) > _WINDOW_BYTES:
                break
        else:
            ended = True
    except errors.ArchiveRefused as refused:  # as a rule nothing but the end of the head
        flaw = str(refused)
    if _is_tar(bytes(begin), complete=ended):
        return Format(Container.TAR, compression)
    return Format(Container.FILE, compression, flaw if len(begin) < BLOCK_BYTES else "")


def _is_tar(begin: bytes, *, complete: bool) -> bool:
    if (
        complete
        and 2 * BLOCK_BYTES <= len(begin) <= _WINDOW_BYTES
        and len(begin) % BLOCK_BYTES == 0
        and not any(begin)
    ):
        return True  # no entries: nothing but the end marker
    return begin[257:262] == b"ustar" or _has_header(begin)


def _has_header(begin: bytes) -> bool:
    try:
        parse(begin[:BLOCK_BYTES])
    except errors.ArchiveRefused:
        return False
    return True
