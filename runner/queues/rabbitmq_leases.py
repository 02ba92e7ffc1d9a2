"""The leases of one vhost: what its holds share, and what is asked of all of them (docs/leases.md).

All of it runs in the thread of `rabbitmq_connection.Lane`.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import structlog
from pika import exceptions, spec

from runner.queues import rabbitmq_connection as wire
from runner.queues import rabbitmq_lease as lease
from runner.queues.rabbitmq_hold import Hold, now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from pika.channel import Channel

    from runner.config import RmqLease
    from runner.queues.rabbitmq_channels import Held

log = structlog.get_logger(__name__)

#: How long any single exchange on the consuming connection may take.
STEP_SECS = 8.0
#: Queues of this type hold messages that expire from this version on.
QUORUM_EXPIRY = (3, 10)


class Leases:
    """What the holds of one vhost share.

    Two connections: what publishes (hand-over, renewal, giving back) has one of its own, since a broker that is short
    of memory stops listening to it; what only ends or looks uses the consuming one.
    """

    def __init__(
        self,
        terms: RmqLease,
        owner: str,
        publishing: wire.Link,
        consuming: wire.Link,
        *,
        is_quorum: Callable[[str], bool],
    ) -> None:
        """`owner` names this daemon, the same after a restart; `is_quorum` tells of a request queue's type, if known."""
        self.terms = terms
        self.owner = owner
        self.publishing = publishing
        self.hand_over_secs = terms.hand_over_secs
        self._consuming = consuming
        self._is_quorum = is_quorum
        self._waiting: set[Hold] = set()  # every hold that has not ended
        self._moved: dict[str, set[Hold]] = {}  # those with a lease queue, by its name
        self._tasks: set[asyncio.Task[Any]] = set()
        self._said = False  # that leases are not permitted

    def hold(self, held: Held, message: lease.Message, attempt: int, *, again: bool) -> Hold:
        """A message has arrived. `again`: it will be asked of `is_held`, and is handed over after that at the earliest."""
        hold = Hold(message, held, self, attempt=attempt)
        self._waiting.add(hold)
        if not again:
            hold.schedule()
        return hold

    def add(self, hold: Hold) -> None:
        """It is going to have a lease queue."""
        self._moved.setdefault(hold.message.lease_queue, set()).add(hold)

    def remove(self, hold: Hold) -> None:
        """It has ended."""
        self._waiting.discard(hold)
        if (alike := self._moved.get(hold.message.lease_queue) if self._moved else None) is not None:
            alike.discard(hold)
            if not alike:
                del self._moved[hold.message.lease_queue]

    def forget_lost(self, successor: Hold) -> None:
        """The run of a lost hold has another one now."""
        for hold in self._alike(successor.message):
            if hold is not successor and hold.is_lost:
                hold.abandon()

    def learn_limit(self, secs: float) -> None:
        """The broker has said how long it lets a message be held: nothing is held for longer than half of that."""
        if secs / 2 < self.hand_over_secs:
            log.info(
                "the broker's limit on holding a message is short: leases begin sooner",
                link=self._consuming.label,
                limit_secs=secs,
                hand_over_secs=secs / 2,
            )
            self.hand_over_secs = secs / 2
            for hold in self._waiting:
                hold.reschedule()

    def spawn(self, work: Coroutine[Any, Any, bool]) -> asyncio.Task[bool]:
        """A task that `close` waits for."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Give back what is leased, and wait for what is being ended. The caller limits it."""
        for hold in tuple(self._waiting):
            _ = self.spawn(hold.close())
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))

    async def is_held(self, arrived: Hold, *, redelivered: bool) -> bool:
        """Whether a message that was delivered again is the original of one that is leased: then it is one too many.

        Holds of ours that turn out to have lost theirs have said so before this returns. `redelivered`: by the broker's
        word; a copy that returned from a lease does not say so, and proves by itself that it is not there any more.
        Raises AMQPError or TimeoutError.
        """
        for hold in self._alike(arrived.message):
            await hold.verify()
        if redelivered and await self._is_original(arrived.message):
            return True
        arrived.schedule()
        return False

    async def cannot_tell(self, arrived: Hold) -> None:
        """`is_held` failed too often: the message is taken for the only one there is, by the runs that have one like it, too."""
        for hold in self._alike(arrived.message):
            hold.give_up()
        arrived.schedule()

    async def _is_original(self, message: lease.Message) -> bool:
        try:
            async with self._channel() as channel:
                found = await lease.look(channel, message)
        except exceptions.ChannelClosedByBroker as error:
            if error.reply_code == lease.ACCESS_REFUSED:  # nor can this host lease anything
                return False
            raise
        # A copy that was renewed has outlived its original: what has come then is another message of the same bytes.
        return any(each.token and not each.seq for each in found or ())

    async def reclaim(self, queue: str, body: bytes) -> tuple[Hold, lease.Copy] | None:
        """Take over the lease of an earlier process of this daemon. Raises AMQPError or TimeoutError."""
        bare = lease.Message(queue=queue, body=body, properties=spec.BasicProperties())
        ours = {hold.token for hold in self._alike(bare)}
        found: list[lease.Copy] = []
        hold = Hold(bare, None, self, attempt=0)

        def make(before: lease.Copy | None) -> spec.BasicProperties:
            assert before is not None
            found.append(before)
            mark = lease.Stamp(
                owner=self.owner,
                token=hold.token,
                seq=before.stamp.seq,
                attempt=before.stamp.attempt,
            )
            return lease.stamped(before.properties, mark, secs=self.terms.secs)

        sent = now()
        async with asyncio.timeout(STEP_SECS):
            channel = await self.publishing.channel()
            try:
                finding = await lease.renew(
                    channel,
                    bare,
                    lambda stamp: stamp.owner == self.owner and stamp.token not in ours,
                    make,
                    fresh=False,
                )
            finally:
                wire.discard(channel)
        if finding is not lease.Finding.OURS:
            return None
        hold.reclaimed(found[-1], sent + self.terms.secs)
        self._waiting.add(hold)
        self.add(hold)
        return hold, found[-1]

    # -- for the holds

    @property
    def generation(self) -> int:
        """Of the consuming connection: the same number means unbroken since."""
        return self._consuming.generation

    async def declare(self, channel: Channel, message: lease.Message) -> None:
        """Make the lease queue, of the kind that its request queue has. Raises AMQPError."""
        quorum = self._is_quorum(message.queue) and self.publishing.broker_version >= QUORUM_EXPIRY
        await lease.declare(channel, message, secs=self.terms.secs, quorum=quorum)

    async def look(self, hold: Hold) -> lease.Finding:
        """What is in its lease queue. Raises AMQPError or TimeoutError."""
        async with self._channel() as channel:
            found = await lease.look(channel, hold.message)
        if any(each.token == hold.token for each in found or ()):
            return lease.Finding.OURS
        return lease.Finding.OTHERS if found else lease.Finding.NOTHING

    async def finish(self, hold: Hold) -> bool:
        """Remove its copy and the lease queue; whether there was one. Raises AMQPError or TimeoutError."""
        async with self._channel() as channel:
            return await lease.finish(channel, hold.message, lambda stamp: stamp.token == hold.token)

    async def remove_if_empty(self, hold: Hold) -> None:
        """Remove the lease queue unless a copy waits in it. Raises AMQPError or TimeoutError."""
        async with self._channel() as channel:
            await lease.remove_if_empty(channel, hold.message)

    async def give_back(self, hold: Hold, attempt: int) -> bool:
        """Move its copy to its request queue; whether there was one. Raises AMQPError or TimeoutError."""
        async with self._channel(self.publishing) as channel:
            return await lease.give_back(
                channel, hold.message, lambda stamp: stamp.token == hold.token, attempt
            )

    async def may_try_again(self, hold: Hold, error: exceptions.ChannelClosedByBroker) -> bool:
        """The broker refused a hand-over: whether that may change soon."""
        if error.reply_code not in {lease.ACCESS_REFUSED, lease.PRECONDITION_FAILED}:
            return True
        with contextlib.suppress(exceptions.AMQPError, TimeoutError):
            # Ours, made before the refusal; or somebody's with another lease time.
            await self.remove_if_empty(hold)
        if error.reply_code == lease.PRECONDITION_FAILED:
            return True
        emit = log.debug if self._said else log.warning
        self._said = True
        emit(
            "long runs cannot be leased and keep holding their messages: the user lacks a permission",
            link=self.publishing.label,
            error=error.reply_text,
            needed=r"configure ^studio-runner\.lease\. , write ^amq\.default$ , read ^studio-runner\.lease\.",
        )
        return False

    def _alike(self, message: lease.Message) -> list[Hold]:
        return list(self._moved.get(message.lease_queue, ())) if self._moved else []

    @contextlib.asynccontextmanager
    async def _channel(self, link: wire.Link | None = None) -> AsyncIterator[Channel]:
        async with asyncio.timeout(STEP_SECS):
            channel = await (link or self._consuming).channel()
            try:
                yield channel
            finally:
                wire.discard(channel)
