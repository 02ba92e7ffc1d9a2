"""How one message is held: on its channel first, in its lease queue when that takes long (docs/leases.md).

::

    on its channel --hand-over--> leased --renewed, renewed ...--> ended: acknowledged, or given back
          |                          |
    its channel closed         its copy is not there any more: returned, or with another runner
          +-----------> lost <-------+

All of it runs in the thread of `rabbitmq_connection.Lane`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import random
import secrets
import time
from typing import TYPE_CHECKING, Protocol

import structlog
from pika import exceptions

from runner.queues import rabbitmq_connection as wire
from runner.queues import rabbitmq_lease as lease

if TYPE_CHECKING:
    from pika import spec

    from runner.queues.rabbitmq_channels import Held
    from runner.queues.rabbitmq_leases import Leases

log = structlog.get_logger(__name__)

#: How long one exchange with the broker may take at most, and how much of a lease time.
STEP_SECS = 8.0
STEPS_PER_LEASE = 6
#: How often another runner's copy is seen before ours is taken for gone.
SIGHTINGS = 3
#: How long the broker is given to write a lease queue down (killed before, it forgets it), and to hear an acknowledgement.
SETTLE_SECS = 2.0
#: How often it is looked whether another runner has what was lost.
LOST_SECS = 10.0


def now() -> float:
    """Seconds that pass while the machine sleeps, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class OnLost(Protocol):
    """Hears that a message is not held any more; `superseded`: another runner has it, or may have."""

    def __call__(self, *, superseded: bool) -> None:
        """It is gone."""


class Hold:
    """One message that this process has to settle. `attempt` is what a copy of it will say; the owner may set it any time."""

    def __init__(
        self, message: lease.Message, held: Held | None, leases: Leases | None, *, attempt: int
    ) -> None:
        self.message = message
        self.attempt = attempt
        self.token = secrets.token_hex(8)
        self.on_lost: OnLost | None = None
        self._attempt_on_channel = attempt
        self._leases = leases
        self._held = held  # on its channel; None once it is not
        self._lost = False
        self._ended = False
        self._leased = False
        self._in_doubt = False  # a copy may be in the lease queue: nobody has confirmed it
        # There may be a lease queue: what has returned from one leaves it behind.
        self._declared = bool(lease.stamp(message.properties.headers).token)
        self._seq = 0  # for as long as the original may be around
        self._expires = 0.0  # when the copy in the lease queue returns
        self._slept = False  # this process did not run for a while, and has not found its copy since
        self._due = math.inf  # a process that runs has looked after its copy by then
        self._turn = asyncio.Lock()  # one exchange about its copy at a time
        self._since = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._first_try = asyncio.Event()  # of the hand-over: it has come to an end, good or bad
        if held is not None:
            held.on_lost = self._channel_closed

    # -- for the daemon's side

    def schedule(self) -> None:
        """Have it handed over after a while."""
        if self._leases is not None and self._task is None and self._held is not None:
            due = self._since + self._leases.hand_over_secs - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due), self._begin)

    def reschedule(self) -> None:
        """That while has become shorter."""
        if self._timer is not None:
            self._timer.cancel()
            self.schedule()

    async def began(self) -> None:
        """Work on it starts, as `attempt`: not before its lease says so, if the broker lets us have one."""
        if self._leases is None or self._ended:
            return
        self._leases.forget_lost(self)
        if self._leased:
            with contextlib.suppress(exceptions.AMQPError, TimeoutError):
                await self._exchange(fresh=False)
        else:
            self._begin()
            await self._first_try.wait()

    async def ack(self) -> bool:
        """Forget it. False when it was lost, or could not be told in time: then it is tried on for as long as the lease lives."""
        return await self._end(requeue=False)

    async def requeue(self) -> bool:
        """Give it back, saying that it was tried `attempt` times. False as for `ack`."""
        if self._leases is not None and self.attempt != self._attempt_on_channel and not self._ended:
            # What is put back on its channel says nothing of attempts.
            self._begin()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.step_secs / 2):
                    await self._first_try.wait()
        return await self._end(requeue=True)

    # -- for `Leases`

    @property
    def is_lost(self) -> bool:
        """Whether the message is on its way back, or with another runner."""
        return self._lost

    @property
    def is_leased(self) -> bool:
        """Whether its message is in the lease queue, as far as is known."""
        return self._leased and not self._lost and not self._ended

    def reclaimed(self, before: lease.Copy, expires: float) -> None:
        """Its copy, of an earlier process, was made ours."""
        self.message = dataclasses.replace(self.message, properties=before.properties)
        self.attempt = before.stamp.attempt
        self._seq, self._expires = before.stamp.seq, expires
        self._leased = True
        self._first_try.set()
        self._task = asyncio.create_task(self._keep(), name=f"lease {self.message.lease_queue}")

    async def verify(self) -> None:
        """Something like it was delivered again: see whether our copy is still there. Raises AMQPError or TimeoutError."""
        assert self._leases is not None
        async with self._turn:
            if self._lost or self._ended or not (self._leased or (self._in_doubt and self._held is None)):
                return
            if await self._leases.look(self) is not lease.Finding.OURS:
                self._lose(
                    superseded=self._slept or now() > self._due
                )  # the message may be here before `_keep` is

    async def close(self) -> bool:
        """The account is being closed: what is leased goes back now, what is on its channel does so with that."""
        if not self.is_leased:
            self._stop()
            return False
        done = await self.requeue()
        if self.on_lost is not None:
            self.on_lost(superseded=False)
        return done

    def give_up(self) -> None:
        """What became of its copy cannot be found out, and a message like it is here."""
        if not self._lost and not self._ended and self._held is None:
            self._lose()

    def abandon(self) -> None:
        """Nobody cares any more."""
        self._ended = True
        self._stop()
        if self._leases is not None:
            self._leases.remove(self)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    # -- on its channel, and handed over

    def _channel_closed(self) -> None:
        self._held = None
        if not self._leased and not self._in_doubt:
            self._lose()  # and a hand-over that is about to publish does not

    def _lose(self, *, superseded: bool = False) -> None:
        self._lost = True
        self._first_try.set()
        if self.on_lost is not None and not self._ended:
            self.on_lost(superseded=superseded)

    def _begin(self) -> None:
        if self._leases is None or self._ended or self._lost or self._leased:
            self._first_try.set()
        elif self._task is None:
            self._first_try.clear()
            self._leases.add(self)
            self._task = asyncio.create_task(self._live(), name=f"lease {self.message.lease_queue}")

    async def _live(self) -> None:
        moved = await self._hand_over()
        self._first_try.set()
        if moved:
            await self._keep()
        elif self._held is None and not self._lost:
            self._lose()
        else:
            self._task = None  # it stays on its channel

    async def _hand_over(self) -> bool:
        """Put a copy into the lease queue; whether that was done. Tries until it knows."""
        assert self._leases is not None
        failures = 0
        while not self._lost:
            try:
                return await self._exchange(fresh=self._held is not None) is lease.Finding.OURS
            except exceptions.ChannelClosedByBroker as error:
                if not await self._leases.may_try_again(self, error):
                    self._declared = False
                    return False
            except (exceptions.AMQPError, TimeoutError) as error:
                log.debug("a message is not leased yet", queue=self.message.queue, error=wire.describe(error))
            if failures:
                self._first_try.set()
            failures += 1
            await asyncio.sleep(wire.backoff(failures, wire.UNREACHABLE_DELAY_SECS))
        return False

    async def _exchange(self, *, fresh: bool) -> lease.Finding:
        """Renew our copy; `fresh`: also where there is none. Raises AMQPError or TimeoutError."""
        assert self._leases is not None
        async with asyncio.timeout(self.step_secs):
            channel = await self._leases.publishing.channel()
        try:
            async with asyncio.timeout(self.step_secs), self._turn:
                if fresh:
                    self._declared = True
                    await self._leases.declare(channel, self.message)
                if self._lost or self._ended:
                    return lease.Finding.NOTHING
                sent, doubted = now(), self._in_doubt
                if fresh:
                    self._in_doubt, self._expires = True, sent + self._leases.terms.secs
                try:
                    finding = await lease.renew(channel, self.message, self._mine, self._make, fresh=fresh)
                except exceptions.ChannelClosedByBroker:
                    self._in_doubt = doubted  # the transaction was undone
                    raise
                if finding is lease.Finding.OURS:
                    self._leased, self._in_doubt = True, False
                    self._expires = sent + self._leases.terms.secs
                return finding
        finally:
            wire.discard(channel)

    @property
    def step_secs(self) -> float:
        """How long one exchange may take."""
        assert self._leases is not None
        return min(STEP_SECS, max(0.5, self._leases.terms.secs / STEPS_PER_LEASE))

    def _mine(self, stamp: lease.Stamp) -> bool:
        return stamp.token == self.token

    def _make(self, _before: lease.Copy | None) -> spec.BasicProperties:
        assert self._leases is not None
        mark = lease.Stamp(owner=self._leases.owner, token=self.token, seq=self._seq, attempt=self.attempt)
        return lease.stamped(self.message.properties, mark, secs=self._leases.terms.secs)

    # -- in its lease queue

    async def _keep(self) -> None:
        """Renew it, for ever. A copy that is gone is lost; with another runner, or gone while this process slept, superseded."""
        assert self._leases is not None
        secs = self._leases.terms.secs
        regular, settling = secs / 3, min(SETTLE_SECS, secs / STEPS_PER_LEASE)
        wait = regular if self._held is None else settling
        told_on: int | None = None
        failures = sightings = 0
        while True:
            self._due = now() + wait + 2 * self.step_secs + secs / 12
            # Two that hold the same bytes must not look at the same moments: each would see the other's copy only.
            await asyncio.sleep(wait * random.uniform(0.8, 1.0))
            told_on = await self._let_go(told_on)
            finding = await self._look_after()
            self._slept = self._slept or now() > self._due
            if finding is lease.Finding.OURS:
                self._seq += bool(self._seq)
                wait, failures, sightings, self._slept = regular if told_on is None else settling, 0, 0, False
            elif finding is None:
                failures += 1
                wait = wire.backoff(failures, min(wire.UNREACHABLE_DELAY_SECS, secs / 10))
            elif finding is lease.Finding.OTHERS and (sightings := sightings + 1) >= SIGHTINGS:
                self._lose(superseded=True)
                return
            elif finding is lease.Finding.OTHERS or (
                finding is lease.Finding.NOTHING and now() < self._expires
            ):
                wait = min(1.0, secs / 10) * random.uniform(0.3, 1.0)
            else:
                if self._slept or not self._lost:
                    self._lose(superseded=self._slept)
                if self._slept:
                    return
                wait = min(regular, LOST_SECS)

    async def _let_go(self, told_on: int | None) -> int | None:
        """Acknowledge the original, not before the broker had time to write its lease down; and see it gone, a while later.

        `told_on`, returned: the generation of the connection on which it was acknowledged just now.
        """
        assert self._leases is not None
        if self._held is not None:
            # Should that be too late, and the original come again: a copy whose `seq` is 0 says what it is.
            told, self._held = await self._held.ack(), None
            log.debug("a message is held by its lease from now on", queue=self.message.queue, told=told)
            return self._leases.generation if told else None
        if told_on is not None and told_on == self._leases.generation:
            self._seq = 1
        return None

    async def _look_after(self) -> lease.Finding | None:
        """Renew our copy, or see what became of it; None: the broker does not answer."""
        assert self._leases is not None
        try:
            if self._lost:
                async with self._turn:
                    return await self._leases.look(self)
            finding = await self._exchange(fresh=False)
            known = self._seq > 0 or self._held is not None
            if finding is lease.Finding.NO_QUEUE and now() < self._expires and known:
                log.warning(
                    "a lease queue was removed under its message: made again", queue=self.message.queue
                )
                return await self._exchange(fresh=True)
        except (exceptions.AMQPError, TimeoutError) as error:
            log.debug("a lease is not renewed", queue=self.message.queue, error=wire.describe(error))
            return None
        return finding

    # -- ended

    async def _end(self, *, requeue: bool) -> bool:
        if self._ended:
            return False
        if self._leases is None or not (self._leased or self._declared):
            self.abandon()
            return await self._end_on_channel(requeue=requeue)
        return await asyncio.shield(self._leases.spawn(self._end_lease(requeue=requeue)))

    async def _end_lease(self, *, requeue: bool) -> bool:
        assert self._leases is not None
        async with self._turn:  # what is under way comes to its end
            lost = self._lost
            self.abandon()
            if lost:
                return False
            done = await self._until_told(requeue=requeue)
            if self._held is None:
                return done
            return await self._end_on_channel(requeue=requeue and not done)  # its hand-over was not over

    async def _end_on_channel(self, *, requeue: bool) -> bool:
        if self._held is None:
            return False
        return await (self._held.requeue() if requeue else self._held.ack())

    async def _until_told(self, *, requeue: bool) -> bool:
        """End our copy; whether there was one. Tries for as long as it may be there."""
        assert self._leases is not None
        failures = 0
        while True:
            with contextlib.suppress(exceptions.AMQPError, TimeoutError):
                if await (
                    self._leases.give_back(self, self.attempt) if requeue else self._leases.finish(self)
                ):
                    return True
            if (self._held is not None and not self._leased) or now() >= self._expires:
                # Ours is not there, and only now that is sure: before, somebody's look may have had it for a moment.
                with contextlib.suppress(exceptions.AMQPError, TimeoutError):
                    await self._leases.remove_if_empty(self)
                return False
            failures += 1
            await asyncio.sleep(wire.backoff(failures, min(5.0, self._leases.terms.secs / 10)))
