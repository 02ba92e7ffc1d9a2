"""Staging and storing the artifacts of one run (INTEROP.md 3.3, 3.6, 4.2; DESIGN.md 5.5)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast
from urllib.parse import urlsplit

import structlog

from runner import errors
from runner.process.tail import open_regular
from runner.storage import archive
from runner.storage.base import NotFound
from runner.storage.location import locate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from runner.config import Config
    from runner.experiment.tools import Tools
    from runner.experiment.workspace import Workspace
    from runner.request.model import Artifact, Request
    from runner.storage.base import Location, ObjectStore

log = structlog.get_logger(__name__)

#: Not the workload's: the runner's objects, and the experimenter's control (`experiment.cancel`).
_CONTROL = frozenset({"_metadata", "_status"})
#: Never fetched: the runner writes its output anew.
_NOT_FETCHED = _CONTROL | {"output"}
#: An archive up to this size is packed in memory, a larger one in a file of the run's directory.
_SPOOL_BYTES = 1 << 20
#: A completion service notes the time of submission when the broker has confirmed the message, for which it looks once a
#: second; results that are older it waits for without end. Ours may be there before, or have been written by a slow clock.
SUBMISSION_SECS = 3.0
#: A client's clock that is further ahead than this is not believed.
SKEW_SECS = 86_400.0
#: How long a cancelled transfer is waited for; the deadlines of the stores are longer.
CANCEL_SECS = 5.0
#: No experiment has so many objects: a listing that is longer is of something else.
_LISTED = 1000


def located(request: Request, config: Config) -> Iterator[tuple[Artifact, Location]]:
    """Where each artifact is that has an address; without an image that its engine fetches. No I/O.

    Raises:
        errors.Refused: an address that cannot be understood.
    """
    image = request.container
    fetched_by_engine = image.tag if image is not None and image.reference else None
    for artifact in request.artifacts:
        if _addressed(artifact) and artifact.tag != fetched_by_engine:
            yield (
                artifact,
                locate(artifact, request, config.s3, allow_env_secrets=config.runs.allow_env_secrets),
            )


def _addressed(artifact: Artifact) -> bool:
    return bool(artifact.qualified or artifact.url or artifact.key)


class Artifacts:
    """The artifacts of one run, and what is known of their objects. Its blocking work runs in worker threads."""

    def __init__(self, request: Request, workspace: Workspace, tools: Tools) -> None:
        self._request = request
        self._workspace = workspace
        self._tools = tools
        self._locations: dict[str, Location] = {}
        self._stored: dict[str, str] = {}  # tag -> fingerprint of what its object holds
        self._cancelled = threading.Event()

    def locate(self) -> None:
        """Decide where everything is.

        Raises:
            errors.Refused: an address that cannot be understood.
        """
        for artifact in self._request.artifacts:
            if not _addressed(artifact):
                log.warning("artifact has no address, ignored", artifact=artifact.tag)
        for artifact, location in located(self._request, self._tools.config):
            if artifact.mutable and location.scheme in {"http", "https"}:
                log.warning("mutable artifact at a web address: fetched, never stored", artifact=artifact.tag)
            self._locations[artifact.tag] = location

    def location(self, tag: str) -> Location | None:
        """Where an artifact is; None when the message does not say."""
        return self._locations.get(tag)

    def file_name(self, tag: str) -> str:
        """What an artifact's file is called when it is staged as it is, not unpacked."""
        location = self.location(tag)
        return _basename(location, tag) if location is not None else tag

    def addresses(self) -> dict[str, str]:
        """`{tag: URI}`, without credentials."""
        return {tag: location.uri for tag, location in self._locations.items()}

    def store(self, location: Location) -> ObjectStore:
        """The client for that place."""
        return self._tools.stores.store(location)

    def knows(self, endpoint: str) -> bool:
        """Whether one of the artifacts is there."""
        return any(location.endpoint == endpoint for location in self._locations.values())

    async def answers(self, endpoint: str) -> bool:
        """Whether that endpoint answers now."""
        there = [location for location in self._locations.values() if location.endpoint == endpoint]
        return not there or await asyncio.to_thread(lambda: self.store(there[0]).reachable())

    async def fetch(self) -> None:
        """Stage every artifact into its directory, all at once.

        Raises:
            errors.ArtifactFailed, errors.ArchiveRefused, errors.StorageUnavailable, errors.DiskFailed: the gravest that
                went wrong; the others are ended first.
        """
        artifacts = [each for each in self._request.artifacts if each.tag not in _NOT_FETCHED]
        try:
            for artifact in self._request.artifacts:
                self._workspace.artifact(artifact.tag).mkdir(mode=0o700, exist_ok=True)
        except OSError as exc:
            raise errors.DiskFailed(f"the directories of the artifacts cannot be made: {exc}") from exc
        try:
            async with asyncio.TaskGroup() as group:

                def begin(artifact: Artifact) -> None:
                    if location := self.location(artifact.tag):
                        group.create_task(self._fetch(artifact, location), name=f"fetch {artifact.tag}")

                for artifact in artifacts:
                    if not artifact.mutable:
                        begin(artifact)
                mutable = [artifact for artifact in artifacts if artifact.mutable]
                absent = await asyncio.to_thread(self._absent, mutable)
                if absent:
                    log.debug("mutable artifacts are not there yet", artifacts=sorted(absent))
                for artifact in mutable:
                    if artifact.tag not in absent:
                        begin(artifact)
        except* errors.RunnerError as group_error:
            raise _first(group_error) from group_error

    def _absent(self, artifacts: list[Artifact]) -> set[str]:
        """Tags of artifacts that have no object yet, as far as one listing tells; blocking.

        The client puts those of an experiment below `experiments/<key>/`, and most of them are made by the run. Where they
        lie otherwise, or may not be listed, nothing is known.
        """
        places = {artifact.tag: self._folder(artifact) for artifact in artifacts}
        folders = Counter(folder for folder in places.values() if folder is not None)
        absent: set[str] = set()
        for folder, count in folders.items():
            if count > 1 and folder.at("") not in self._tools.unlistable:
                try:
                    there = {
                        info.key for info in itertools.islice(self.store(folder).list(folder.key), _LISTED)
                    }
                except errors.ArtifactFailed:  # each fetch will tell why
                    self._tools.unlistable.add(folder.at(""))
                    continue
                if len(there) < _LISTED:
                    here = (tag for tag, place in places.items() if place == folder)
                    absent |= {tag for tag in here if self._locations[tag].key not in there}
        return absent

    def _folder(self, artifact: Artifact) -> Location | None:
        """What the client calls its experiment's directory, if the artifact is in there."""
        location = self.location(artifact.tag)
        if location is None or location.scheme != "s3":
            return None
        folder = location.key.rpartition("/")[0] + "/"
        return location.at(folder) if f"/{folder}".endswith(f"/{self._request.key}/") else None

    async def _fetch(self, artifact: Artifact, location: Location) -> None:
        try:
            await self._in_thread(self._fetch_blocking, artifact, location)
        except NotFound as exc:
            if not artifact.mutable or exc.bucket_missing:
                raise
            log.debug("mutable artifact is not there yet", artifact=artifact.tag)
        except OSError as exc:
            raise errors.DiskFailed(f"artifact {artifact.tag!r} cannot be written: {exc}") from exc

    async def _in_thread(
        self, work: Callable[[Artifact, Location], None], artifact: Artifact, location: Location
    ) -> None:
        """As `asyncio.to_thread`, but when cancelled the thread is told, and waited for a moment: it writes where others clean up."""
        thread = asyncio.create_task(
            asyncio.to_thread(work, artifact, location), name=f"transfer {artifact.tag}"
        )
        thread.add_done_callback(_retrieve)
        try:
            await asyncio.shield(thread)
        except asyncio.CancelledError:
            self._cancelled.set()
            await asyncio.wait({thread}, timeout=CANCEL_SECS)
            raise

    def _fetch_blocking(self, artifact: Artifact, location: Location) -> None:
        store = self.store(location)
        directory = self._workspace.artifact(artifact.tag)
        cache = self._tools.cache if not artifact.mutable and location.scheme == "s3" else None
        with contextlib.ExitStack() as stack:
            if cache is not None:
                stream = stack.enter_context(
                    cache.open(store, location, store.stat(location.key), cancelled=self._cancelled)
                )
            else:
                stream = stack.enter_context(store.open(location.key))
            unpacked = archive.unpack(
                stream,
                directory,
                # What the message asked for; a disk that is full says so itself, and is not the message's fault.
                limits=archive.UnpackLimits(total_bytes=self._request.resources.hdd_bytes or sys.maxsize),
                name_if_file=_basename(location, artifact.tag),
                want=artifact.unpack,
                cancelled=self._cancelled,
            )
        for warning in unpacked.warnings:
            log.warning("artifact", artifact=artifact.tag, warning=warning)
        if artifact.mutable and (fingerprint := archive.fingerprint(directory)):
            self._stored[artifact.tag] = fingerprint

    async def upload(self, tags: Iterable[str] | None = None) -> list[errors.RunnerError]:
        """Store every mutable artifact (or those of `tags`) that changed since it was last stored, `output` first.

        Goes on over errors, and returns them; an artifact that failed is tried again the next time.
        """
        wanted = None if tags is None else set(tags)
        chosen = [
            artifact
            for artifact in self._request.artifacts
            if artifact.mutable
            and artifact.tag not in _CONTROL
            and (wanted is None or artifact.tag in wanted)
        ]
        changed = await asyncio.to_thread(lambda: [each for each in chosen if self._changed(each)])
        first = [artifact for artifact in changed if artifact.tag == "output"]
        rest = [artifact for artifact in changed if artifact.tag != "output"]
        failed = [await self._upload(artifact) for artifact in first]
        failed += await asyncio.gather(*map(self._upload, rest))
        return [exc for exc in failed if exc is not None]

    def _changed(self, artifact: Artifact) -> bool:
        """Whether there is something to store; blocking. One that cannot be looked at has: its upload tells what is wrong."""
        try:
            fingerprint = archive.fingerprint(self._workspace.artifact(artifact.tag))
        except OSError:
            return True
        return fingerprint is not None and fingerprint != self._stored.get(artifact.tag)

    async def _upload(self, artifact: Artifact) -> errors.RunnerError | None:
        location = self.location(artifact.tag)
        if location is None or location.scheme in {"http", "https"}:
            return None
        try:
            await self._in_thread(self._upload_blocking, artifact, location)
        except errors.Unreachable as exc:
            return exc  # whoever asked tells it once, not for each artifact
        except errors.RunnerError as exc:
            log.warning("artifact cannot be stored", artifact=artifact.tag, error=str(exc))
            return exc
        except OSError as exc:
            log.warning("artifact cannot be packed", artifact=artifact.tag, error=str(exc))
            return errors.DiskFailed(f"artifact {artifact.tag!r} cannot be packed: {exc}")
        return None

    def _upload_blocking(self, artifact: Artifact, location: Location) -> None:
        fingerprint = archive.fingerprint(self._workspace.artifact(artifact.tag))
        if fingerprint is None or self._stored.get(artifact.tag) == fingerprint:
            return
        with self._workspace.held(artifact.tag) as directory:
            self._store_blocking(artifact, location, directory)
        self._stored[artifact.tag] = fingerprint

    def _store_blocking(self, artifact: Artifact, location: Location, directory: Path) -> None:
        if artifact.unpack is False and (single := _single_file(directory)) is not None:
            with single as file:
                self.put(location, file, os.fstat(file.fileno()).st_size)
            return
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES, dir=str(self._workspace.private)) as spool:
            packed = cast("BinaryIO", spool)
            result = archive.pack(
                directory,
                packed,
                style=archive.style_for(
                    artifact.tag, from_completion_service=self._request.from_completion_service
                ),
                compression=archive.compression_for(location.key),
                not_before=_not_before(artifact, self._request),
            )
            for warning in result.warnings:
                log.warning("artifact", artifact=artifact.tag, warning=warning)
            size = packed.seek(0, 2)
            packed.seek(0)
            self.put(location, packed, size)

    def put(self, location: Location, source: BinaryIO, size: int) -> None:
        """Store bytes at a place, and count them. Blocking. Raises as `ObjectStore.put`."""
        self.store(location).put(location.key, source, size)
        self._tools.metrics.uploaded(size)


def _retrieve(thread: asyncio.Task[None]) -> None:
    """A transfer that nobody waits for any more may fail in peace."""
    if not thread.cancelled():
        thread.exception()


def _not_before(artifact: Artifact, request: Request) -> float:
    """What a result must not be older than for its reader to take it (INTEROP.md 4.2); 0: it does not matter."""
    if artifact.tag != "retval" or not request.from_completion_service or request.sent is None:
        return 0.0
    return min(request.sent, time.time() + SKEW_SECS) + SUBMISSION_SECS


def _basename(location: Location, tag: str) -> str:
    name = Path(urlsplit(location.key).path if location.scheme in {"http", "https"} else location.key).name
    return name or tag


def _single_file(directory: Path) -> BinaryIO | None:
    """All that is in it, opened, when that is one file. It is opened first: a workload may put a link there at any moment."""
    names = os.listdir(directory)  # noqa: PTH208 - names
    with contextlib.suppress(FileNotFoundError):
        return open_regular(directory / names[0]) if len(names) == 1 else None
    return None


def _first(group: BaseExceptionGroup[errors.RunnerError]) -> errors.RunnerError:
    """The gravest of several: what dead-letters before what retries, what counts before what does not."""
    found: list[errors.RunnerError] = []
    stack: list[BaseException] = [group]
    while stack:
        exc = stack.pop()
        if isinstance(exc, BaseExceptionGroup):
            stack.extend(exc.exceptions)
        elif isinstance(exc, errors.RunnerError):
            found.append(exc)
    return min(found, key=lambda exc: (exc.fate is not errors.Fate.REJECT, not exc.counts))
