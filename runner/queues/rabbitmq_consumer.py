"""The daemon's side of consuming from RabbitMQ: what the thread of `rabbitmq_connection` hands over, and takes back."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING

import structlog

from runner.queues import base, rabbitmq_channels, rabbitmq_connection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from runner import errors

log = structlog.get_logger(__name__)

HANDOVER_SECS = 10.0  #: for acks, put-backs and pauses, which wait for the thread and at most one round trip


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
    """A message that a channel of this process holds."""

    def __init__(
        self, queue: base.QueueRef, held: rabbitmq_channels.Held, lane: rabbitmq_connection.Lane
    ) -> None:
        super().__init__(
            queue=queue,
            body=held.body,
            redelivered=held.redelivered or _count(held.headers, "x-delivery-count") > 0,
            attempts=_count(held.headers, "attempt"),
            headers={key: str(value) for key, value in held.headers.items()},
        )
        self._held = held
        self._lane = lane
        self._ended = False

    async def ack(self) -> bool:
        """As the contract says. Cancelling this call does not undo it."""
        return await self._end(self._held.ack)

    async def requeue(self, delay_secs: float = 0) -> bool:  # noqa: ARG002 - RabbitMQ cannot: the caller waits
        """Put it back, at once; it returns to the head of its queue."""
        return await self._end(self._held.requeue)

    async def extend(self, secs: float) -> None:
        """Nothing to do: the broker holds it for as long as the channel is open."""

    async def _end(self, how: Callable[[], Awaitable[bool]]) -> bool:
        if self._ended:
            return False
        self._ended = True
        try:
            return await self._lane.call(how, limit=HANDOVER_SECS)
        except (TimeoutError, rabbitmq_connection.Closed):
            return False


def _count(headers: Mapping[str, object], name: str) -> int:
    """A header that counts something; 0 when it is missing or is no count."""
    try:
        return max(0, int(str(headers.get(name, 0))))
    except ValueError:
        return 0


class RabbitmqConsumer(base.Consumer):
    """One queue's channel. A message that has crossed from the thread is kept until `next` or `pause` takes it."""

    def __init__(
        self,
        queue: base.QueueRef,
        crossing: Crossing,
        link: rabbitmq_connection.Link,
        *,
        on_first: Callable[[base.QueueRef], None],
        on_close: Callable[[RabbitmqConsumer], None],
    ) -> None:
        """`on_first` hears of the first message of each channel, `on_close` of the end; both in the daemon's loop."""
        self._queue = queue
        self._crossing = crossing
        self._lane = crossing.lane
        self._on_first = on_first
        self._on_close = on_close
        self._subscription = rabbitmq_channels.Subscription(
            link,
            queue.name,
            rabbitmq_channels.Events(
                message=self._cross, gone=functools.partial(crossing.tell, self._vanish)
            ),
        )
        self._arrived: collections.deque[RabbitmqDelivery] = collections.deque()
        self._wake: asyncio.Future[None] | None = None
        self._failure: errors.QueueUnavailable | None = None
        self._closed = False

    async def next(self) -> base.Delivery:
        """As the contract says. Raises `errors.QueueUnavailable` only when the account is closed under it."""
        while True:
            if self._failure is not None:
                raise self._failure
            while self._arrived:
                delivery = self._arrived.popleft()
                if not delivery.lost.is_set():
                    return delivery
            assert not self._closed, "next() after close()"
            await self._ask()

    async def pause(self) -> None:
        """As the contract says; returns when the broker has confirmed that nothing more comes."""
        await self._settle(self._subscription.rest)

    async def close(self) -> None:
        """As the contract says; the channel closes with the last of its deliveries."""
        if not self._closed:
            self._closed = True
            self._on_close(self)
            await self._settle(self._subscription.close)

    def fail(self, error: errors.QueueUnavailable) -> None:
        """The account is closed: whoever waits in `next` gets this error."""
        self._failure = error
        if self._wake is not None:
            rabbitmq_connection.settle(self._wake, None)

    async def _ask(self) -> None:
        """Wait until something has arrived. Raises `QueueGone`."""
        self._wake = self._crossing.loop.create_future()
        self._lane.post(self._subscription.want)
        try:
            await self._wake
        except (asyncio.CancelledError, base.QueueGone):
            self._lane.post(self._subscription.unwant)
            raise
        finally:
            self._wake = None

    async def _settle(self, stop: Callable[[], Awaitable[None]]) -> None:
        try:
            await self._lane.call(stop, limit=HANDOVER_SECS)
        except TimeoutError:
            log.warning("the broker does not confirm that it sends no more", queue=str(self._queue))
        except rabbitmq_connection.Closed:
            pass
        while self._arrived:  # whatever was sent before the confirmation has crossed before it
            await self._arrived.popleft().requeue()

    def _cross(self, held: rabbitmq_channels.Held) -> None:
        """In the thread: a message. Its digest is made here, off the daemon's loop."""
        delivery = RabbitmqDelivery(self._queue, held, self._lane)
        held.on_lost = functools.partial(self._crossing.tell, delivery.lost.set)
        self._crossing.tell(self._arrive, delivery, held.first)

    def _arrive(self, delivery: RabbitmqDelivery, first: bool) -> None:
        self._arrived.append(delivery)
        if first:
            self._on_first(self._queue)
        if self._wake is not None:
            rabbitmq_connection.settle(self._wake, None)

    def _vanish(self) -> None:
        if self._wake is not None:
            rabbitmq_connection.fail(self._wake, base.QueueGone(str(self._queue)))
