"""Base environments, kept under what was asked for, shared by runs and by the daemons of one cache directory.

::

    <cache>/entries/<key>/          an environment; its manifest was written last, then it was renamed to here
    <cache>/entries/.new-<key>-*    being built; whoever holds the key's build lock may remove it
    <cache>/entries/.old-*          being removed
    <cache>/locks/<key>.build       held alone by its builder
    <cache>/locks/<key>.use         held shared by each run on it, alone by who removes it
    <cache>/packages/               uv's cache, on the same file system so that files are links
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

from runner.executors import layout, locks
from runner.executors.eviction import Evictor
from runner.executors.singleflight import SingleFlight

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from runner.config import Environments
    from runner.executors.interpreters import Interpreter
    from runner.executors.requirements import Requirements
    from runner.executors.uvtool import Uv

log = structlog.get_logger(__name__)

UNPINNED_SECS = 86_400  #: how long an environment with unpinned lines is given to new runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lease:
    """A base environment that stays where it is while the lease is open."""

    base: layout.Base
    key: str
    cached: bool  #: it was there already


class EnvironmentCache:
    """Gives out base environments; builds each once. All methods belong to one event loop."""

    def __init__(self, config: Environments, uv: Uv) -> None:
        self._uv = uv
        # Environments name the place where they are: two names of one directory must not be two places.
        self._entries = config.cache_dir.resolve() / "entries"
        self._locks = config.cache_dir / "locks"
        self._shared = config.shared
        self._flights = SingleFlight[layout.Base]("build environment")
        self._evictor = Evictor(config.cache_dir, config.cache_bytes, uv)

    @contextlib.asynccontextmanager
    async def lease(
        self, interpreter: Interpreter, wanted: Requirements, log_file: Path
    ) -> AsyncIterator[Lease]:
        """The environment for `wanted`, for as long as the context is open: it is not removed until then.

        Built when it is not there; tasks that ask for the same at the same time share one build and its failure.
        Cancelling the last that waits ends the build. What uv prints goes to the log of the one that came first.
        Raises what `Uv.install` raises.
        """
        key, expires = identity(interpreter, wanted, place=self._entries, now=time.time())
        for folder in (self._entries, self._locks):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._shared:
            for folder in (self._entries.parent, self._entries):
                folder.chmod(0o711)
        async with locks.held(self._locks / f"{key}.use", shared=True):
            entry = self._entries / key
            base = layout.Base.load(entry, interpreter.minor)
            cached = base is not None
            if base is None:
                order = _Order(interpreter, wanted, expires, log_file)
                base = await self._flights.join(key, lambda: self._build(key, order))
            _touch(entry)
            yield Lease(base=base, key=key, cached=cached)
            _touch(entry)

    async def evict(self, bytes_needed: int = 0) -> int:
        """Removes what has expired or exceeds the quota, or more until `bytes_needed` are freed, and is not in use.

        How many bytes were freed. Runs by itself after builds, with the quota.
        """
        return await self._evictor.run(bytes_needed)

    async def _build(self, key: str, order: _Order) -> layout.Base:
        entry = self._entries / key
        async with locks.held(self._locks / f"{key}.build", shared=False):
            base = layout.Base.load(entry, order.interpreter.minor)
            if base is not None:  # another daemon was quicker
                return base
            for leftover in self._entries.glob(f".new-{key}-*"):
                await asyncio.to_thread(shutil.rmtree, leftover, ignore_errors=True)
            fresh = Path(tempfile.mkdtemp(prefix=f".new-{key}-", dir=self._entries))
            try:
                base = await self._fill(fresh / "env", entry, order)
                if self._shared:
                    await asyncio.to_thread(_open_up, fresh / "env")
                _replace(fresh / "env", entry)
            finally:
                await _removed(fresh)
        log.info("environment built", environment=key, elapsed_secs=base.build_secs)
        self._evictor.soon()
        return dataclasses.replace(base, path=entry)

    async def _fill(self, prefix: Path, home: Path, order: _Order) -> layout.Base:
        started = time.monotonic()
        layout.create(prefix, order.interpreter)
        warnings = await self._uv.install(
            prefix / "bin" / "python",
            order.wanted,
            seeds=_seeds(order.interpreter, order.wanted),
            scratch=prefix.parent,
            log_file=order.log_file,
        )
        build_secs = time.monotonic() - started
        base = await asyncio.to_thread(
            layout.describe, prefix, order.interpreter, build_secs=build_secs, expires=order.expires
        )
        base = dataclasses.replace(base, warnings=warnings)
        await asyncio.to_thread(layout.create_template, prefix, order.interpreter, base, home=home)
        base.save()
        return base


@dataclasses.dataclass(frozen=True)
class _Order:
    interpreter: Interpreter
    wanted: Requirements
    expires: float | None
    log_file: Path


def identity(
    interpreter: Interpreter, wanted: Requirements, *, place: Path, now: float
) -> tuple[str, float | None]:
    """The key of an environment below `place`, and when it expires (wall clock).

    A cache that was moved, or that is mounted elsewhere, is another place: what a run gets over an environment names it.
    The GPU flavour is in the lines (tensorflow-gpu); their order asks for nothing. Unpinned lines change their key
    once a day, each at an hour of its own, so an old environment can serve the runs that are on it.
    """
    asked = [
        f"{layout.VERSION} {place}",
        f"{interpreter.path} {interpreter} {interpreter.mtime_ns}",
        *sorted(line.identity for line in wanted.lines),
        *wanted.options,
        f"prereleases {wanted.prereleases}",
    ]
    key = hashlib.sha256("\n".join(asked).encode()).hexdigest()
    if wanted.pinned:
        return key[:32], None
    offset = int(key[:8], 16) % UNPINNED_SECS
    day = int(now + offset) // UNPINNED_SECS
    dated = hashlib.sha256(f"{key} {day}".encode()).hexdigest()
    return dated[:32], float((day + 1) * UNPINNED_SECS - offset)


def _seeds(interpreter: Interpreter, wanted: Requirements) -> list[str]:
    """What an environment has although nobody asked: pip, and where Python's own venv has it, setuptools."""
    seeds = ["pip"]
    if interpreter.version < (3, 12):
        seeds.append("setuptools<81")  # later ones have no pkg_resources, for which old workloads need it
    if interpreter.version < (3, 8):
        seeds.append("wheel")
    named = {line.name for line in wanted.lines}
    return [seed for seed in seeds if seed.partition("<")[0] not in named]


def _replace(fresh: Path, entry: Path) -> None:
    """Puts a finished environment in its place; one that was damaged goes, also from under a run: it is the same."""
    with contextlib.suppress(FileNotFoundError):
        entry.rename(entry.with_name(f".old-{fresh.parent.name}"))
    fresh.rename(entry)


def _open_up(prefix: Path) -> None:
    """Lets every user read an environment, whatever the daemon's umask is. Packages of uv's cache are made readable with it."""
    for folder, _, files in os.walk(prefix):
        Path(folder).chmod(0o755)
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


async def _removed(folder: Path) -> None:
    """Removes a directory, also when cancelled meanwhile: a thread does not stop."""
    await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))


def _touch(entry: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(entry / layout.MANIFEST)
