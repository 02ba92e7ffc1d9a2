"""Experimenters who cancel: by their client's database record, or by a `_status` artifact (INTEROP.md 4.4).

The third way, deleting the queue, is the dispatcher's to see.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
from typing import TYPE_CHECKING, Any

import structlog

from runner import errors
from runner.request import document
from runner.request.model import Artifact, Request
from runner.storage.archive.decode import Feed, decoded
from runner.storage.archive.limits import Budget, UnpackLimits
from runner.storage.archive.sniff import HEAD_BYTES, Container, sniff
from runner.storage.archive.tarread import Kind, TarReader
from runner.storage.location import locate

if TYPE_CHECKING:
    from runner.config import Config
    from runner.storage.base import Location
    from runner.storage.registry import Stores

log = structlog.get_logger(__name__)

#: How often it is looked, as the client's own worker does.
LOOK_SECS = 10.0
#: A record is a message and a few times; a larger object is something else.
MAX_BYTES = 8 << 20
#: Of an archive: never more than that is decompressed, so that neither memory nor a thread is at its mercy.
_LIMITS = UnpackLimits(total_bytes=MAX_BYTES, ratio=1, ratio_floor_bytes=MAX_BYTES)
_TAG = "_status"
_FILE = "status.json"


class Cancellation:
    """Where one experiment's cancellation would be written down."""

    def __init__(self, request: Request, stores: Stores, config: Config) -> None:
        self._stores = stores
        self._places: dict[str, Location] = {}
        record = Artifact(tag="database", key=f"experiments/{request.key}")
        database = request.database
        if database is not None and database.type in {"s3", "local"} and database.bucket:
            self._place("the database record", record, dataclasses.replace(request, storage=database), config)
        if (status := request.artifact(_TAG)) is not None:
            self._place("the _status artifact", status, request, config)

    async def asked(self) -> str:
        """Wait until somebody asks for it; who. For ever, when nobody does or can. Servers that are away are asked again."""
        if not self._places:
            await asyncio.Event().wait()
        while True:
            await asyncio.sleep(LOOK_SECS)
            for name, location in self._places.items():
                if await asyncio.to_thread(self._says_stopped, location):
                    return name

    def _place(self, name: str, artifact: Artifact, request: Request, config: Config) -> None:
        try:
            self._places[name] = locate(
                artifact, request, config.s3, allow_env_secrets=config.runs.allow_env_secrets
            )
        except errors.Refused as exc:
            log.debug("cancelling this way is not possible", by=name, why=str(exc))

    def _says_stopped(self, location: Location) -> bool:
        try:
            with self._stores.store(location).open(location.key) as stream:
                data = stream.read(MAX_BYTES)
                while len(data) < MAX_BYTES and (more := stream.read(MAX_BYTES - len(data))):
                    data += more
        except errors.RunnerError as exc:
            log.debug("no word of cancelling", why=str(exc))  # usually: there is no such object
            return False
        return _stopped(data)


def _stopped(data: bytes) -> bool:
    """Whether a record, or the archive of a `_status` artifact, says so, in any case of letters."""
    try:
        record = document.loads(data)
    except ValueError:
        record = _archived(data)
    return isinstance(record, dict) and str(record.get("status", "")).lower() == "stopped"


def _archived(data: bytes) -> Any:
    """The `status.json` of an archive; None when there is none that can be read."""
    kind = sniff(data[:HEAD_BYTES], complete=len(data) <= HEAD_BYTES)
    if kind.container is not Container.TAR:
        return None
    budget = Budget(_LIMITS, None)
    archive = TarReader(decoded(Feed(io.BytesIO(data), budget), kind.compression, budget), _LIMITS)
    try:
        for member in archive:
            if member.kind is Kind.FILE and member.name.removeprefix("./") == _FILE:
                content = bytearray()
                archive.pour(content.extend)
                return document.loads(bytes(content))
    except (errors.ArchiveRefused, ValueError):
        return None
    return None
