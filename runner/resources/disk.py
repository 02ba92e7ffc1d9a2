"""How much disk the directory of a run takes, measured while strangers' programs write in it."""

from __future__ import annotations

import dataclasses
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK_BYTES = 512  #: unit of st_blocks, whatever the file system's is
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Directories that wait to be looked into, and files with several names that are remembered: what a measurement may hold.
MAX_WAITING = 100_000
MAX_LINKED = 200_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found."""

    bytes: int  #: on disk: of a file with holes what is there, of one with several names once
    entries: int
    complete: bool  #: False: there is more, in places that cannot be looked into


def measure(top: Path, *, max_entries: int | None = None) -> Measured:
    """Add up what is below `top`. Blocks, some microseconds for each entry; the memory that it takes is bounded.

    No link is followed and no other file system entered. What vanishes meanwhile counts or not. With `max_entries` it
    ends there, not complete.
    """
    walk = _Walk(max_entries)
    walk.run(os.fspath(top))
    return Measured(bytes=walk.blocks * _BLOCK_BYTES, entries=walk.entries, complete=walk.complete)


class _Walk:
    def __init__(self, max_entries: int | None) -> None:
        self.blocks = 0
        self.entries = 0
        self.complete = True
        self._max_entries = max_entries
        self._device: int | None = None
        self._waiting: list[str] = []
        self._linked: set[int] = set()

    def run(self, top: str) -> None:
        self._waiting.append(top)
        while self._waiting:
            if self._full:
                self.complete = False
                return
            self._directory(self._waiting.pop())

    @property
    def _full(self) -> bool:
        return self._max_entries is not None and self.entries > self._max_entries

    def _directory(self, path: str) -> None:
        try:
            fd = os.open(path, _OPEN)
        except FileNotFoundError:
            return
        except OSError:  # deeper than a path can say, or a link by now
            self.complete = False
            return
        try:
            info = os.fstat(fd)
            if self._device is None:
                self._device = info.st_dev
                self.blocks += info.st_blocks
            if info.st_dev != self._device:
                return
            with os.scandir(fd) as listing:
                for entry in listing:
                    if self._full:
                        self.complete = False
                        return
                    try:
                        self._entry(path, entry.name, entry.stat(follow_symlinks=False))
                    except FileNotFoundError:
                        continue
        except OSError:
            self.complete = False
        finally:
            os.close(fd)

    def _entry(self, parent: str, name: str, info: os.stat_result) -> None:
        self.entries += 1
        if stat.S_ISDIR(info.st_mode):
            if len(self._waiting) < MAX_WAITING:
                self._waiting.append(f"{parent}/{name}")
            else:
                self.complete = False
        elif info.st_nlink > 1:
            if info.st_ino in self._linked:
                return
            if len(self._linked) < MAX_LINKED:
                self._linked.add(info.st_ino)
            else:  # its share for each name: the same in the end, when all of them are here
                self.blocks += info.st_blocks // info.st_nlink
                return
        self.blocks += info.st_blocks
