"""What becomes of the messages that this machine keeps for SQS (`sqs_keep`): offered to new runs, sent again, forgotten."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.queues import base

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from runner.queues.sqs_access import Access
    from runner.queues.sqs_keep import Keep, Kept

log = structlog.get_logger(__name__)

RESEND_SECS = 60.0  #: longer than a send can take, so that none is repeated while it is still under way


class Keeper:
    """The kept messages of one account. A message leaves its file only when it is done with, or is in its queue again."""

    def __init__(
        self, keep: Keep, access: Access, exists: Callable[[base.QueueRef], Awaitable[base.Existence]]
    ) -> None:
        self._keep = keep
        self._access = access
        self._exists = exists
        self._offered: dict[Kept, asyncio.Task[None]] = {}
        self._resending: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Offer what an earlier daemon left. The attempt that it died in counts."""
        for left in await asyncio.to_thread(self._keep.load, self._access.label):
            log.info("an earlier runner kept this message", queue=left.queue, file=left.path.name)
            kept = dataclasses.replace(left, attempts=left.attempts + 1)
            self._offered[kept] = self._resend_later(kept, self._access.timing.offer_secs)

    def aclose(self) -> None:
        """What is not sent yet stays in its file, for the next daemon."""
        for task in self._resending:
            task.cancel()

    def take(self, queue: base.QueueRef) -> KeptDelivery | None:
        """What an earlier daemon left of this queue: a message at a time, each once."""
        for kept, task in self._offered.items():
            if kept.queue == queue.name:
                task.cancel()
                del self._offered[kept]
                return KeptDelivery(queue, kept, self)
        return None

    async def save(self, kept: Kept) -> Kept:
        """Keep a message, durably. Raises OSError."""
        return await asyncio.to_thread(self._keep.save, kept)

    async def forget(self, kept: Kept) -> None:
        """The message is done with."""
        await asyncio.to_thread(self._keep.remove, kept)

    async def send_again(self, kept: Kept, delay_secs: float = 0) -> bool:
        """Put the message back into its queue: now (True), or as soon as SQS answers."""
        if await self._sent(kept, delay_secs):
            return True
        _ = self._resend_later(kept, RESEND_SECS)
        return False

    def _resend_later(self, kept: Kept, wait_secs: float) -> asyncio.Task[None]:
        task = asyncio.create_task(self._resend(kept, wait_secs), name=f"send again {kept.path.name}")
        self._resending.add(task)
        task.add_done_callback(self._resending.discard)
        return task

    async def _resend(self, kept: Kept, wait_secs: float) -> None:
        while True:
            await asyncio.sleep(wait_secs)
            self._offered.pop(kept, None)
            if await self._sent(kept):
                break
            wait_secs = RESEND_SECS

    async def _sent(self, kept: Kept, delay_secs: float = 0) -> bool:
        """Whether there is nothing more to do for it."""
        try:
            await self._access.call(self._send, kept, delay_secs)
        except base.QueueGone:
            queue = base.QueueRef(account=kept.account, name=kept.queue)
            if await self._exists(queue) is not base.Existence.GONE:
                return False
            log.warning("a kept message is dropped: its queue was deleted", queue=kept.queue)
            await self.forget(kept)
        except errors.RunnerError as error:
            log.warning("a kept message cannot be sent again yet", queue=kept.queue, error=str(error))
            return False
        else:
            log.info("a kept message is in its queue again", queue=kept.queue)
        return True

    def _send(self, kept: Kept, delay_secs: float) -> None:
        """In a thread, as one call: a cancellation between sending and forgetting would make two of one message."""
        if not kept.path.exists():
            return
        send = self._access.service.send
        try:
            send(kept.queue, kept.body, attempts=kept.attempts, group=kept.group, delay_secs=delay_secs)
        except errors.MalformedMessage:  # as large as a message may be: the attribute is too much
            send(kept.queue, kept.body, group=kept.group, delay_secs=delay_secs)
        self._keep.remove(kept)


class KeptDelivery(base.Delivery):
    """A message that is in no queue: nobody else can get it, and it cannot be lost but with this machine."""

    def __init__(self, queue: base.QueueRef, kept: Kept, keeper: Keeper) -> None:
        super().__init__(queue=queue, body=kept.body.encode(), redelivered=True, attempts=kept.attempts)
        self._kept = kept
        self._keeper = keeper
        self._ended = False

    async def ack(self) -> bool:
        """Forget it."""
        if self._ended:
            return False
        self._ended = True
        await self._keeper.forget(self._kept)
        return True

    async def requeue(self, delay_secs: float = 0) -> bool:
        """Send it again; True even when SQS does not answer now: it will be sent, by this daemon or by the next."""
        if self._ended:
            return False
        self._ended = True
        await self._keeper.send_again(self._kept, delay_secs)
        return True

    async def extend(self, secs: float) -> None:
        """Nothing to do."""
