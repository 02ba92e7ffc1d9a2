"""Submits an experiment as the real client does: packs a workspace, uploads it, publishes the message (INTEROP.md 2, 3)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import time
import uuid
from typing import TYPE_CHECKING, Any, Protocol, cast

from runner import errors
from runner.client import archives, message
from runner.client.interrupts import uninterrupted
from runner.queues.base import QueueGone
from runner.storage.base import Forbidden, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import BinaryIO

    from runner.client.order import Capture, Order, Queue
    from runner.storage.base import Location
    from runner.storage.registry import Stores


class Progress(Protocol):
    """Is told of what takes time: `step` begins something of so many bytes (None: unknown), and its result is told how many went."""

    def step(self, what: str, total: int | None) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """A context that is open while it lasts."""

    def warn(self, text: str) -> None:
        """Something is not as expected, but goes on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submitted:
    """What was published."""

    key: str
    queue: str
    digest: str  #: SHA-256 of the message: how a daemon knows it
    time_added: float  #: unix seconds; with the key it tells this message from others of the same experiment
    durable: bool  #: whether message and queue survive the broker
    locations: Mapping[str, Location]  #: where each artifact is, or will be

    def as_event(self) -> dict[str, Any]:
        """For --json; no secrets."""
        addresses = {tag: location.uri for tag, location in self.locations.items()}
        return {
            "event": "submitted",
            "experiment": self.key,
            "queue": self.queue,
            "digest": self.digest,
            "artifacts": addresses,
        }


def submit(order: Order, stores: Stores, progress: Progress) -> Submitted:
    """Pack, upload, publish. Blocking; nothing is published unless everything is stored.

    Raises:
        errors.UsageError: something is wrong with the order; nothing was sent.
        errors.RunnerError: the storage or the broker does not answer, or refuses.
    """
    order.check()
    if order.queue.amqp_url is not None:  # a broker that is away: told before gigabytes are uploaded
        with _publisher(order.queue):
            pass
    key = order.key or f"{int(time.time())}_{uuid.uuid4()}"
    with contextlib.ExitStack() as stack:
        files: dict[str, archives.Archive] = {}
        artifacts = []
        for capture in (order.workspace, *order.captures):
            if not capture.is_url and capture.path.exists():
                archive = files[capture.tag] = _packed(capture, stack, progress)
            else:
                archive = None
            artifacts.append(
                capture.artifact(
                    message.immutable_key(archive.digest)
                    if archive is not None and not capture.mutable
                    else message.mutable_key(key, capture.tag)
                )
            )
        body, request, locations = order.compose(key, artifacts)
        for tag, archive in files.items():
            _upload(tag, archive, locations[tag], stores, progress)
    durable = _publish(order, body, progress)
    return Submitted(
        key=key,
        queue=order.queue.name,
        digest=hashlib.sha256(body).hexdigest(),
        time_added=request.time_added or 0.0,
        durable=durable,
        locations=locations,
    )


def _packed(capture: Capture, stack: contextlib.ExitStack, progress: Progress) -> archives.Archive:
    """Its archive, open as long as `stack`."""
    with progress.step(f"packing {capture.tag}", None) as packing:
        archive = stack.enter_context(archives.packed(capture.path, progress=packing))
    for warning in archive.warnings:
        progress.warn(f"{capture.tag}: {warning}")
    return archive


def _upload(
    tag: str, archive: archives.Archive, location: Location, stores: Stores, progress: Progress
) -> None:
    store = stores.store(location)
    try:
        if location.key.startswith("blobstore/"):
            with contextlib.suppress(NotFound):
                if store.stat(location.key).size == archive.size:
                    return  # the same bytes: the key is their hash
        with progress.step(f"uploading {tag}", archive.size) as sending:
            source = archives.Counted(archive.file, sending)
            store.put(location.key, cast("BinaryIO", source), archive.size)
    except NotFound as exc:
        raise errors.RunnerError(
            f"there is no bucket {location.bucket} at {location.endpoint}: create it, or name another with --storage ({exc})"
        ) from exc
    except Forbidden as exc:
        why = "" if location.credentials else "; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set"
        raise errors.RunnerError(f"the storage refuses the upload: {exc}{why}") from exc


def _publish(order: Order, body: bytes, progress: Progress) -> bool:
    """Publish; whether queue and message are durable."""
    queue = order.queue
    try:
        if queue.root is not None:
            with uninterrupted():  # done or not done, and said so: it takes some milliseconds
                asyncio.run(_publish_to_directory(queue.root, queue.name, body))
            return True
        with _publisher(queue) as publisher:
            publisher.declare_like_client(queue.name, durable=order.persistent)
            durable: bool = publisher.is_durable(queue.name)
            if order.persistent and not durable:
                progress.warn(f"the queue {queue.name} exists and is transient: it is used as it is")
            publisher.publish(queue.name, body, durable=durable)
            return durable
    except QueueGone as exc:
        raise errors.RunnerError(
            f"the queue {queue.name} was deleted while the experiment was submitted"
        ) from exc


def _publisher(queue: Queue) -> Any:
    from runner.queues.rabbitmq_client import RabbitmqPublisher  # pika costs 0.1 s

    return RabbitmqPublisher(queue.amqp_url or "")


async def _publish_to_directory(root: Path, name: str, body: bytes) -> None:
    from runner.queues.filequeue import FileBackend

    backend = FileBackend(root)
    try:
        await backend.publish(await backend.declare(name), body)
    finally:
        await backend.aclose()
