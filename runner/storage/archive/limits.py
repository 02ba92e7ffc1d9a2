"""How much one archive may ask of this machine, and the running count of what it has asked for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NoReturn

from runner import errors

if TYPE_CHECKING:
    import threading

_SHOWN_CHARS = 120


class Stopped(errors.RunnerError):
    """The caller set its `cancelled` event. Nothing is left behind, and nobody is to blame: not an attempt."""

    counts = False
    reason = errors.Reason.CANCELLED


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnpackLimits:
    """What an archive may cost. More is `errors.ArchiveRefused`: nothing is ever cut to fit (INTEROP.md 3.5)."""

    total_bytes: int  #: of content written; what the message asked for as disk
    entries: int = 1_000_000  #: files, links and directories, those included that only a longer name implies
    name_bytes: int = 4096  #: of one whole name
    depth: int = 128  #: components of one name
    header_bytes: int = (
        1 << 20
    )  #: of one extended header (pax records, GNU long names); they are held in memory
    directory_bytes: int = 32 << 20  #: of a zip's central directory, which is held in memory
    decoder_bytes: int = 128 << 20  #: memory that an xz or lzma decoder may take; `xz -9` takes 65 MiB
    ratio: int = (
        250  #: decompressed bytes for each compressed one, asked once there are `ratio_floor_bytes` of them
    )
    ratio_floor_bytes: int = 256 << 20


class Budget:
    """Counts one unpacking against its limits; each method refuses the archive that exceeds them."""

    def __init__(self, limits: UnpackLimits, cancelled: threading.Event | None) -> None:
        self.limits = limits
        self.entries = 0
        self.bytes = 0  #: of content
        self.taken = 0  #: bytes that came from the stream
        self._decoded = 0
        self._cancelled = cancelled

    def take(self, size: int) -> None:
        """`size` bytes came from the stream. Raises `Stopped` once the caller wants no more."""
        self.taken += size
        if self._cancelled is not None and self._cancelled.is_set():
            raise Stopped("the archive was not wanted any more")

    def decode(self, size: int) -> None:
        """The decoder made `size` bytes of what was taken so far."""
        self._decoded += size
        if self._decoded > self.limits.ratio_floor_bytes and self._decoded > self.taken * self.limits.ratio:
            raise errors.ArchiveRefused(
                f"the archive expands to more than {self.limits.ratio} times its size: it looks like a bomb",
            )

    def enter(self, name: str) -> None:
        """One more thing is made in the directory."""
        self.entries += 1
        if self.entries > self.limits.entries:
            refuse(name, f"is one more than the {self.limits.entries} that an archive may bring")

    def write(self, size: int, name: str) -> None:
        """`size` bytes of content are about to be written."""
        self.bytes += size
        if self.bytes > self.limits.total_bytes:
            refuse(name, f"makes the content larger than the {self.limits.total_bytes} bytes allowed")


def shown(name: str) -> str:
    """A name of a stranger's choice made fit for logs: quoted, escaped, shortened."""
    quoted = ascii(name if len(name) <= _SHOWN_CHARS else name[:_SHOWN_CHARS] + "...")
    return quoted if len(quoted) <= 2 * _SHOWN_CHARS else quoted[: 2 * _SHOWN_CHARS] + "...'"


def refuse(name: str, rule: str) -> NoReturn:
    """Raise `errors.ArchiveRefused`, with the entry and the rule that it breaks."""
    raise errors.ArchiveRefused(f"the archive's entry {shown(name)} {rule}")
