"""Keeps the environment cache within its bytes: what has expired goes, then packages, then what was used longest ago."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from runner.executors import layout, locks

if TYPE_CHECKING:
    from runner.executors.uvtool import Uv

log = structlog.get_logger(__name__)

EVERY_SECS = 300.0  #: at most so often after builds: it looks at every file


class Evictor:
    """Removes from a cache directory what may go. What is in use by any daemon stays."""

    def __init__(self, cache: Path, quota_bytes: int, uv: Uv) -> None:
        self._entries = cache / "entries"
        self._locks = cache / "locks"
        self._cache = cache
        self._quota_bytes = quota_bytes
        self._uv = uv
        self._one = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._last: float | None = None

    def soon(self) -> None:
        """Starts `run` beside what the caller does, unless it ran lately."""
        now = time.monotonic()
        if self._last is None or now - self._last > EVERY_SECS:
            self._last = now
            self._task = asyncio.create_task(self._quietly(), name="evict environments")

    async def run(self, bytes_needed: int = 0) -> int:
        """Removes leftovers and expired environments; over the quota the package cache, then the least used ones.

        With `bytes_needed` as if the quota were so much below what is used. How many bytes were freed.
        """
        async with self._one:
            before = await asyncio.to_thread(usage, self._cache)
            used = await asyncio.to_thread(self._tidy)
            quota = min(self._quota_bytes, before - bytes_needed) if bytes_needed else self._quota_bytes
            if used <= quota:
                return before - used
            with tempfile.TemporaryDirectory(prefix="uv-clean-") as scratch:
                await self._uv.clean(Path(scratch))
            removed = await asyncio.to_thread(self._shrink, quota)
            used = await asyncio.to_thread(usage, self._cache)
            log.info("environments removed", quota_bytes=max(0, quota), used_bytes=used, removed=removed)
            return before - used

    async def _quietly(self) -> None:
        try:
            await self.run()
        except OSError as exc:  # another daemon may be at it too; the next build tries again
            log.warning("environments not evicted", error=str(exc))

    def _tidy(self) -> int:
        now = time.time()
        for path in self._entries.glob(".old-*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self._entries.glob(".new-*"):
            with locks.held_if_free(self._locks / f"{path.name.split('-')[1]}.build") as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)
        for path in _oldest_first(self._entries):
            if _expires(path) < now:
                self._remove(path)
        return usage(self._cache)

    def _shrink(self, quota_bytes: int) -> list[str]:
        removed = []
        for path in _oldest_first(self._entries):
            if usage(self._cache) <= quota_bytes:
                break
            if self._remove(path):
                removed.append(path.name)
        return removed

    def _remove(self, entry: Path) -> bool:
        """Removes an environment that nobody uses; False when somebody does."""
        with locks.held_if_free(self._locks / f"{entry.name}.use") as free:
            if free:
                doomed = entry.with_name(f".old-{entry.name}-{os.getpid()}")
                entry.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
            return free


def usage(folder: Path) -> int:
    """Bytes on disk below `folder`; a file with several links below it counts once. Blocks: it looks at every file."""
    total = 0.0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                status = os.lstat(f"{place}/{name}")
            except FileNotFoundError:
                continue
            total += status.st_blocks * 512 / status.st_nlink
    return round(total)


def _expires(entry: Path) -> float:
    """When it does (wall clock); 0 when its manifest was damaged, by a power cut say."""
    try:
        expires = json.loads((entry / layout.MANIFEST).read_bytes())["expires"]
        return math.inf if expires is None else float(expires)
    except (ValueError, TypeError, KeyError):
        return 0.0


def _oldest_first(entries: Path) -> list[Path]:
    used = [
        (manifest.stat().st_mtime_ns, manifest.parent) for manifest in entries.glob(f"*/{layout.MANIFEST}")
    ]
    return [path for _, path in sorted(used)]
