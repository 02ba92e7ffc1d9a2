"""Consumers and deliveries of directory queues."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Protocol

import structlog

from runner.queues.base import Consumer, Delivery, QueueRef

if TYPE_CHECKING:
    from pathlib import Path

    from runner.queues.file_messages import Message, Take, Taker

log = structlog.get_logger(__name__)

_BACKOFF_SECS = (0.5, 30.0)  #: first and longest wait while the file system is away


class Holder(Protocol):
    """What consumers and deliveries need of their backend."""

    async def take(self, queue: QueueRef, channel: Channel) -> Take:
        """Claim the oldest message. Raises `QueueGone`, OSError."""

    def hold(self, queue: QueueRef, message: Message) -> FileDelivery:
        """Hand a claimed message out."""

    async def forget(self, delivery: FileDelivery) -> bool:
        """End a delivery: the message is removed."""

    async def give_back(self, delivery: FileDelivery, delay_secs: float) -> bool:
        """End a delivery: the message goes back, now or later."""

    def release(self, consumer: FileConsumer) -> None:
        """A consumer is closed."""


class Bell:
    """Rings for everybody who waits, and remembers how often: a ring before the wait is not missed."""

    def __init__(self) -> None:
        self.rings = 0
        self.waiting = 0
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Wake all who wait."""
        self.rings += 1
        self._event.set()
        self._event = asyncio.Event()

    async def after(self, heard: int) -> None:
        """Wait until it has rung more often than `heard`."""
        self.waiting += 1
        try:
            while self.rings == heard:
                await self._event.wait()
        finally:
            self.waiting -= 1


class Channel:
    """What the consumers of one queue share."""

    def __init__(self, taker: Taker, directory: Path) -> None:
        self.taker = taker
        self.directory = directory
        self.bell = Bell()
        self.turn = asyncio.Lock()  # one takes at a time; the others would only meet it at the lock file
        self.consumers = 0


class FileDelivery(Delivery):
    """A message held as a file in the owner's directory."""

    def __init__(self, backend: Holder, queue: QueueRef, message: Message) -> None:
        super().__init__(queue=queue, body=message.body, redelivered=message.redelivered)
        self._backend = backend
        self.claim = message.claim

    async def ack(self) -> bool:
        """Remove the file."""
        return await self._backend.forget(self)

    async def requeue(self, delay_secs: float = 0) -> bool:
        """Put the file back, which keeps its age and with it its place. False also when the queue was removed."""
        return await self._backend.give_back(self, delay_secs)

    async def extend(self, secs: float) -> None:
        """Held for as long as the process lives."""


class FileConsumer(Consumer):
    """Takes are tasks that outlive a cancelled `next`: what they took is there for the following one, or for `pause`."""

    def __init__(self, backend: Holder, queue: QueueRef, channel: Channel) -> None:
        self._backend = backend
        self._queue = queue
        self._channel = channel
        self._taking: asyncio.Task[Take] | None = None
        self._heard = 0
        self._failures = 0
        self._closed = False

    async def next(self) -> Delivery:
        """The oldest whole message."""
        while True:
            if self._taking is None:
                self._heard = self._channel.bell.rings
                self._taking = asyncio.create_task(
                    self._backend.take(self._queue, self._channel), name="filequeue take"
                )
            await asyncio.wait({self._taking})
            taking, self._taking = self._taking, None
            wait_secs = None
            try:
                took = taking.result()
            except OSError as exc:
                wait_secs = self._backoff_secs(exc)
            else:
                self._failures, self._trouble = 0, ""
                if took.message is not None:
                    return self._backend.hold(self._queue, took.message)
                wait_secs = took.retry_secs
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_secs):
                    await self._channel.bell.after(self._heard)

    async def pause(self) -> None:
        """Give back what a cancelled `next` has taken."""
        taking, self._taking = self._taking, None
        if taking is None:
            return
        await asyncio.wait({taking})
        if taking.cancelled() or taking.exception() is not None:
            return
        message = taking.result().message
        if message is not None:
            await self._backend.hold(self._queue, message).requeue()

    async def close(self) -> None:
        """Pause, and stop watching."""
        await self.pause()
        if not self._closed:
            self._closed = True
            self._backend.release(self)

    @property
    def queue(self) -> QueueRef:
        """The queue that is consumed."""
        return self._queue

    def _backoff_secs(self, exc: OSError) -> float:
        first, longest = _BACKOFF_SECS
        wait_secs = min(longest, first * 2.0 ** min(self._failures, 10)) * random.uniform(0.5, 1.0)
        if self._failures == 0:
            log.warning("queue cannot be read, trying again", queue=str(self._queue), error=exc.strerror)
        self._failures += 1
        self._trouble = f"the queue's directory cannot be read: {exc.strerror}"
        return wait_secs
