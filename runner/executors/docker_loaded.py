"""The images that came as files: which of them runs use, and the end of those that none has used for a day.

An engine keeps what it was given until somebody removes it, and such an image has a name that nobody else ever asks for. When each
was used last is the age of a file below the state directory: by the wall clock, as it counts while no daemon runs; a clock that is
set wrong costs no more than loading an image again. One that is known of no use (the state directory was lost, another daemon on
the same engine has loaded it) has been used when it is seen first.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import re
import time
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.executors import docker_archive

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from runner.executors.docker_engine import Engine

log = structlog.get_logger(__name__)

KEEP_SECS = 24 * 3600.0
#: No more are removed at a time: each may take the engine a while, and the disk is busy with it.
MOST = 20
_NAME = re.compile(rf"{re.escape(docker_archive.LOADED)}:[0-9a-f]{{64}}")


class Loaded:
    """The loaded images of one engine. One instance per daemon; no I/O until it is used."""

    def __init__(self, records: Path) -> None:
        """`records`: a directory for the times of use; made when there is one."""
        self._records = records
        self._users: collections.Counter[str] = collections.Counter()
        self._going: dict[str, asyncio.Event] = {}  # what is being removed now

    @contextlib.asynccontextmanager
    async def used(self, name: str) -> AsyncIterator[None]:
        """While it lasts that image is not removed, and its day begins at the end. Waits until a removal that has begun is over."""
        self._users[name] += 1
        try:
            if (going := self._going.get(name)) is not None:
                await going.wait()
            self._note(name)
            yield
        finally:
            self._users -= collections.Counter([name])  # drops those that nobody uses any more
            self._note(name)

    async def tidy(self, engine: Engine) -> None:
        """Remove those that no run has used for a day, the oldest first; none that a container is of.

        Never raises but for cancellation: what cannot be removed now is tried again.
        """
        try:
            answer = await engine.ask(
                "image", "ls", "--format", "{{.Repository}}:{{.Tag}}", docker_archive.LOADED
            )
            if not answer.ok:
                raise errors.EnvironmentFailed(answer.last)
            there = [line.strip() for line in answer.text.splitlines() if _NAME.fullmatch(line.strip())]
            for name in (await asyncio.to_thread(self._unused, there))[:MOST]:
                if not self._users[name]:
                    await self._remove(engine, name)
        except (errors.RunnerError, OSError) as exc:
            log.debug("container images that came as files cannot be looked through", why=str(exc))

    async def _remove(self, engine: Engine, name: str) -> None:
        self._going[name] = over = asyncio.Event()
        try:
            answer = await engine.ask("image", "rm", name)  # not by force: then it refuses one in use
        finally:
            del self._going[name]
            over.set()
        if answer.ok:
            self._record(name).unlink(missing_ok=True)
            log.info("removed a container image that no run has used for a day", image=name)
        else:
            self._note(name)
            log.debug("a container image is not removed now", image=name, why=answer.last)

    def _unused(self, there: list[str]) -> list[str]:
        """Those that are due, the oldest first. Blocking; raises OSError."""
        now, ages = time.time(), {}
        for name in there:
            try:
                ages[name] = now - self._record(name).stat().st_mtime
            except FileNotFoundError:
                self._note(name)
        known = {self._record(name).name for name in there}
        for record in self._records.iterdir() if self._records.exists() else ():
            # Noted by a run that is about to load it, or removed by somebody else long ago.
            if record.name not in known and now - record.stat().st_mtime > KEEP_SECS:
                record.unlink(missing_ok=True)
        return sorted((name for name, age in ages.items() if age > KEEP_SECS), key=lambda name: -ages[name])

    def _note(self, name: str) -> None:
        """It is used now. A disk that is full costs only that: it is known of no use then."""
        with contextlib.suppress(OSError):
            self._records.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._record(name).touch()

    def _record(self, name: str) -> Path:
        return self._records / name.rpartition(":")[2]
