"""Endpoints that did not answer. Work that needs one waits until it answers again (DESIGN.md rule 3 and 5)."""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = structlog.get_logger(__name__)

FIRST_PROBE_SECS = 1.0
LAST_PROBE_SECS = 30.0


class Endpoints:
    """Which endpoints are away, since when; each is probed, backing off, until it answers."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._away: dict[str, float] = {}
        self._answered: dict[str, asyncio.Event] = {}
        self._probes: set[asyncio.Task[None]] = set()

    def away_secs(self, endpoint: str) -> float | None:
        """For how long it has been away; None when nothing is known against it."""
        since = self._away.get(endpoint)
        return None if since is None else time.monotonic() - since

    def away(self) -> dict[str, float]:
        """Seconds that each has been away."""
        return {endpoint: time.monotonic() - since for endpoint, since in self._away.items()}

    async def answers(self, endpoint: str) -> None:
        """Wait until nothing is known against it."""
        if (answered := self._answered.get(endpoint)) is not None:
            await answered.wait()

    def lost(self, endpoint: str, answers: Callable[[], Awaitable[bool]]) -> None:
        """It did not answer; `answers` asks it again."""
        if endpoint in self._away:
            return
        log.warning("endpoint does not answer; what needs it waits", endpoint=endpoint)
        self._away[endpoint] = time.monotonic()
        self._answered[endpoint] = asyncio.Event()
        probe = asyncio.create_task(
            self._probe(endpoint, answers),
            name=f"probe {endpoint}",
            context=contextvars.Context(),  # what it logs is no run's
        )
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _probe(self, endpoint: str, answers: Callable[[], Awaitable[bool]]) -> None:
        wait = FIRST_PROBE_SECS
        while True:
            await asyncio.sleep(wait * random.uniform(0.8, 1.2))
            if await _asked(endpoint, answers):
                break
            wait = min(wait * 2, LAST_PROBE_SECS)
        log.info(
            "endpoint answers again",
            endpoint=endpoint,
            away_secs=round(time.monotonic() - self._away.pop(endpoint), 1),
        )
        self._answered.pop(endpoint).set()
        self._on_change()

    async def aclose(self) -> None:
        """End the probes."""
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)


async def _asked(endpoint: str, answers: Callable[[], Awaitable[bool]]) -> bool:
    """Whether it answers. When even the question fails, whoever needs it finds out what is wrong."""
    try:
        return await answers()
    except Exception:
        log.exception("an endpoint cannot be asked", endpoint=endpoint)
        return True
