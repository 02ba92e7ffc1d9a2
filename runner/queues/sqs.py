"""AWS SQS (INTEROP.md 2.5, DESIGN.md 5.1, LEASE.md): one account in one region, standard and FIFO queues.

Long polls, one a waiting queue, each in a thread of its own. Of up to `POLLS` at a time: with more queues than that they take
turns, and each is listened to for a part of every 20 seconds. A message is held by renewing its visibility time-out, up to
SQS's 12 hours; after that it is kept in the state directory (`sqs_keep`). Nothing here makes, alters or deletes a queue.

The rights that it needs: sqs:ListQueues, GetQueueUrl, ReceiveMessage, DeleteMessage, ChangeMessageVisibility, SendMessage.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING

from runner import errors
from runner.queues import base, sqs_keep
from runner.queues.sqs_access import Access, SqsTiming, clock
from runner.queues.sqs_consumer import SqsConsumer
from runner.queues.sqs_delivery import SqsDelivery
from runner.queues.sqs_keeper import Keeper
from runner.queues.sqs_service import Service, text_of
from runner.queues.sqs_threads import Threads

if TYPE_CHECKING:
    from pathlib import Path

    from runner.queues.sqs_account import SqsAccount
    from runner.queues.sqs_service import Received

POLLS = 100  #: long polls at a time; each has a thread and a connection
CALLS = 16  #: other calls at a time
CLOSE_SECS = 5.0


class SqsBackend(base.QueueBackend):
    """One account in one region: discovers its queues, consumes them, publishes to them."""

    kind = "sqs"

    def __init__(
        self, account: SqsAccount, *, keep: Path | None = None, timing: SqsTiming | None = None
    ) -> None:
        """`keep` is a directory of the state directory, of any number of accounts, for what runs longer than 12 hours.

        Without it such a message comes back to its queue at that time, while the run goes on.
        """
        self.account = account.label
        self._timing = timing or SqsTiming()
        self._service = Service(
            account, call_secs=self._timing.call_secs, poll_secs=self._timing.poll_secs, at_once=POLLS
        )
        self._access = Access(
            label=account.label,
            service=self._service,
            threads=Threads(f"sqs {account.label}", most=CALLS),
            timing=self._timing,
        )
        self._polls = Threads(f"sqs poll {account.label}", most=POLLS)
        self._keeper = Keeper(sqs_keep.Keep(keep), self._access, self.existence) if keep else None
        self._consumers: set[SqsConsumer] = set()
        self._held: set[SqsDelivery] = set()
        self._beside: set[asyncio.Task[bool]] = set()
        self._under_way: dict[
            asyncio.Task[tuple[float, float, Received | None]], str
        ] = {}  # polls, their queues
        self._closed = threading.Event()

    @property
    def identity(self) -> str:
        """The region and the account's number, which the first queue's URL tells."""
        return self._service.identity

    async def open(self) -> None:
        """Look what an earlier daemon kept. The account's files are read, and SQS is asked, when first needed."""
        if self._keeper is not None:
            await self._keeper.open()

    async def aclose(self) -> None:
        """Give back what is held. A poll under way dies with the process: what SQS still gives it comes back in a minute.

        But for polls of queues into which something was put back just now: those are waited for, as they may be what gets it.
        """
        self._closed.set()
        for consumer in tuple(self._consumers):
            consumer.fail(errors.QueueUnavailable(f"{self.account}: closed", endpoint=self.account))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECS):
                await asyncio.gather(*[delivery.give_up() for delivery in tuple(self._held)], *self._beside)
                since = clock() - self._timing.poll_secs
                filled = {name for name, when in self._service.filled.items() if when > since}
                if polls := [poll for poll, name in self._under_way.items() if name in filled]:
                    await asyncio.wait(polls)
        if self._keeper is not None:
            await self._keeper.aclose()
        self._service.close()

    async def discover(self) -> list[base.QueueInfo]:
        """As the contract says; a request per thousand queues."""
        names = await self._access.call(self._service.names)
        return [
            base.QueueInfo(ref=base.QueueRef(account=self.account, name=name))
            for name in names
            if not name.endswith(("_response", "_response.fifo"))
        ]

    async def consumer(self, queue: base.QueueRef) -> SqsConsumer:
        """As the contract says."""
        consumer = SqsConsumer(
            queue,
            receive=self._receive,
            give_back=self._give_back,
            on_close=self._consumers.discard,
        )
        self._consumers.add(consumer)
        return consumer

    async def existence(self, queue: base.QueueRef) -> base.Existence:
        """GONE when it is neither found nor listed, by its exact name, twice with some seconds between.

        One look is no proof: SQS's answers lag behind each other, and to somebody whose right to a queue was taken away it
        says that the queue does not exist (INTEROP.md 2.5 tells of false alarms). Deleted queues are listed for up to a minute.
        """
        try:
            for pause_secs in (self._timing.confirm_secs, 0.0):
                if await self._access.call(self._service.is_found, queue.name):
                    return base.Existence.HERE
                if await self._access.call(self._service.is_listed, queue.name):
                    return base.Existence.UNKNOWN
                await asyncio.sleep(pause_secs)
        except errors.QueueUnavailable:
            return base.Existence.UNKNOWN
        return base.Existence.GONE

    async def reclaim(self, queue: base.QueueRef, body: bytes) -> base.Delivery | None:
        """As the contract says: of the messages that this machine keeps. All others come back by themselves, in a minute."""
        return self._keeper.take(queue, body) if self._keeper is not None else None

    async def publish(self, queue: base.QueueRef, body: bytes) -> None:
        """As the contract says; on a FIFO queue as a group of its own, so that it holds up no other message.

        Raises `errors.MalformedMessage` as well, for what SQS cannot carry: too large, empty, or no text.
        """
        await self._access.call(self._service.send, queue.name, text_of(body))

    async def _receive(self, queue: base.QueueRef) -> SqsDelivery | None:
        """One long poll. Cancelling it leaves the poll itself under way."""
        poll = asyncio.create_task(self._polls.run(self._poll, queue.name), name=f"long poll {queue}")
        self._under_way[poll] = queue.name
        poll.add_done_callback(self._poll_ended)
        asked, until, received = await asyncio.shield(poll)
        if received is None:
            return None
        delivery = SqsDelivery(
            queue,
            received,
            self._access,
            since=asked,
            until=until,
            keeper=self._keeper,
            on_end=self._held.discard,
        )
        self._held.add(delivery)
        return delivery

    def _poll(self, name: str) -> tuple[float, float, Received | None]:
        """In a thread. When it was asked, until when the message is ours at least, and the message."""
        if self._closed.is_set():  # while it waited for its turn
            return 0.0, 0.0, None
        queues = max(1, self._polls.asking)
        wait_secs = max(1, self._timing.poll_secs * min(queues, POLLS) // queues)
        # Chosen at the very start of a poll that was answered at its end, it is still ours for the whole time.
        visibility_secs = wait_secs + self._timing.visibility_secs
        asked = clock()
        received = self._service.receive(name, wait_secs=wait_secs, visibility_secs=visibility_secs)
        if received is not None and self._closed.is_set():
            self._service.hold(name, received.handle, 0)
            received = None
        return asked, asked + visibility_secs, received

    def _poll_ended(self, poll: asyncio.Task[tuple[float, float, Received | None]]) -> None:
        del self._under_way[poll]
        if not poll.cancelled():
            poll.exception()  # when its consumer has gone, an error concerns nobody

    def _give_back(self, delivery: base.Delivery) -> None:
        task = asyncio.create_task(delivery.requeue(), name=f"give back {delivery.queue}")
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
