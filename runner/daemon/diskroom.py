"""Room on the disks that the daemon works on: kept by emptying caches; where that does not help, no work is taken."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
from typing import TYPE_CHECKING

import structlog

from runner import units

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

log = structlog.get_logger(__name__)

#: A volume is low below the smaller of these: a share of it, and an amount that is enough on any.
LOW_SHARE, LOW_BYTES = 0.02, 4 << 30
#: What has become low is low until there is so much more: a cache that was emptied for it fills again.
ENOUGH = 1.25
#: Caches are emptied when less than so many times the low mark is free: before anything is refused.
EARLY = 1.5
EVERY_SECS = 10.0
#: Caches that had nothing to give are asked again after so long.
AGAIN_SECS = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """What may be removed for room."""

    directory: Path
    make_room: Callable[[int], Awaitable[int]]  #: remove so many bytes that nobody uses; how many were


class DiskRoom:
    """Watches the volumes of some directories. `why_not` says why no work can be taken; `run` is its service."""

    def __init__(
        self,
        directories: Sequence[Path],
        caches: Sequence[Cache],
        *,
        changed: Callable[[], None],
        usage: Callable[[Path], tuple[int, int]] = lambda path: shutil.disk_usage(path)[::2],
        every_secs: float = EVERY_SECS,
    ) -> None:
        """`changed` is called when work can be taken again, or no longer. `usage`: size and free bytes of a volume."""
        # One of each volume; two that cannot be asked are two.
        volumes = {_volume(directory) or directory: directory for directory in reversed(directories)}
        self._directories = list(reversed(volumes.values()))
        self._caches = list(caches)
        self._changed = changed
        self._usage = usage
        self._every_secs = every_secs
        self._low: dict[Path, str] = {}
        self._asked_at: dict[Path, float] = {}

    @property
    def why_not(self) -> str:
        """Empty when there is room."""
        return "; ".join(self._low.values())

    async def run(self) -> None:
        """For ever."""
        while True:
            await self.look()
            await asyncio.sleep(self._every_secs)

    async def look(self) -> None:
        """See how much is free, and make room where it is little."""
        before = self.why_not
        for directory in self._directories:
            await self._look_at(directory)
        if bool(before) != bool(self.why_not):
            self._changed()

    async def _look_at(self, directory: Path) -> None:
        try:
            total, free = await asyncio.to_thread(self._usage, directory)
        except OSError as exc:
            self._low[directory] = f"the volume of {directory} cannot be used: {exc.strerror}"
            return
        low = min(int(total * LOW_SHARE), LOW_BYTES)
        if free < low * EARLY and self._may_ask(directory):
            freed = await self._make_room(directory, int(low * EARLY) - free + 1)
            log.warning(
                "little room on a disk, caches emptied",
                directory=str(directory),
                free_bytes=free,
                freed_bytes=freed,
            )
            with contextlib.suppress(OSError):  # gone meanwhile: the next look says so
                total, free = await asyncio.to_thread(self._usage, directory)
        if free < (low * ENOUGH if directory in self._low else low):
            if directory not in self._low:
                log.warning(
                    "no room on a disk, no more work is taken", directory=str(directory), free_bytes=free
                )
            self._low[directory] = (
                f"the disk is nearly full: {units.format_bytes(free)} are free on the volume of {directory}, "
                f"{units.format_bytes(int(low * ENOUGH))} are needed"
            )
        elif self._low.pop(directory, None):
            log.info("room on a disk again", directory=str(directory), free_bytes=free)

    def _may_ask(self, directory: Path) -> bool:
        now = asyncio.get_running_loop().time()
        if now < self._asked_at.get(directory, 0.0):
            return False
        self._asked_at[directory] = now + AGAIN_SECS
        return True

    async def _make_room(self, directory: Path, bytes_needed: int) -> int:
        """Of the caches that lie on the same volume."""
        freed = 0
        for cache in self._caches:
            if freed < bytes_needed and _volume(cache.directory) == _volume(directory) != 0:
                try:
                    freed += await cache.make_room(bytes_needed - freed)
                except OSError as exc:
                    log.warning("a cache cannot be emptied", directory=str(cache.directory), error=str(exc))
        return freed


def _volume(directory: Path) -> int:
    try:
        return os.stat(directory).st_dev  # noqa: PTH116
    except OSError:
        return 0
