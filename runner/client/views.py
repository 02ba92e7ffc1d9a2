"""Two ways to see what became of a message: a daemon's HTTP API, and the metadata objects in the experimenter's storage."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import orjson

from runner import errors
from runner.client.api import Away, Missing
from runner.metadata.names import Accession

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runner.client.api import Daemon
    from runner.client.submit import Submitted
    from runner.storage.base import ObjectInfo, ObjectStore
    from runner.storage.registry import Stores

#: How far the clocks of a store and of this machine may differ.
_SKEW_SECS = 600.0
_READ_BYTES = 1 << 20
_OUTPUT_SECS = 1.0
_PREFIX = "metadata/scrape-host-"
#: What changes from second to second is not worth telling each time.
_COUNTDOWN = re.compile(r"^backing off for \d+ s more: | for \d+ s$| \(for \d+ s\)")
_MAX_ATTEMPTS = 3  # DESIGN.md rule 3
#: Endings after which the message goes back to its queue for certain, and those after which it does so unless it was the last attempt.
#: `disk` is among neither: of what used more than it had asked for it is final, and a disk that was full is not told from that.
_NEVER_FINAL = {
    errors.Reason.DRAINED,
    errors.Reason.LEASE_LOST,
    errors.Reason.STORAGE,
    errors.Reason.QUEUE,
    errors.Reason.CAPACITY,
    errors.Reason.NEVER_FITS,
    errors.Reason.NO_KEY,
    errors.Reason.NO_ENGINE,
}
_TRIED_AGAIN = {
    errors.Reason.ARTIFACT,
    errors.Reason.ENVIRONMENT,
    errors.Reason.GPU,
    errors.Reason.RUNNER,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """How an experiment ended, for good."""

    status: str
    reason: str
    text: str
    exit_code: int | None
    attempt: int = 1
    accession: str | None = None  #: names the attempt and its objects; None when it never ran

    @property
    def code(self) -> int:
        """What a program that waited for it should exit with: the workload's code, 1 when the runner failed or stopped it."""
        by_itself = self.reason in {errors.Reason.EXIT, errors.Reason.SIGNAL}
        return self.exit_code if by_itself and self.exit_code is not None else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """One look."""

    stage: str  #: queued | starting | staging | environment | running | uploading | done
    note: str = ""  #: why it waits
    attempt: int = 1
    run: str | None = None  #: the daemon's name of the attempt
    accession: str | None = None  #: names the attempt for ever, and its objects
    ending: Ending | None = None


class View(abc.ABC):
    """A way to see. Blocking work is done in threads, each call for a bounded time."""

    @abc.abstractmethod
    async def look(self) -> Seen | None:
        """What is known now; None when nothing is."""

    @abc.abstractmethod
    async def output(self, seen: Seen, offset: int) -> bytes:
        """What that attempt printed from `offset` (bytes) on, as far as it can be had from here now; b"" for nothing more."""


class DaemonView(View):
    """What a daemon tells. It knows queued and running experiments, and those that ended since it was started."""

    def __init__(self, daemon: Daemon, submitted: Submitted) -> None:
        self._daemon = daemon
        self._submitted = submitted
        self.away = ""  #: why it did not answer the last time; empty when it did

    async def look(self) -> Seen | None:
        """None while it does not answer. Raises errors.UsageError when it does not let us in."""
        self.away = ""
        try:
            told = await asyncio.to_thread(
                self._daemon.get_json, f"/api/runs?digest={self._submitted.digest}"
            )
            if told["running"]:
                run = told["running"][-1]
                return Seen(
                    stage=run["stage"], attempt=run["attempt"], run=run["run"], accession=run["accession"]
                )
            if told["recent"]:
                return _recent(told["recent"][-1])
            return Seen(stage="queued", note=await asyncio.to_thread(self._why_queued))
        except Away as exc:
            self.away = str(exc)
            return None

    async def output(self, seen: Seen, offset: int) -> bytes:
        """Only while it runs."""
        if seen.run is None:
            return b""
        try:
            return await asyncio.to_thread(self._daemon.get, f"/api/runs/{seen.run}/output?offset={offset}")
        except (Away, Missing):
            return b""

    def _why_queued(self) -> str:
        told = self._daemon.get_json(f"/api/queues?queue={quote(self._submitted.queue)}")
        for queue in told["queues"][:1]:
            why = (queue.get(name) for name in ("closed_because", "trouble", "parked"))
            return _COUNTDOWN.sub("", next(filter(None, why), ""))
        return f"the daemon at {self._daemon.where()} does not serve its queue yet: {told['why']}"


def _recent(record: Mapping[str, Any]) -> Seen:
    attempt = record["attempt"]
    if not record["final"]:
        why = record["text"].partition("\n")[0]
        return Seen(
            stage="queued",
            attempt=attempt,
            accession=record.get("accession"),
            note=f"attempt {attempt} did not succeed: {why}",
        )
    ending = Ending(
        status=record["status"],
        reason=record["reason"],
        text=record["text"],
        exit_code=record["exit_code"],
        attempt=attempt,
        accession=record.get("accession"),
    )
    return Seen(stage="done", attempt=attempt, accession=record.get("accession"), ending=ending)


class StorageView(View):
    """What lies in storage: the documents that the runner writes at checkpoints and at the end (DESIGN.md 5.6)."""

    def __init__(self, stores: Stores, submitted: Submitted) -> None:
        self._stores = stores
        self._submitted = submitted
        self._location = submitted.locations["_metadata"]
        self._strangers: set[tuple[str, str]] = set()  # documents of other messages: name, etag
        self._ours: dict[str, tuple[str, Seen]] = {}  # name -> etag, what it says
        self._next = 0.0  # when to look again
        self._next_output = 0.0
        self._open: _Open | None = None

    async def look(self) -> Seen | None:
        """None until there is a document, and while the storage does not answer. Looks only now and then: listing costs."""
        if time.monotonic() < self._next:
            return self._newest()
        began = time.monotonic()
        try:
            await asyncio.to_thread(self._read_new)
        except errors.UnsupportedRequest:
            raise
        except (errors.AttemptFailed, errors.Unreachable):
            return self._newest()
        finally:
            took = time.monotonic() - began
            self._next = time.monotonic() + max(1.0, 10 * took)
        return self._newest()

    async def output(self, seen: Seen, offset: int) -> bytes:
        """What the last checkpoint has stored, a piece at a time. Looks for more only now and then, but at the end."""
        if seen.accession is None:
            return b""
        if self._open is None and seen.ending is None:
            if time.monotonic() < self._next_output:
                return b""
            self._next_output = time.monotonic() + _OUTPUT_SECS
        return await asyncio.to_thread(
            self._read_output, f"metadata/output-host-{seen.accession}.log", offset
        )

    def _newest(self) -> Seen | None:
        """The attempt that is the end, else the latest. Not by its number: one that was put back is not counted."""
        return max((seen for _, seen in self._ours.values()), key=rank, default=None)

    def _read_new(self) -> None:
        store = self._stores.store(self._location)
        since = datetime.fromtimestamp(self._submitted.time_added - _SKEW_SECS, UTC)
        for info in store.list(_PREFIX):
            if info.modified is not None and info.modified < since:
                continue
            known = self._ours.get(info.key)
            if (info.key, info.etag) in self._strangers or (known is not None and known[0] == info.etag):
                continue
            self._read_document(info)

    def _read_document(self, info: ObjectInfo) -> None:
        with self._stores.store(self._location).open(info.key) as stream:
            content = b"".join(iter(lambda: stream.read(_READ_BYTES), b""))
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            document = orjson.loads(content)
            if self._is_ours(document):
                accession = info.key.removeprefix(_PREFIX).removesuffix(".json")
                self._ours[info.key] = info.etag, _stored(document, accession)
                return
        self._strangers.add((info.key, info.etag))

    def _is_ours(self, document: Mapping[str, Any]) -> bool:
        """By the message's time, which is in the redacted request; the older layout has none, there the key must do."""
        studioml = document["studioml"]
        named = studioml["experiment"]
        if (named["key"] if isinstance(named, dict) else named) != self._submitted.key:
            return False
        request = document.get("runner", {}).get("request")
        added: float | None = None if request is None else request["experiment"]["time_added"]
        return added is None or added == self._submitted.time_added

    def _read_output(self, key: str, offset: int) -> bytes:
        with contextlib.suppress(errors.AttemptFailed, errors.Unreachable):
            if self._open is None or self._open.place != (key, offset):
                self._close()
                store = self._stores.store(self._location)
                if store.stat(key).size <= offset:
                    return b""
                self._open = _Open(store, key, offset)
            if data := self._open.read():
                return data
        self._close()
        return b""

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


class _Open:
    """An output that is being read: one download, whatever its size."""

    def __init__(self, store: ObjectStore, key: str, offset: int) -> None:
        self.place = (key, offset)
        self._stack = contextlib.ExitStack()
        self._stream = self._stack.enter_context(store.open(key))
        while offset > 0 and (passed := self._stream.read(min(offset, _READ_BYTES))):
            offset -= len(passed)

    def read(self) -> bytes:
        data = self._stream.read(_READ_BYTES)
        self.place = (self.place[0], self.place[1] + len(data))
        return data

    def close(self) -> None:
        self._stack.close()


def rank(seen: Seen) -> tuple[bool, int]:
    """Orders attempts, which have accessions, by what is newer. Clocks of hosts differ; what is over for good is so whatever they say."""
    return seen.ending is not None, Accession.parse(seen.accession or "").second


def _stored(document: Mapping[str, Any], accession: str) -> Seen:
    """What a document says of its attempt."""
    Accession.parse(accession)
    studioml = document["studioml"]
    attempt = document.get("runner", {}).get("attempt", 1)
    if (status := studioml.get("status", "running")) == "running":
        return Seen(stage="running", attempt=attempt, accession=accession)
    reason, exit_code = studioml.get("reason", "exit"), studioml.get("exit_code")
    # With an exit code it has run: then it is its results that were refused, and those are not asked for again.
    again = reason in _TRIED_AGAIN and attempt < _MAX_ATTEMPTS and exit_code is None
    if reason in _NEVER_FINAL or again:
        return Seen(stage="queued", attempt=attempt, accession=accession, note=f"attempt {attempt}: {reason}")
    ending = Ending(
        status=status,
        reason=reason,
        text=f"{status}: {reason}" + (f", exit code {exit_code}" if exit_code is not None else ""),
        exit_code=exit_code,
        attempt=attempt,
        accession=accession,
    )
    return Seen(stage="done", attempt=attempt, accession=accession, ending=ending)
