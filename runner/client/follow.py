"""Follows a submitted experiment to its end: what it does, what it prints, what it tells of itself."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any

from runner.client.views import DaemonView, Ending, Seen, StorageView, rank
from runner.metadata import merge
from runner.metadata.scrape import Scraper

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from runner.client.api import Daemon
    from runner.client.submit import Submitted
    from runner.client.views import View
    from runner.storage.registry import Stores

#: Between two looks at a daemon: each is one small request on loopback.
INTERVAL_SECS = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """It is at another stage, waits for another reason, or another attempt has begun."""

    stage: str
    note: str = ""
    attempt: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """It printed this, exactly."""

    data: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """It told something of itself."""

    latest: dict[str, Any]  #: by its last line
    values: dict[str, Any]  #: by all of them: the `experiment` of its document so far


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """It is over, and all of its output was told. The last event."""

    ending: Ending


Event = Stage | Output | Metric | End


async def follow(submitted: Submitted, stores: Stores, daemon: Daemon | None) -> AsyncIterator[Event]:
    """The events of an experiment up to its end, however long that takes; attempts that go back to the queue are no end.

    Asks the daemon while it answers and knows of the experiment, else (also after it was restarted) the storage. Cancel it at
    any time: the experiment goes on. Raises errors.UsageError when the daemon does not let us in.
    """
    follower = _Follower(submitted, stores, daemon)
    while True:
        seen = await follower.look()
        if seen is not None:
            if stage := follower.changed(seen):
                yield stage
            while data := await follower.output(seen):
                yield Output(data=data)
                if metric := follower.scraped(data):
                    yield metric
            if seen.ending is not None:
                yield End(ending=seen.ending)
                return
        await asyncio.sleep(INTERVAL_SECS)


class _Follower:
    """What was told so far."""

    def __init__(self, submitted: Submitted, stores: Stores, daemon: Daemon | None) -> None:
        self._daemon = DaemonView(daemon, submitted) if daemon is not None else None
        self._storage: View = StorageView(stores, submitted)
        self._accession: str | None = None
        self._offset = 0
        self._stage: Stage | None = None
        self._scraper = Scraper()
        self._told: dict[str, Any] = {}

    async def look(self) -> Seen | None:
        seen = await self._daemon.look() if self._daemon is not None else None
        if seen is not None and (seen.ending is not None or (seen.accession and seen.stage != "queued")):
            return seen
        # A daemon that was started anew does not know what its predecessor finished, and none what another one runs.
        stored = await self._storage.look()
        if stored is not None and seen is not None and seen.accession and rank(seen) >= rank(stored):
            return seen  # the attempt that it has put back: it says more of why
        return stored or seen or self._unseen()

    def _unseen(self) -> Seen | None:
        """Before anything is known of it: that nobody can be asked. Who forgot to start a daemon would wait without a word."""
        if self._daemon is None or not self._daemon.away or self._accession is not None:
            return None
        return Seen(stage="queued", note=f"{self._daemon.away}; meanwhile the storage is watched")

    def changed(self, seen: Seen) -> Stage | None:
        if seen.accession is not None and seen.accession != self._accession:
            self._accession, self._offset = seen.accession, 0
            self._scraper, self._told = Scraper(), {}
        stage = Stage(stage=seen.stage, note=seen.note, attempt=seen.attempt)
        if stage == self._stage or seen.stage == "done":
            return None
        self._stage = stage
        return stage

    async def output(self, seen: Seen) -> bytes:
        """More of it, b"" when there is no more now. At the end the storage has what the daemon does not serve any more."""
        if self._daemon is not None and seen.run is not None:
            data = await self._daemon.output(seen, self._offset)
        else:
            data = await self._storage.output(seen, self._offset)
        self._offset += len(data)
        return data

    def scraped(self, data: bytes) -> Metric | None:
        """What its lines tell, by the rules of the document; patches are left to the runner."""
        latest = None
        for directive in self._scraper.feed(data):
            if isinstance(directive, dict) and isinstance(directive.get("experiment"), dict):
                latest = directive["experiment"]
                merge.merged(self._told, latest)
        return None if latest is None else Metric(latest=latest, values=dict(self._told))
