"""The daemon's side of consuming from RabbitMQ: what the thread of `rabbitmq_connection` hands over, and takes back."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING

import structlog
from pika import exceptions

from runner.queues import base, rabbitmq_channels, rabbitmq_connection, rabbitmq_hold, rabbitmq_lease

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from runner import errors
    from runner.queues import rabbitmq_leases, rabbitmq_places

log = structlog.get_logger(__name__)

HANDOVER_SECS = (
    10.0  #: for acks, put-backs and pauses, which wait for the thread and at most a few round trips
)
VET_SECS = 20.0  #: for looking whether a lease has what was delivered again
VET_TRIES = 3
VET_AGAIN_SECS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crossing:
    """The two loops that a message goes between."""

    lane: rabbitmq_connection.Lane  #: the thread
    loop: asyncio.AbstractEventLoop  #: the daemon's

    def tell(self, func: Callable[..., object], *args: object) -> None:
        """From the thread: run `func(*args)` in the daemon's loop, soon."""
        with contextlib.suppress(RuntimeError):  # that loop has ended, and nobody waits for news
            self.loop.call_soon_threadsafe(func, *args)


class RabbitmqDelivery(base.Delivery):
    """A message that this process holds: on a channel, or in a lease queue, where it moves by itself when that takes long."""

    drops = True  # quorum queues of 4.x, after 20 deliveries

    def __init__(
        self,
        queue: base.QueueRef,
        hold: rabbitmq_hold.Hold,
        headers: Mapping[str, object],
        crossing: Crossing,
        *,
        redelivered: bool,
    ) -> None:
        """`redelivered`: by the broker's word. What returned from a lease is as much of a redelivery."""
        self.hold = hold
        super().__init__(
            queue=queue,
            body=hold.message.body,
            redelivered=redelivered or bool(rabbitmq_lease.stamp(headers).token),
            attempts=hold.attempt,
            headers={key: str(value) for key, value in headers.items()},
        )
        self.by_broker = redelivered
        self.deliveries = rabbitmq_lease.count(headers.get("x-delivery-count"))  # of quorum queues
        self.vetted = False  #: it is known that no lease has its message
        self._lane = crossing.lane
        self._ended = False
        hold.on_lost = lambda *, superseded: crossing.tell(self._lose, superseded)

    @property
    def attempts(self) -> int:
        """As the contract says; a copy in a lease says it, too, when it is renewed."""
        return self.hold.attempt

    @attempts.setter
    def attempts(self, attempts: int) -> None:
        self.hold.attempt = attempts

    async def began(self, attempt: int) -> None:
        """As the contract says. Only what was delivered before is leased at once: a first delivery costs nothing."""
        self.attempts = attempt
        if not self.redelivered and not self.hold.is_leased:
            return
        with contextlib.suppress(TimeoutError, rabbitmq_connection.Closed):
            await self._lane.call(self.hold.began, limit=HANDOVER_SECS)

    async def ack(self) -> bool:
        """As the contract says. Cancelling this call does not undo it."""
        return await self._end(self.hold.ack)

    async def requeue(self, delay_secs: float = 0) -> bool:  # noqa: ARG002 - RabbitMQ cannot: the caller waits
        """Put it back, at once.

        It returns to the head of its queue; or, where it has been leased or has an attempt to tell of, to the end.
        """
        return await self._end(self.hold.requeue)

    async def extend(self, secs: float) -> None:
        """Nothing to do: it is held for as long as this process lives."""

    async def _end(self, how: Callable[[], Awaitable[bool]]) -> bool:
        if self._ended:
            return False
        self._ended = True
        try:
            return await self._lane.call(how, limit=HANDOVER_SECS)
        except (TimeoutError, rabbitmq_connection.Closed):
            return False

    def _lose(self, superseded: bool) -> None:
        self.superseded = self.superseded or superseded
        self.lost.set()


class RabbitmqConsumer(base.Consumer):
    """One queue's channel. A message that has crossed from the thread is kept until `next` or `pause` takes it."""

    def __init__(
        self,
        queue: base.QueueRef,
        crossing: Crossing,
        link: rabbitmq_connection.Link,
        gate: asyncio.Semaphore,
        *,
        places: rabbitmq_places.Places,
        key: rabbitmq_places.Key,
        leases: rabbitmq_leases.Leases | None,
        is_quorum: Callable[[str], bool],
        on_first: Callable[[base.QueueRef], None],
        on_close: Callable[[RabbitmqConsumer], None],
    ) -> None:
        """`gate` bounds how many channels of `link` are opened at a time; `key` names the queue to `places`.

        `on_first` hears of the first message of each channel, `on_close` of the end; both in the daemon's loop.

        `is_quorum` tells whether a queue is known to be one; without `leases` messages are held by their channels only.
        """
        self._queue = queue
        self.key = key
        self._places = places
        self._leases = leases
        self._link = link
        self._crossing = crossing
        self._lane = crossing.lane
        self._on_first = on_first
        self._on_close = on_close
        self._subscription = rabbitmq_channels.Subscription(
            link,
            gate,
            queue.name,
            rabbitmq_channels.Events(
                message=self._cross,
                gone=functools.partial(crossing.tell, self._vanish),
                limit=lambda secs: None if leases is None else leases.learn_limit(secs),
                crowded=functools.partial(crossing.tell, self._shrink),
            ),
            is_quorum,
        )
        self._arrived: collections.deque[RabbitmqDelivery] = collections.deque()
        self._wake: asyncio.Future[None] | None = None
        self._failure: errors.QueueUnavailable | None = None
        self._closed = False
        self._used = False  # the thread has heard of it
        self._asking = False  # ... and has been asked, or is being asked no more

    async def next(self) -> base.Delivery:
        """As the contract says. Raises `errors.QueueUnavailable` only when the account is closed under it."""
        while True:
            if self._failure is not None:
                raise self._failure
            while self._arrived:
                fit = await self._vet(self._arrived[0])
                delivery = self._arrived.popleft()
                if fit and not delivery.lost.is_set():
                    return delivery
            assert not self._closed, "next() after close()"
            await self._ask()

    async def pause(self) -> None:
        """As the contract says; returns when the broker has confirmed that nothing more comes."""
        if self._asking or self._arrived:
            await self._settle(self._subscription.rest)

    async def close(self) -> None:
        """As the contract says; the channel closes with the last of its deliveries."""
        if not self._closed:
            self._closed = True
            self._on_close(self)
            self._places.leave(self)
            if self._used:
                await self._settle(self._subscription.close)

    def fail(self, error: errors.QueueUnavailable) -> None:
        """The account is closed: whoever waits in `next` gets this error."""
        self._failure = error
        self._look_up()

    @property
    def trouble(self) -> str:
        """As the contract says; of its connection, or of its channel."""
        if self._asking:
            return self._subscription.trouble
        return self._link.trouble if self._wake is not None else ""  # without a place it asks nothing itself

    @property
    def waiting(self) -> bool:
        """For `Places`: whether somebody is in `next`."""
        return self._wake is not None

    def placed(self) -> None:
        """For `Places`: whoever waits in `next` asks the broker from now on."""
        self._look_up()

    def displaced(self) -> None:
        """For `Places`: ask the broker no more; what is on its way still arrives."""
        if self._used:
            self._lane.post(self._subscription.retire)
        self._look_up()

    def _look_up(self) -> None:
        """Whoever waits in `next` looks again what there is for him."""
        if self._wake is not None:
            rabbitmq_connection.settle(self._wake, None)

    async def _vet(self, delivery: RabbitmqDelivery) -> bool:
        """Whether a message may be handed out. One whose like is held in a lease is acknowledged instead (docs/leases.md)."""
        if self._leases is None or delivery.vetted or not delivery.redelivered:
            return True
        look = functools.partial(self._leases.is_held, delivery.hold, redelivered=delivery.by_broker)
        held = False
        for left in reversed(range(VET_TRIES)):
            try:
                held = await self._lane.call(look, limit=VET_SECS)
                break
            except (exceptions.AMQPError, TimeoutError) as error:
                # Handed out unseen, it could be taken for a second copy of what is lost.
                log.debug("a redelivery cannot be looked into", queue=str(self._queue), error=str(error))
                if left:
                    await asyncio.sleep(VET_AGAIN_SECS)
                else:
                    await self._lane.call(self._leases.cannot_tell, delivery.hold, limit=HANDOVER_SECS)
            except rabbitmq_connection.Closed:
                return False
            if delivery.lost.is_set():
                return False
        delivery.vetted = True
        if held:
            log.info("acknowledged a redelivery of what is held in a lease", queue=str(self._queue))
            await delivery.ack()
        return not held

    async def _ask(self) -> None:
        """Wait until something has arrived, or its place has been given or taken. Raises `QueueGone`."""
        self._wake = self._crossing.loop.create_future()
        if self._places.ask(self):
            self._used = self._asking = True
            self._lane.post(self._subscription.want)
        try:
            await self._wake
        except (asyncio.CancelledError, base.QueueGone):
            if self._asking:
                self._lane.post(self._subscription.unwant)
            raise
        finally:
            self._wake = None

    async def _settle(self, stop: Callable[[], Awaitable[None]]) -> None:
        try:
            await self._lane.call(stop, limit=HANDOVER_SECS)
            self._asking = False
        except TimeoutError:
            log.warning("the broker does not confirm that it sends no more", queue=str(self._queue))
        except rabbitmq_connection.Closed:
            pass
        while self._arrived:  # whatever was sent before the confirmation has crossed before it
            await self._arrived.popleft().requeue()

    def _cross(self, held: rabbitmq_channels.Held) -> None:
        """In the thread: a message. Its digest is made here, off the daemon's loop."""
        message = rabbitmq_lease.Message(queue=self._queue.name, body=held.body, properties=held.properties)
        mark = rabbitmq_lease.stamp(held.headers)
        redelivered = held.redelivered or rabbitmq_lease.count(held.headers.get("x-delivery-count")) > 0
        if self._leases is None:
            hold = rabbitmq_hold.Hold(message, held, None, attempt=mark.attempt)
        else:
            again = redelivered or bool(mark.token)
            hold = self._leases.hold(held, message, mark.attempt, again=again)
        delivery = RabbitmqDelivery(self._queue, hold, held.headers, self._crossing, redelivered=redelivered)
        self._crossing.tell(self._arrive, delivery, held.first)

    def _arrive(self, delivery: RabbitmqDelivery, first: bool) -> None:
        self._arrived.append(delivery)
        self._places.active(self)
        if first:
            self._on_first(self._queue)
        self._look_up()

    def _shrink(self, channels: int) -> None:
        """Half of the channels, at most, are for those that wait; messages that are held need theirs, too."""
        self._places.shrink(max(1, channels // 2))

    def _vanish(self) -> None:
        if self._wake is not None:
            rabbitmq_connection.fail(self._wake, base.QueueGone(str(self._queue)))
