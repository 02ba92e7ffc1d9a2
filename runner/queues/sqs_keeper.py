"""What becomes of the messages that this machine keeps for SQS (`sqs_keep`): offered to new runs, sent again, forgotten."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.queues import base

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from runner.queues.sqs_access import Access
    from runner.queues.sqs_keep import Keep, Kept

log = structlog.get_logger(__name__)

LOOK_SECS = 60.0
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
        self._beside: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Look for what was left, now and then."""
        await self._look()
        _ = self._start(self._go_on_looking(), "kept messages")

    async def aclose(self) -> None:
        """What is not sent yet stays in its file, for another."""
        for task in self._beside:
            task.cancel()
        await asyncio.to_thread(self._keep.close)

    def take(self, queue: base.QueueRef, body: bytes) -> KeptDelivery | None:
        """That message, if it was left and has not been taken or sent again yet."""
        for kept, task in self._offered.items():
            if kept.queue == queue.name and kept.body.encode() == body:
                task.cancel()
                del self._offered[kept]
                return KeptDelivery(queue, kept, self)
        return None

    async def save(self, kept: Kept) -> Kept:
        """Keep a message, durably, or keep it as it is now. Raises OSError."""
        return await asyncio.to_thread(self._keep.save, kept)

    async def forget(self, kept: Kept) -> None:
        """The message is done with."""
        await asyncio.to_thread(self._keep.remove, kept)

    async def send_again(self, kept: Kept, delay_secs: float = 0) -> bool:
        """Put the message back into its queue: now (True), or as soon as SQS answers."""
        if await self._sent(kept, delay_secs):
            return True
        _ = self._start(self._resend(kept, RESEND_SECS), f"send again {kept.path.name}")
        return False

    async def _go_on_looking(self) -> None:
        """A backend of the same account that ends while this one works may leave something as well."""
        while True:
            await asyncio.sleep(LOOK_SECS)
            await self._look()

    async def _look(self) -> None:
        for kept in await asyncio.to_thread(self._keep.load, self._access.label):
            log.info("an earlier runner kept this message", queue=kept.queue, file=kept.path.name)
            resend = self._resend(kept, self._access.timing.offer_secs)
            self._offered[kept] = self._start(resend, f"send again {kept.path.name}")

    def _start(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
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

    async def began(self, attempt: int) -> None:
        """As the contract says: in its file."""
        self.attempts = attempt
        try:
            self._kept = await self._keeper.save(dataclasses.replace(self._kept, attempts=attempt))
        except OSError as error:
            log.warning("the attempts of a kept message cannot be written", error=str(error))

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
        await self._keeper.send_again(dataclasses.replace(self._kept, attempts=self.attempts), delay_secs)
        return True

    async def extend(self, secs: float) -> None:
        """Nothing to do."""
