"""One message of SQS, held by renewing its visibility time-out, and kept on disk when SQS holds it no longer.

What a receipt handle does once its time is over is not defined: on standard queues SQS accepts it, and it may then hide or
delete what another runner has received. So time is kept here, on the careful side, and an expired handle is never used.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.queues import base, sqs_keep, sqs_service
from runner.queues.sqs_access import clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner.queues.sqs_access import Access
    from runner.queues.sqs_keeper import Keeper
    from runner.queues.sqs_service import Received

log = structlog.get_logger(__name__)

ACK_SECS = 60.0  #: an acknowledgement is tried for so long, while the hold lasts

LATE_SECS = 2.0  #: the end of a hold that is noticed later than that was slept through

_NO_ANSWER = (base.QueueGone, errors.QueueUnavailable)


class SqsDelivery(base.Delivery):
    """A message whose visibility time-out is renewed until it is ended, or lost."""

    def __init__(
        self,
        queue: base.QueueRef,
        received: Received,
        access: Access,
        *,
        since: float,
        until: float,
        keeper: Keeper | None,
        on_end: Callable[[SqsDelivery], None],
    ) -> None:
        """`since` is when it was asked for, `until` when it is ours no more without renewal; `on_end` is called once."""
        super().__init__(
            queue=queue,
            body=received.body.encode(),
            redelivered=received.receives > 1 or received.attempts is not None,
            attempts=received.attempts or 0,
        )
        self.deliveries = received.receives - 1
        self._received = received
        self._access = access
        self._since = since
        self._until = until
        self._limit = access.timing.hold_limit_secs
        self._keeper = keeper
        self._on_end = on_end
        self._ended = False
        self._retrying = False
        self._kept: sqs_keep.Kept | None = None
        self._deleted = False
        self._turn = asyncio.Lock()  # one call about this message at a time: they must arrive in order
        self._holding = asyncio.create_task(self._hold(), name=f"hold {queue}")

    async def ack(self) -> bool:
        """As the contract says; tried again, while the message is still ours, when SQS does not answer."""
        if not self._end():
            return False
        async with self._turn:
            self._holding.cancel()
            if self._kept is not None and self._keeper is not None:
                await self._delete()
                await self._keeper.forget(self._kept)
                return True
            return await self._delete()

    async def requeue(self, delay_secs: float = 0) -> bool:
        """As the contract says. Where SQS does not answer the message comes back when its time is over."""
        if not self._end():
            return False
        async with self._turn:
            self._holding.cancel()
            if self._kept is not None and self._keeper is not None:
                await self._delete()
                kept = dataclasses.replace(self._kept, attempts=self.attempts)
                await self._keeper.send_again(kept, delay_secs)
                return True
            with contextlib.suppress(*_NO_ANSWER, sqs_service.HoldLost, sqs_service.HoldAtItsEnd):
                if clock() < self._until:
                    await self._call(
                        self._access.service.hold, max(0, min(math.ceil(delay_secs), self._left()))
                    )
                    return True
            return False

    async def extend(self, secs: float) -> None:
        """As the contract says, up to SQS's limit of 12 hours. A failure is no news: the renewals go on."""
        async with self._turn:
            wanted = min(math.ceil(secs), self._left())
            if self._held_here() and clock() < self._until < clock() + wanted:
                with contextlib.suppress(*_NO_ANSWER, sqs_service.HoldLost, sqs_service.HoldAtItsEnd):
                    await self._renew(wanted)

    async def give_up(self) -> None:
        """The account is closed: the message goes back, and whoever has it hears that it is lost."""
        try:
            await self.requeue()
        finally:
            self.lost.set()

    def _end(self) -> bool:
        if self._ended or self.lost.is_set():
            return False
        self._ended = True
        self._on_end(self)
        return True

    def _lose(self, *, superseded: bool = False) -> None:
        self.superseded = superseded
        self.lost.set()
        self._on_end(self)

    def _held_here(self) -> bool:
        """Whether it is a visibility time-out that holds the message."""
        return not self._ended and not self.lost.is_set() and self._kept is None

    def _left(self) -> int:
        """Whole seconds that SQS lets us hold it in all."""
        return math.floor(self._since + self._limit - clock())

    async def _call(self, work: Callable[..., None], *args: object) -> None:
        await self._access.call(work, self.queue.name, self._received.handle, *args)

    async def _renew(self, secs: int) -> None:
        asked = clock()
        await self._call(self._access.service.hold, secs)
        self._until = asked + secs

    async def _hold(self) -> None:
        """Until the message is ended, lost, or kept."""
        while self._held_here():
            await asyncio.sleep(self._pause_secs())
            async with self._turn:
                if self._held_here():
                    await self._hold_on()

    def _pause_secs(self) -> float:
        timing, now = self._access.timing, clock()
        ours = self._until - now
        renew = timing.retry_secs if self._retrying else ours - timing.visibility_secs * 2 / 3
        # At SQS's limit there is no second more to be had.
        due = [ours] if self._left() < ours + 1 else [renew, ours]
        if self._keeper is not None:
            due.append(self._hand_over_at() - now)
        return max(0.0, min(due))

    def _hand_over_at(self) -> float:
        return self._since + self._limit - self._access.timing.margin_secs

    async def _hold_on(self) -> None:
        now = clock()
        if now >= self._until:
            log.warning(
                "a message is not held any more", queue=str(self.queue), held_secs=round(now - self._since)
            )
            self._lose(superseded=self._was_asleep(now))
        elif self._keeper is not None and now >= self._hand_over_at():
            await self._hand_over(self._keeper)
        else:
            self._retrying = False
            try:
                await self._renew(min(self._access.timing.visibility_secs, self._left()))
            except sqs_service.HoldLost:
                self._lose()
            except sqs_service.HoldAtItsEnd:
                self._limit = now - self._since  # earlier than we thought
            except _NO_ANSWER as error:
                self._retrying = True
                log.debug(
                    "a message could not be held for longer yet", queue=str(self.queue), error=str(error)
                )

    def _was_asleep(self, now: float) -> bool:
        """Whether this process did not run when the hold ended: another runner may have the message since. No outage is that late."""
        silence_secs = self._access.timing.call_secs if self._retrying else 0.0
        return now - self._until > silence_secs + LATE_SECS

    async def _hand_over(self, keeper: Keeper) -> None:
        """Keep the message here, and delete it there (LEASE.md). From the first try on it counts as deleted.

        A deletion that gets no answer may have happened. If it has not, the message comes back at SQS's limit, as a second
        copy; not to keep it could lose it.
        """
        kept = sqs_keep.Kept(
            account=self.queue.account,
            queue=self.queue.name,
            body=self._received.body,
            attempts=self.attempts,
            group=self._received.group,
        )
        try:
            self._kept = await keeper.save(kept)
        except OSError as error:
            log.warning(
                "a message cannot be kept here, and comes back", queue=str(self.queue), error=str(error)
            )
            self._keeper = None
            return
        log.info("a message is kept here from now on", queue=str(self.queue), file=self._kept.path.name)
        await self._delete()

    async def _delete(self) -> bool:
        """Delete the message, trying again while it is ours. Whether SQS has said yes in that time."""
        last = min(self._until, clock() + ACK_SECS)
        while clock() < last and not self._deleted:
            try:
                await self._call(self._access.service.delete)
                self._deleted = True
            except (base.QueueGone, sqs_service.HoldLost):
                break
            except errors.QueueUnavailable as error:
                log.debug("a message could not be deleted yet", queue=str(self.queue), error=str(error))
                await asyncio.sleep(self._access.timing.retry_secs)
        return self._deleted
