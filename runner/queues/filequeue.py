"""Directories as queues: the embedded default, and what the Python client and the Go runner leave in one.

File work is done in threads of the backend's own: a directory may lie on a network file system that takes seconds, and
the loop's common threads may all be busy with uploads when a message has to be acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import structlog

from runner.errors import QueueUnavailable
from runner.queues.base import Consumer, Existence, QueueBackend, QueueGone, QueueInfo, QueueRef
from runner.queues.file_claims import Claims, Returned
from runner.queues.file_consumer import Channel, FileConsumer, FileDelivery
from runner.queues.file_keeper import Keeper
from runner.queues.file_messages import FileSettings, Message, Take, Taker
from runner.queues.file_names import NameSource, is_queue_name
from runner.queues.file_owner import Owner
from runner.queues.file_root import QueueRoot
from runner.queues.file_watch import DirectoryWatch, watch_root

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = structlog.get_logger(__name__)

T = TypeVar("T")

_CALL_SECS = 30.0  #: for one look at the file system
_CLOSE_SECS = 5.0  #: for giving back everything held


class FileBackend(QueueBackend):
    """The queues below one directory. Several daemons, also of several hosts, may serve the same one.

    The root is not made: a file system that is not mounted must not be replaced by an empty directory.
    """

    kind = "local"

    def __init__(
        self,
        root: Path,
        *,
        account: str = "local",
        host: str | None = None,
        settings: FileSettings | None = None,
    ) -> None:
        self.account = account
        self._settings = settings or FileSettings()
        self._root = QueueRoot(root)
        self._owner = Owner.here(host)
        self._claims = Claims(self._root, self._owner, stale_secs=self._settings.stale_secs)
        self._names = NameSource()
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="filequeue")
        self._channels: dict[str, Channel] = {}
        self._consumers: set[FileConsumer] = set()
        self._held: set[FileDelivery] = set()
        self._watch = DirectoryWatch(self._changed)
        self._keeper = Keeper(self._claims, self._settings, run=self._run, wake=self._wake, held=self._held)
        self._tasks: list[asyncio.Task[None]] = []
        self._serving = False  #: somebody has consumed
        self._closed = False
        self._shut = False

    # -- the contract ------------------------------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        """The directory, links resolved."""
        return f"file://{self._root.real}" if self._root.real else ""

    async def open(self) -> None:
        """Nothing to start before somebody consumes: a program that only submits needs no watch and no heartbeat."""

    async def aclose(self) -> None:
        """Stop; what is held goes back to its queue."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._watch.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECS):
                await asyncio.gather(*[consumer.close() for consumer in list(self._consumers)])
                held = sorted(self._held, key=lambda delivery: str(delivery.claim))
                await asyncio.gather(*[delivery.requeue() for delivery in held])
                for delivery in held:
                    delivery.lost.set()
                with contextlib.suppress(OSError):
                    await self._run(self._claims.close)
        self._shut = True
        self._held.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def on_queues_changed(self, told: Callable[[], None]) -> None:
        """Watches the root."""
        self._tasks.append(asyncio.create_task(watch_root(self._root.path, told), name="filequeue root"))

    async def discover(self) -> list[QueueInfo]:
        """Every visible sub-directory."""
        try:
            found = await self._bounded(self._root.discover)
        except (OSError, TimeoutError) as exc:
            raise self._unavailable(exc) from exc
        return [QueueInfo(ref=self.ref(name)) for name in found if not name.endswith("_response")]

    async def consumer(self, queue: QueueRef) -> Consumer:
        """A consumer; the first one starts the watch and the keeping of claims."""
        if not self._serving and not self._closed:
            self._serving = True
            self._watch.open()
            self._tasks += [
                asyncio.create_task(self._watch.run(), name="filequeue watch"),
                asyncio.create_task(self._rescan(), name="filequeue rescan"),
                asyncio.create_task(self._keeper.sweep(), name="filequeue sweep"),
                asyncio.create_task(self._keeper.heartbeat(), name="filequeue heartbeat"),
            ]
        channel = self._channels.get(queue.name)
        if channel is None:
            taker = Taker(self._root, queue.name, self._claims, self._owner, self._settings)
            channel = self._channels[queue.name] = Channel(taker, self._root.queue(queue.name))
        channel.consumers += 1
        consumer = FileConsumer(self, queue, channel)
        self._consumers.add(consumer)
        return consumer

    async def existence(self, queue: QueueRef) -> Existence:
        """GONE when the directory is missing from the same root on which it was last seen."""
        try:
            return await self._bounded(lambda: self._root.existence(queue.name))
        except (OSError, TimeoutError):
            return Existence.UNKNOWN

    async def publish(self, queue: QueueRef, body: bytes) -> None:
        """Confirmed when it is on the disk."""
        if not is_queue_name(queue.name):
            raise QueueGone(queue.name)
        try:
            await self._bounded(lambda: self._publish(queue.name, body))
        except (OSError, TimeoutError) as exc:
            if isinstance(exc, FileNotFoundError) and await self.existence(queue) is Existence.GONE:
                raise QueueGone(queue.name) from exc
            raise self._unavailable(exc) from exc

    # -- for clients -------------------------------------------------------------------------------------------------

    def ref(self, name: str) -> QueueRef:
        """The queue of that name in this account."""
        return QueueRef(account=self.account, name=name)

    async def declare(self, name: str) -> QueueRef:
        """Make a queue, and the root with it if need be. For those who submit; the daemon makes none.

        Raises ValueError for a name that cannot be one, `QueueUnavailable`.
        """
        if not is_queue_name(name):
            raise ValueError(f"not a queue's name: {name!r}")
        try:
            await self._bounded(lambda: self._root.queue(name).mkdir(parents=True, exist_ok=True))
        except (OSError, TimeoutError) as exc:
            raise self._unavailable(exc) from exc
        return self.ref(name)

    # -- for the consumers and deliveries ----------------------------------------------------------------------------

    async def take(self, queue: QueueRef, channel: Channel) -> Take:
        """Claim the oldest message. Raises `QueueGone`, OSError."""
        async with channel.turn:
            if self._closed:
                return Take()
            try:
                return await self._run(lambda: self._take(channel))
            except (FileNotFoundError, NotADirectoryError):
                if await self.existence(queue) is Existence.GONE:
                    raise QueueGone(queue.name) from None
                raise

    def hold(self, queue: QueueRef, message: Message) -> FileDelivery:
        """Hand a claimed message out."""
        delivery = FileDelivery(self, queue, message)
        self._held.add(delivery)
        return delivery

    async def forget(self, delivery: FileDelivery) -> bool:
        """End a delivery: the message is removed."""
        if delivery not in self._held:
            return False
        self._held.discard(delivery)
        try:
            done = await self._run(lambda: self._claims.forget(delivery.claim))
        except OSError as exc:
            self._keeper.owe(exc, lambda: self._claims.forget(delivery.claim))
            return False
        if not done:
            delivery.lost.set()
        return done

    async def give_back(self, delivery: FileDelivery, delay_secs: float) -> bool:
        """End a delivery: the message goes back, now or later."""
        if delivery not in self._held:
            return False
        self._held.discard(delivery)
        claim, name = delivery.claim, delivery.queue.name

        def put() -> Returned:
            return (
                self._claims.delay(claim, name, delay_secs)
                if delay_secs > 0
                else self._claims.give_back(claim, name)
            )

        try:
            became = await self._run(put)
        except OSError as exc:
            self._keeper.owe(exc, put)
            return True
        if became is Returned.LOST:
            delivery.lost.set()
        if delay_secs > 0:
            self._keeper.sweep_soon.set()
        else:
            self._wake(name)
        return became is Returned.BACK

    def release(self, consumer: FileConsumer) -> None:
        """A consumer is closed."""
        self._consumers.discard(consumer)
        channel = self._channels[consumer.queue.name]
        channel.consumers -= 1
        if channel.consumers == 0:
            del self._channels[consumer.queue.name]
            self._watch.remove(channel.directory)

    # -- within ------------------------------------------------------------------------------------------------------

    def _take(self, channel: Channel) -> Take:
        self._watch.add(channel.directory)  # before the look: what comes after it is told
        return channel.taker.take()

    def _publish(self, name: str, body: bytes) -> None:
        directory = self._root.queue(name)
        directory.lstat()
        part = self._claims.temporary() / uuid.uuid4().hex
        try:
            with part.open("xb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            part.rename(directory / self._names())
        except OSError:
            part.unlink(missing_ok=True)
            raise
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _changed(self, directory: Path | None) -> None:
        for channel in self._channels.values():
            if directory is None or channel.directory == directory:
                channel.bell.ring()

    def _wake(self, name: str) -> None:
        channel = self._channels.get(name)
        if channel is not None:
            channel.taker.invalidate()
            channel.bell.ring()

    async def _rescan(self) -> None:
        """Look where notifications may not come, for those who wait."""
        while True:
            await asyncio.sleep(self._settings.rescan_secs)
            waited = [channel for channel in self._channels.values() if channel.bell.waiting]
            for channel in await self._run(functools.partial(_with_work, waited)):
                channel.taker.invalidate()
                channel.bell.ring()

    async def _run(self, call: Callable[[], T]) -> T:
        """Do file work in a thread. It runs to its end also when the caller is cancelled."""
        if self._shut:
            raise OSError(errno.ESHUTDOWN, "the queues are closed")
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def _bounded(self, call: Callable[[], T]) -> T:
        """The same for what may be given up. Raises TimeoutError."""
        async with asyncio.timeout(_CALL_SECS):
            return await self._run(call)

    def _unavailable(self, exc: BaseException) -> QueueUnavailable:
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else "it does not answer"
        return QueueUnavailable(
            f"the queue directory {self._root.path} cannot be used: {why}", endpoint=str(self._root.path)
        )


def _with_work(channels: list[Channel]) -> list[Channel]:
    return [channel for channel in channels if channel.taker.has_work()]
