"""A message held from Pub/Sub: its lease is renewed here, for as long as the run lives."""

from __future__ import annotations

import asyncio
import collections
import math
from typing import TYPE_CHECKING

import structlog

from runner.queues import base
from runner.queues import pubsub_wire as wire

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from typing import Any

    from runner.queues.pubsub_client import Client

log = structlog.get_logger(__name__)

TELL_SECS = 30.0  #: for so long an ack or a put-back is tried again, while the lease is renewed beside it
LATE_SECS = 10.0  #: the end of a lease that is noticed later than that was slept through: a wait for an answer ends with it
LONGEST_DELAY_SECS = 600  #: Pub/Sub's limit
REMEMBERED = 10_000  #: message ids; some 200 bytes each


class PubsubDelivery(base.Delivery):
    """One message under a lease. `hold` comes first."""

    def __init__(
        self,
        queue: base.QueueRef,
        received: wire.Received,
        client: Client,
        *,
        lease_secs: int,
        redelivered: bool,
        on_end: Callable[[PubsubDelivery], None],
    ) -> None:
        super().__init__(
            queue=queue,
            body=received.body,
            redelivered=redelivered,
            attempts=_count(received.attributes, "attempt"),
            headers=received.attributes,
        )
        self.deliveries = max(
            0, received.attempt - 1
        )  # counted where the subscription has a dead-letter policy
        self.message_id = received.message_id
        self._ack_id = received.ack_id
        self._client = client
        self._lease_secs = lease_secs
        self._on_end = on_end
        self._subscription = queue.name + wire.SUFFIX
        self._ended: asyncio.Task[bool] | None = None
        self._renewed = asyncio.Event()
        self._renewing: asyncio.Task[None] | None = None

    async def hold(self, *, confirmed: bool) -> bool:
        """Start renewing the lease; False when it is lost already.

        With `confirmed` it waits until the service has granted it once: on an exactly-once subscription only then is
        the message ours.
        """
        self._renewing = asyncio.create_task(self._renew(), name=f"lease {self.queue} {self.message_id}")
        if confirmed:
            renewed = asyncio.create_task(self._renewed.wait())
            try:
                await asyncio.wait((renewed, self._renewing), return_when=asyncio.FIRST_COMPLETED)
            finally:
                renewed.cancel()
        return not self.lost.is_set()

    async def ack(self) -> bool:
        """As the contract says: True when the service has answered. Cancelling this call does not undo it.

        On a subscription without exactly-once delivery the answer to an ack that came too late is the same.
        """
        return await self._end(self._acknowledge)

    async def requeue(self, delay_secs: float = 0) -> bool:
        """As the contract says; a delay is rounded up to seconds, and cut to ten minutes."""
        secs = min(LONGEST_DELAY_SECS, math.ceil(max(0.0, delay_secs)))

        async def give_back() -> None:
            self._stop_renewing()  # or its next turn would take the message back
            await self._client.hold(self._subscription, self._ack_id, secs)

        return await self._end(give_back)

    async def extend(self, secs: float) -> None:
        """Nothing to do: the lease is renewed until the delivery ends."""

    def lose(self, why: str, *, superseded: bool = False) -> None:
        """The message is not ours any more; `superseded`: and another runner will have it by now."""
        if not self.lost.is_set():
            self.superseded = superseded
            self.lost.set()
            if self._ended is None:
                log.warning("message lost", queue=str(self.queue), message=self.message_id, reason=why)
        self._release()

    async def _acknowledge(self) -> None:
        await self._client.acknowledge(self._subscription, self._ack_id)

    async def _end(self, how: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        if self._ended is not None or self.lost.is_set():
            return False
        self._ended = asyncio.create_task(self._tell(how), name=f"end {self.queue} {self.message_id}")
        return await asyncio.shield(self._ended)

    async def _tell(self, how: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        why = "no answer"
        try:
            async with asyncio.timeout(TELL_SECS):
                failures = 0
                while not self.lost.is_set():
                    try:
                        await how()
                    except wire.Away as error:
                        why = str(error)
                        await asyncio.sleep(wire.backoff(failures))
                        failures += 1
                    else:
                        return True
        except (wire.Lapsed, wire.Missing, TimeoutError) as error:
            why = str(error) or why
        finally:
            self._release()
        log.warning("message not ended in time", queue=str(self.queue), message=self.message_id, reason=why)
        self.lose(why)
        return False

    async def _renew(self) -> None:
        """Hold the message until cancelled, or until it is lost: refused, or not renewed in time whatever the reason."""
        until, failures, why = wire.now() + wire.FIRST_LEASE_SECS, 0, "no answer"
        try:
            while True:
                asked = wire.now()
                try:
                    async with asyncio.timeout(until - asked):
                        await self._client.hold(self._subscription, self._ack_id, self._lease_secs)
                except wire.Away as error:
                    why = str(error)
                    await asyncio.sleep(min(wire.backoff(failures), max(0.0, until - wire.now())))
                    failures += 1
                else:
                    until, failures = (
                        asked + self._lease_secs,
                        0,
                    )  # from the asking: never later than the service
                    self._renewed.set()
                    await asyncio.sleep(max(0.0, asked + self._lease_secs / 2 - wire.now()))
                    if wire.now() > until:
                        self.lose("this process was not running", superseded=True)
                        return
        except TimeoutError:
            self.lose(f"not renewed in time: {why}", superseded=wire.now() - until > LATE_SECS)
        except (wire.Lapsed, wire.Missing) as error:
            self.lose(str(error))

    def _stop_renewing(self) -> None:
        if self._renewing is not None and self._renewing is not asyncio.current_task():
            self._renewing.cancel()

    def _release(self) -> None:
        self._stop_renewing()
        self._on_end(self)


class Ledger:
    """Which messages of an account are held, and which have been seen before."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], PubsubDelivery] = {}
        self._seen: collections.OrderedDict[tuple[str, str], None] = collections.OrderedDict()

    def note(self, queue: base.QueueRef, received: wire.Received) -> bool:
        """A message arrived; whether it was delivered before, as far as the service or this process knows.

        One that is still held here came again: that hold is lost. (An ack of the second copy would end both.)
        """
        key = queue.name, received.message_id
        before = self.held.get(key)
        if before is not None:
            before.lose("delivered again")
        seen = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return seen or received.attempt > 1

    def add(self, delivery: PubsubDelivery) -> None:
        """From now on it is held."""
        self.held[delivery.queue.name, delivery.message_id] = delivery

    def drop(self, delivery: PubsubDelivery) -> None:
        """It is held no more. Idempotent."""
        key = delivery.queue.name, delivery.message_id
        if self.held.get(key) is delivery:
            del self.held[key]


def _count(attributes: Mapping[str, str], name: str) -> int:
    """An attribute that counts something; 0 when it is missing or is no count."""
    try:
        return max(0, int(attributes.get(name, "0")))
    except ValueError:
        return 0
