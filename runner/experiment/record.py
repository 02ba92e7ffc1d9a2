"""The metadata objects of one run: the document scraped from its output, its output, and the daemon's records of it.

All three lie as files in the run's directory, and are stored from there: so a restarted daemon can store what an earlier one
left (DESIGN.md 5.6, INTEROP.md 5). Blocking methods run in worker threads, one at a time.

A disk that takes no more costs what would have been written last, never the run: the document is then stored from memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import os
import threading
import time
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson
import structlog

from runner import errors
from runner.experiment.outcome import Status
from runner.metadata import store as manifests
from runner.metadata.document import Document, Subject
from runner.metadata.scrape import Scraper
from runner.process.tail import Tail, open_regular
from runner.request.model import Artifact, Request
from runner.request.redact import redact
from runner.storage.base import NotFound
from runner.storage.location import locate

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from runner.config import Config
    from runner.experiment.lifecycle import Experiment
    from runner.experiment.outcome import Outcome
    from runner.experiment.tools import Tools
    from runner.process.base import ProcessExit
    from runner.resources.usage import Use
    from runner.storage.base import Location

log = structlog.get_logger(__name__)

#: Output is scraped in pieces of this size.
CHUNK_BYTES = 1 << 20
#: What the workload has told is shown up to this size: finished runs are remembered with it.
LAST_BYTES = 32 << 10
#: Where the three objects of each run lie, at the root of the bucket of the `_metadata` artifact.
PREFIX = "metadata/"


class Record:
    """Writes and stores the metadata of one attempt."""

    def __init__(self, experiment: Experiment, tools: Tools, *, resumed: bool = False) -> None:
        """`resumed`: of an attempt of an earlier daemon, which may have stored the final document already."""
        self.last: Any = (
            None  #: what the workload has told so far: the document's `experiment`, unless it is large
        )
        self._experiment = experiment
        self._tools = tools
        self._resumed = resumed
        self._workspace = experiment.workspace
        self._schema = tools.config.runs.metadata_schema
        self._tail = Tail(self._workspace.output)
        self._scraper = Scraper()
        self._lock = threading.Lock()
        self._stored: dict[str, tuple[int, int]] = {}  # object name -> size and mtime of what it holds
        self._document: Document | None = None
        self._facts: dict[str, object] | None = None
        self._unwritten: bytes | None = None  # the document, when the disk has not taken it
        self._version = 0  # of the document; counts what was written
        self._stored_version: int | None = None
        self._exit: ProcessExit | None = None
        self._use: Use | None = None
        self._outcome: Outcome | None = None
        self._stopped: float | None = None

    def running(self, facts: Mapping[str, object]) -> None:
        """The workload is about to start; `facts` are the executor's. Nothing is written yet."""
        self._facts = dict(facts)

    def using(self, use: Use) -> None:
        """The workload runs, and what it uses is there."""
        self._use = use

    def ended(self, ended: ProcessExit) -> None:
        """How the workload's processes ended, and what they used."""
        self._exit = ended

    @property
    def used(self) -> dict[str, Any]:
        """What the workload uses, or has used, as in the document."""
        return {} if self._use is None else self._use.told(self._exit)

    def update(self) -> None:
        """Scrape what was printed since the last time, and write the document. Blocking."""
        with self._lock:
            self._scrape()
            self._write()

    def finish(self, outcome: Outcome) -> None:
        """Scrape the rest, and write the final document. Blocking. A second call is for an outcome that became another."""
        with self._lock:
            first = self._outcome is None
            self._outcome, self._stopped = outcome, time.time()
            self._scrape()
            document = self._begun()
            for directive in self._scraper.finish():
                document.apply(directive)
            if first:
                self._measure()
                self._tools.metrics.bad_directive(
                    document.bad + self._scraper.unparsable + self._scraper.too_long
                )
            document.set_final(
                status=outcome.status,
                reason=outcome.reason,
                stopped=self._stopped,
                exit_code=outcome.exit_code,
                **self._used(),
            )
            self._show()
            self._write()

    def _measure(self) -> None:
        if self._use is not None:
            if not self._use.disk.count:
                self._use.measure_small(self._workspace.root)
            self._tools.metrics.used(self.used)

    def restore(self, outcome: Outcome) -> None:
        """Of an attempt of an earlier daemon: the document on disk is the final one, unless it tells of another outcome. Blocking."""
        told = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            studioml = orjson.loads(self._workspace.document.read_bytes())["studioml"]
            told = studioml["status"], studioml["reason"]
        if told != (outcome.status, outcome.reason):
            self.finish(outcome)

    async def upload(self, *, final: bool = False) -> list[errors.RunnerError]:
        """Store what changed of the three objects, the document last; what failed is returned.

        `final`: `finish` was called, and nothing of this run is stored after it.
        """
        target = self._target()
        failed: list[errors.RunnerError] = []
        try:
            if not final:
                await asyncio.to_thread(self.update)
            if target is not None:
                await asyncio.gather(
                    asyncio.to_thread(self._put, target, self._names[0], self._workspace.output),
                    asyncio.to_thread(self._put, target, self._names[1], self._workspace.runner_log),
                )
                await asyncio.to_thread(self._put_document, target)
        except errors.RunnerError as exc:
            log.warning("metadata cannot be stored", error=str(exc))
            failed.append(exc)
        except OSError as exc:
            log.warning("metadata cannot be read", error=str(exc))
            failed.append(errors.DiskFailed(f"the metadata cannot be read: {exc}"))
        if self._tools.config.runs.metadata_store is not None:
            await self._tell_store(target)
        return failed

    async def _tell_store(self, target: Location | None) -> None:
        """The operator's own store is told as well. No message's fate depends on it."""
        try:
            await asyncio.to_thread(self._put_manifest, target)
        except (errors.RunnerError, OSError) as exc:
            log.warning("the metadata store cannot be told of the run", error=str(exc))

    @property
    def _names(self) -> tuple[str, str, str]:
        accession = self._experiment.accession
        return accession.output_name, accession.runner_name, accession.scrape_name

    def _target(self) -> Location | None:
        """Where the objects go; None for a message without a `_metadata` artifact."""
        return self._experiment.artifacts.location("_metadata")

    def _subject(self) -> Subject:
        experiment = self._experiment
        return Subject(
            key=experiment.request.key,
            project=experiment.request.project,
            host=self._tools.host,
            request=redact(experiment.request.raw),
            artifacts=experiment.artifacts.addresses(),
        )

    def _begun(self) -> Document:
        if self._document is None:
            granted = self._experiment.granted
            machine: dict[str, dict[str, object]] = {}
            if granted is not None:
                machine["granted"] = {"cpus": granted.cpus, "ram_bytes": granted.ram_bytes}
                if gpus := self._experiment.gpus:
                    machine["granted"]["gpus"] = [dataclasses.asdict(grant) for grant in gpus]
            self._document = Document.begin(self._subject(), schema=self._schema, asset=self._asset())
            self._document.set_running(
                started=self._experiment.started,
                accession=str(self._experiment.accession),
                attempt=self._experiment.attempt,
                **machine,
            )
            if self._facts is not None:
                self._document.note(environment=self._facts)
        return self._document

    def _asset(self) -> str | None:
        """That of a document which an earlier daemon has begun: all of its output is scraped again, but it stays the same asset."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            return str(orjson.loads(self._workspace.document.read_bytes())["asset"])
        return None

    def _scrape(self) -> None:
        document = self._begun()
        try:
            left = (
                self._workspace.output.stat().st_size
            )  # a workload that prints faster than this must not hold it up
            while left > 0 and (data := self._tail.read_new(CHUNK_BYTES)):
                left -= len(data)
                self._tools.metrics.scraped(len(data))
                for directive in self._scraper.feed(data):
                    document.apply(directive)
        except FileNotFoundError:
            pass  # nothing has run
        except OSError as exc:
            log.warning("output cannot be read", error=str(exc))
        self._show()

    def _show(self) -> None:
        """A copy, for other threads."""
        told = orjson.dumps(self._begun().last)
        self.last = orjson.loads(told) if len(told) <= LAST_BYTES else None

    def _used(self) -> dict[str, Any]:
        if self._exit is None:
            return {}
        used: dict[str, Any] = {"elapsed_secs": round(self._exit.elapsed_secs, 3)}
        if self._exit.max_rss_bytes:  # else nothing has run, or elsewhere
            used |= {
                "user_secs": round(self._exit.user_secs, 3),
                "system_secs": round(self._exit.system_secs, 3),
                "max_rss_bytes": self._exit.max_rss_bytes,
            }
        return {"used": used | self.used, "strays": self._exit.strays}

    def _write(self) -> None:
        content = self._begun().to_bytes()
        self._version += 1
        partial = self._workspace.document.with_suffix(".partial")
        try:
            partial.write_bytes(content)
            partial.replace(self._workspace.document)
            self._unwritten = None
        except OSError as exc:
            log.warning("the metadata document cannot be written", error=str(exc))
            self._unwritten = content

    def _put(self, target: Location, name: str, path: Path) -> None:
        try:
            file = open_regular(path)
        except FileNotFoundError:
            return
        with file:
            info = os.fstat(file.fileno())
            state = (info.st_size, info.st_mtime_ns)
            if self._stored.get(name) != state:
                # The size of now: what a running workload adds meanwhile goes with the next checkpoint.
                self._experiment.artifacts.put(target.at(PREFIX + name), file, info.st_size)
                self._stored[name] = state

    def _put_document(self, target: Location) -> None:
        location, version = target.at(PREFIX + self._names[2]), self._version
        if self._stored_version == version:
            return
        if not (self._resumed and self._is_final(location)):
            with self._opened_document() as source:
                self._experiment.artifacts.put(location, source, source.seek(0, 2) - source.seek(0))
        self._stored_version = version

    def _opened_document(self) -> BinaryIO:
        if self._unwritten is not None:
            return io.BytesIO(self._unwritten)
        return self._workspace.document.open("rb")

    def _is_final(self, location: Location) -> bool:
        """Whether an earlier daemon has stored the final document: from then on it belongs to those who annotate it."""
        try:
            with self._experiment.artifacts.store(location).open(location.key) as stream:
                stored = orjson.loads(stream.read())
            return bool(stored["studioml"]["status"] != Status.RUNNING)
        except NotFound:
            return False
        except (errors.ArtifactFailed, ValueError, KeyError, TypeError) as exc:
            log.debug("what is stored is no document", error=str(exc))
            return False

    def _put_manifest(self, target: Location | None) -> None:
        experiment = self._experiment
        outcome = self._outcome
        content = manifests.manifest(
            self._subject(),
            experiment.accession,
            attempt=experiment.attempt,
            status=Status.RUNNING if outcome is None else outcome.status,
            reason=None if outcome is None else outcome.reason,
            started=experiment.started,
            stopped=self._stopped,
            exit_code=None if outcome is None else outcome.exit_code,
            metadata={} if target is None else {name: target.at(PREFIX + name).uri for name in self._names},
        )
        name = manifests.manifest_name(
            project=experiment.request.project, key=experiment.request.key, accession=experiment.accession
        )
        store = metadata_store(self._tools.config)
        key = f"{store.key}/{name}".lstrip("/")
        experiment.artifacts.put(store.at(key), io.BytesIO(content), len(content))


def metadata_store(config: Config) -> Location:
    """The operator's own store (--metadata-store), opened with the operator's own AWS variables; its key is a prefix, or empty.

    Raises errors.Refused.
    """
    own = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    some = f"{(config.runs.metadata_store or '').rstrip('/')}/-"  # an address is that of an object: a bucket alone is none
    address = Artifact(tag="metadata-store", qualified=some)
    place = locate(address, Request(key="-", env=own), config.s3, allow_env_secrets=True)
    return place.at(place.key.removesuffix("-").rstrip("/"))
