"""One header block of a tar archive: ustar, GNU or older.

`tarfile.TarInfo.frombuf` does the same and more; it was half of the time that an archive of small files took.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from runner import errors

BLOCK_BYTES = 512
_OCTAL = re.compile(rb" *([0-7]*)(?:[ \0].*)?", re.DOTALL)
_BASE_256 = 0x80
_BASE_256_NEGATIVE = 0xFF


class Header(NamedTuple):
    """What one block says, as it says it."""

    name: str
    type: bytes  #: one byte, as in `tarfile.REGTYPE`
    size: int
    mode: int
    mtime: int  #: unix seconds
    target: str


def parse(block: bytes) -> Header:
    """Read one block of 512 bytes. Raises `errors.ArchiveRefused` when it is no header."""
    if len(block) != BLOCK_BYTES:
        raise errors.ArchiveRefused("the archive is cut off: it has no end marker")
    expected = _number(block[148:156])
    actual = sum(block) - sum(block[148:156]) + 8 * 0x20
    if expected != actual and expected != actual - 256 * sum(byte >> 7 for byte in block[:148] + block[156:]):
        raise errors.ArchiveRefused(
            "the archive is damaged: a header has a bad checksum"
        )  # old ones summed signed bytes
    name = _text(block[:100])
    if block[345] and block[257:262] == b"ustar" and block[262] == 0:  # GNU's own format keeps times there
        name = f"{_text(block[345:500])}/{name}"
    return Header(
        name=name,
        type=block[156:157],
        size=_number(block[124:136]),
        mode=_number(block[100:108]) & 0o7777,
        mtime=_number(block[136:148]),
        target=_text(block[157:257]) if block[157] else "",
    )


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Octal digits, or for what does not fit, GNU's base 256 with the first bit set."""
    if field[0] == _BASE_256:
        return int.from_bytes(field[1:], "big")
    if field[0] == _BASE_256_NEGATIVE:
        return int.from_bytes(field, "big", signed=True)
    digits = _OCTAL.fullmatch(field)
    if digits is None:
        raise errors.ArchiveRefused("the archive is damaged: a header has a number that is none")
    return int(digits[1] or b"0", 8)
