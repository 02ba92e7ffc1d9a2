"""The standing work beside the consumers of directory queues: showing that we live, and returning what the dead held."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from typing import TYPE_CHECKING, Protocol, TypeVar

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from runner.queues.file_claims import Claims
    from runner.queues.file_consumer import FileDelivery
    from runner.queues.file_messages import FileSettings

log = structlog.get_logger(__name__)

T = TypeVar("T")

_SHORTEST_SECS = 0.01  #: between two sweeps, when a delayed message is just coming due


class Run(Protocol):
    """Does file work in a thread."""

    async def __call__(self, call: Callable[[], T]) -> T:
        """The result of `call`. Raises what it raises."""


class Keeper:
    """Two loops over the claims of one backend; `sweep_soon` shortens the wait of the first."""

    def __init__(
        self,
        claims: Claims,
        settings: FileSettings,
        *,
        run: Run,
        wake: Callable[[str], None],
        held: Collection[FileDelivery],
    ) -> None:
        self._claims = claims
        self._settings = settings
        self._run = run
        self._wake = wake
        self._held = held
        self._owed: list[Callable[[], object]] = []
        self._failing = False
        self.sweep_soon = asyncio.Event()

    def owe(self, exc: OSError, call: Callable[[], object]) -> None:
        """A claim could not be ended because the file system was away: try again with every sweep."""
        log.warning("claim cannot be ended now, trying again", error=exc.strerror)
        self._owed.append(call)

    async def sweep(self) -> None:
        """Return what is due and what the dead held, until cancelled."""
        while True:
            self.sweep_soon.clear()
            wait_secs = self._settings.sweep_secs
            try:
                swept = await self._run(self._claims.sweep)
                while self._owed:
                    await self._run(self._owed[0])
                    del self._owed[0]
            except OSError as exc:
                self._failed(exc)
            else:
                self._failing = False
                for queue in swept.returned:
                    self._wake(queue)
                if swept.next_due is not None:
                    wait_secs = min(wait_secs, max(_SHORTEST_SECS, swept.next_due - time.time()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_secs):
                    await self.sweep_soon.wait()

    async def heartbeat(self) -> None:
        """Show that we live, and see which claims were taken from us while we slept, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.heartbeat_secs)
            try:
                await self._run(self._claims.heartbeat)
                lost = await self._run(functools.partial(self._lost, list(self._held)))
            except OSError as exc:
                self._failed(exc)
                continue
            for delivery in lost:
                if delivery in self._held:  # not ended in the meantime
                    log.warning("claim lost", queue=str(delivery.queue), digest=delivery.digest)
                    delivery.lost.set()

    def _lost(self, held: list[FileDelivery]) -> list[FileDelivery]:
        return [delivery for delivery in held if not self._claims.holds(delivery.claim)]

    def _failed(self, exc: OSError) -> None:
        if not self._failing:
            self._failing = True
            log.warning("claims cannot be kept, trying again", error=exc.strerror)
