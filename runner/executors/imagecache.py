"""Images fetched from servers, as files that the runs and daemons of one cache directory share.

::

    <cache>/images/<key>-<time>.sif     an image, complete; <time> is when it was fetched (hex), its mtime when it was last used
    <cache>/images/.new-<key>-*/        being fetched; whoever holds the key's build lock may remove it
    <cache>/locks/<key>.build           held alone by who fetches it
    <cache>/locks/<key>-<time>.use      held shared by each run on it, alone by who removes it
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.executors import locks
from runner.executors.singleflight import SingleFlight

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from runner.executors.imageref import Reference

log = structlog.get_logger(__name__)

UNPINNED_SECS = 86_400  #: for so long a reference that is no digest means what was fetched for it
_VERSION = 1  #: part of every key
_ATTEMPTS = 5  #: to hold an image that other daemons evict at the same moment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lease:
    """An image that stays where it is while the lease is open."""

    path: Path
    cached: bool  #: it was there already
    warning: str = ""


@dataclasses.dataclass(frozen=True, order=True)
class _Entry:
    fetched: int  #: wall clock
    path: Path


class ImageCache:
    """Gives out images; fetches each once. All methods belong to one event loop.

    `fetch(reference, target, log_file)` makes the file `target`, whose directory is its own for all that it writes.
    """

    def __init__(
        self,
        directory: Path,
        quota_bytes: int,
        fetch: Callable[[Reference, Path, Path], Awaitable[None]],
    ) -> None:
        self._images = directory / "images"
        self._locks = directory / "locks"
        self._quota_bytes = quota_bytes
        self._fetch = fetch
        self._flights = SingleFlight[Path]("fetch image")
        self._one = asyncio.Lock()
        self._evicting: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def lease(self, reference: Reference, log_file: Path) -> AsyncIterator[Lease]:
        """The image, for as long as the context is open: it is not removed until then.

        Fetched when it is not there, or when it is a day old and its reference no digest; those who ask for it at the same
        time share that and its failure. Cancelling the last that waits ends it. Raises what `fetch` raises; where the
        server does not answer, an old image does, with a warning.
        """
        key = hashlib.sha256(f"{_VERSION} {reference}".encode()).hexdigest()[:32]
        await asyncio.to_thread(self._prepare)
        for _ in range(_ATTEMPTS):
            path, cached, warning = self._fresh(key, reference), True, ""
            if path is None:
                cached = False
                try:
                    path = await self._flights.join(key, lambda: self._build(key, reference, log_file))
                except errors.Unreachable as exc:
                    old = max(self._entries(key), default=None)
                    if old is None:
                        raise
                    path, cached = old.path, True
                    warning = f"an old image of {reference} was taken: {exc}"
            async with locks.held(self._locks / f"{path.stem}.use", shared=True):
                if not path.exists():
                    continue
                os.utime(path)
                if not cached:
                    self._evict_soon()
                yield Lease(path=path, cached=cached, warning=warning)
                return
        raise errors.EnvironmentFailed(f"the image {reference} is evicted again and again")

    async def sweep(self) -> None:
        """Removes what daemons that are gone left half fetched."""
        await asyncio.to_thread(self._sweep)

    async def evict(self, bytes_needed: int = 0) -> int:
        """Removes leftovers and what newer images replace, then, over the quota, what was used longest ago; nothing in use.

        With `bytes_needed` more, until so many bytes are freed. How many were.
        """
        async with self._one:
            removed = await asyncio.to_thread(self._tidy, bytes_needed)
        if removed:
            log.info("images evicted", quota_bytes=self._quota_bytes, removed=[name for name, _ in removed])
        return sum(size for _, size in removed)

    def _evict_soon(self) -> None:
        if self._evicting is None or self._evicting.done():
            self._evicting = asyncio.create_task(self._evict_quietly(), name="evict images")

    async def _evict_quietly(self) -> None:
        try:
            await self.evict()
        except OSError as exc:  # another daemon may be at it too; the next fetch tries again
            log.warning("images not evicted", error=str(exc))

    def _prepare(self) -> None:
        for folder in (self._images, self._locks):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _fresh(self, key: str, reference: Reference) -> Path | None:
        now = time.time()
        fresh = (
            entry
            for entry in self._entries(key)
            if reference.pinned or 0 <= now - entry.fetched < UNPINNED_SECS
        )
        newest = max(fresh, default=None)
        return None if newest is None else newest.path

    async def _build(self, key: str, reference: Reference, log_file: Path) -> Path:
        began = time.monotonic()
        async with locks.held(self._locks / f"{key}.build", shared=False):
            there = self._fresh(key, reference)
            if there is not None:  # another daemon was quicker
                return there
            for leftover in self._images.glob(f".new-{key}-*"):
                await asyncio.to_thread(shutil.rmtree, leftover, ignore_errors=True)
            fresh = Path(tempfile.mkdtemp(prefix=f".new-{key}-", dir=self._images))
            try:
                await self._fetch(reference, fresh / "image.sif", log_file)
                path = self._images / f"{key}-{int(time.time()):x}.sif"
                (fresh / "image.sif").rename(path)
            finally:
                # Also when cancelled meanwhile: a thread does not stop.
                await asyncio.shield(asyncio.to_thread(shutil.rmtree, fresh, ignore_errors=True))
        elapsed_secs = round(time.monotonic() - began, 3)
        log.info("image fetched", image=str(reference), elapsed_secs=elapsed_secs)
        return path

    def _entries(self, key: str = "") -> list[_Entry]:
        found = []
        for path in self._images.glob(f"{key or '*'}-*.sif"):
            with contextlib.suppress(ValueError):  # not ours
                found.append(_Entry(int(path.stem.rpartition("-")[2], 16), path))
        return found

    def _sweep(self) -> None:
        for path in self._images.glob(".new-*"):
            with locks.held_if_free(self._locks / f"{path.name.split('-')[1]}.build") as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)

    def _tidy(self, bytes_needed: int) -> list[tuple[str, int]]:
        self._sweep()
        removed: list[tuple[str, int]] = []
        newest: dict[str, _Entry] = {}
        for entry in sorted(self._entries()):
            key = entry.path.stem.rpartition("-")[0]
            if (older := newest.get(key)) is not None and (size := self._remove(older.path)) is not None:
                removed.append((older.path.stem, size))
            newest[key] = entry
        left: list[tuple[int, int, Path]] = []
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                status = entry.path.stat()
                left.append((status.st_mtime_ns, status.st_blocks * 512, entry.path))
        used = sum(size for _, size, _ in left)
        freed = sum(size for _, size in removed)
        for _, _, path in sorted(left):
            if used <= self._quota_bytes and freed >= bytes_needed:
                break
            if (size := self._remove(path)) is not None:
                used, freed = used - size, freed + size
                removed.append((path.stem, size))
        return removed

    def _remove(self, path: Path) -> int | None:
        """Removes an image that nobody uses, and tells its bytes; None when somebody does."""
        with locks.held_if_free(self._locks / f"{path.stem}.use") as free:
            if not free:
                return None
            try:
                size = path.stat().st_blocks * 512
            except FileNotFoundError:
                return 0
            path.unlink(missing_ok=True)
            return size
