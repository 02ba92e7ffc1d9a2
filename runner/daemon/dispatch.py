"""Which queue is asked next (DESIGN.md 5.1); `daemon.admission` decides what becomes of what it gives.

One task a queue. A queue is *open* while there is room for what it last asked for and nothing speaks against it: then its
consumer waits for the next message. A message that does not fit now is parked, unacknowledged, for a bounded time, and looked
past; when capacity frees, the queue that has had the least of this machine lately goes first. After that time it is put back
once. From then on its queue waits for that much room, and asks for the message when it has it: no change of capacity costs a
delivery unless the message starts.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import structlog

from runner import errors
from runner.daemon import queuestate
from runner.daemon.admission import Admission
from runner.daemon.gates import Gates
from runner.daemon.queuestate import MAX_PARKED, Asking, QueueState
from runner.queues.base import Existence, QueueGone

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from runner.daemon.attempts import Ledger
    from runner.daemon.endpoints import Endpoints
    from runner.daemon.runs import Runs
    from runner.queues.base import Consumer, Delivery, QueueBackend, QueueRef
    from runner.request.model import Resources
    from runner.resources.allocator import Allocation, Allocator
    from runner.resources.gpuwatch import GpuWatch
    from runner.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

#: How long room is held for a message that was asked for because there is room for it.
RESERVE_SECS = 5.0
#: After a queue was found gone or its broker away; discovery is what decides.
RECONSUME_SECS = 5.0
#: How long what is free is believed: asking costs a system call, and there may be thousands of queues.
FREE_SECS = 1.0
#: So many runs of one queue may wait for their storage without a part of the machine; then nothing more is taken from it.
MAX_WAITING = 16
#: How often the queues of running experiments are asked for: a deleted one stops its runs (DESIGN.md rule 11).
EXISTENCE_SECS = 15.0
#: A broker that takes longer to say says nothing: the runs of others' queues are not to wait for it.
EXISTENCE_LIMIT_SECS = 15.0


class Dispatcher:
    """Opens and closes queues, admits messages. Made in the loop that it works in."""

    def __init__(
        self,
        *,
        allocator: Allocator,
        gpus: GpuWatch,
        runs: Runs,
        ledger: Ledger,
        endpoints: Endpoints,
        metrics: Metrics,
        left_behind: Mapping[str, list[bytes]],
    ) -> None:
        """`left_behind`: messages of runs that the last daemon did not see to their end, by `QueueState.ledger_key`."""
        self._allocator = allocator
        self._runs = runs
        self._endpoints = endpoints
        self._left_behind = {queue: list(bodies) for queue, bodies in left_behind.items()}
        self._queues: dict[QueueRef, QueueState] = {}
        self._workers: dict[QueueRef, asyncio.Task[None]] = {}
        self._leaving: dict[
            asyncio.Task[None], QueueRef
        ] = {}  # workers of queues that are not served any more
        self._room: tuple[float, Resources] | None = None
        self._draining = False
        self._gates = Gates(shut=lambda: self._runs.exhausted and not self._draining, lacks=self._lacks)
        self._admission = Admission(
            allocator=allocator,
            gpus=gpus,
            runs=runs,
            ledger=ledger,
            endpoints=endpoints,
            metrics=metrics,
            forbidden=self._forbidden,
            permitted=self._permitted,
        )
        allocator.on_change(self.notify)

    @property
    def queues(self) -> list[QueueState]:
        """What is known of each queue that is served, or that experiments run from."""
        return list(self._queues.values())

    def notify(self) -> None:
        """Something changed that may open or close a queue. Cheap; callable often."""
        self._room = None
        self._gates.notify()

    def _changed(self, state: QueueState) -> None:
        orphaned = self._runs.orphaned(state)
        self._gates.changed(state, needs_room=not self._returns(state) and not orphaned)
        if orphaned or self._draining:  # then the others listen for nothing else
            for other in self._queues.values():  # the message may come by another account
                if other is not state and other.ledger_key == state.ledger_key:
                    self._gates.changed(other, needs_room=False)

    def serve(self, ref: QueueRef, backend: QueueBackend) -> None:
        """A queue was discovered: take work from it."""
        if self._draining or ref in self._workers:
            return
        state = QueueState(ref=ref, backend=backend, on_change=self._changed)
        if (known := self._queues.get(ref)) is not None and known.ledger_key == state.ledger_key:
            known.backend, state = backend, known
        else:  # or the account's file names another broker now
            self._queues[ref] = state
            self._runs.know(state)
        before = [worker for worker, its in self._leaving.items() if its == ref]
        self._workers[ref] = asyncio.create_task(self._work(state, before), name=f"queue {ref}")

    def forget(self, ref: QueueRef) -> None:
        """A queue is not to be served any more; what runs from it finishes."""
        if worker := self._workers.pop(ref, None):
            worker.cancel()
            self._leaving[worker] = ref
            worker.add_done_callback(self._leaving.pop)
            self._admission.stop_holding(self._queues[ref])
        self._drop(ref)

    def _drop(self, ref: QueueRef) -> None:
        if ref not in self._workers and (state := self._queues.get(ref)) and not state.running:
            del self._queues[ref]

    async def drain(self) -> None:
        """Take no new message; give back what has not started. What runs is untouched.

        A run that loses its message later is still found by it: its queue is listened to for that message alone, until it has
        come or the run is over. A second call ends that.
        """
        again, self._draining = self._draining, True
        for worker in self._workers.values():
            worker.cancel()
        workers = [*self._workers.values(), *self._leaving]  # those are putting back what they had
        self._workers.clear()
        if workers:
            await asyncio.wait(workers)
        if not again:
            running = {active.state.queue for active in self._runs}
            for state in self._queues.values():
                if state.ledger_key in running:
                    self._workers[state.ref] = asyncio.create_task(
                        self._await_returns(state), name=f"return {state.ref}"
                    )

    async def watch_existence(self) -> None:
        """For ever: stop the runs whose queue was deleted. Seen twice, so that no hiccup cancels anything."""
        missing: set[QueueState] = set()
        while True:
            await asyncio.sleep(EXISTENCE_SECS)
            states = list({active.queue for active in self._runs})
            found = await asyncio.gather(*[_existence(state) for state in states])
            gone = {state for state, seen in zip(states, found, strict=True) if seen is Existence.GONE}
            for state in gone & missing:  # not by name: an account's file may name another broker meanwhile
                self._cancel_runs_of(state)
            missing = gone
            for ref in list(self._queues):
                self._drop(ref)

    def _cancel_runs_of(self, state: QueueState) -> None:
        for active in self._runs:
            if active.queue is state:
                log.warning(
                    "the queue of a running experiment was deleted: stopping it",
                    queue=str(state.ref),
                    run=active.state.run_id,
                )
                active.experiment.stop(errors.Reason.QUEUE_DELETED, "its queue was deleted")

    def closed_because(self, state: QueueState) -> str:
        """Why nothing is taken from that queue now, in words; empty when it is open."""
        return self._forbidden(state) or self._no_room(state)

    def _forbidden(self, state: QueueState) -> str:
        if self._draining:
            return "" if self._runs.orphaned(state) else "the runner is draining"
        if self._runs.exhausted:
            return "the limit of tasks is reached"
        if state.endpoint:
            away = self._endpoints.away_secs(state.endpoint)
            if away is None:
                state.endpoint = ""
            elif time.monotonic() < state.endpoint_until:
                return f"{state.endpoint} has not answered for {away:.0f} s"
        if (wait := state.closed_until - time.monotonic()) > 0:
            return f"backing off for {wait:.0f} s more: {state.why}"
        if state.running >= MAX_WAITING and (waiting := self._runs.waiting(state)) >= MAX_WAITING:
            return f"the results of {waiting} experiments wait to be stored"
        return ""

    def _no_room(self, state: QueueState) -> str:
        if self._runs.orphaned(state):
            return ""  # its message is on its way back, and needs no room
        if why := self._allocator.closed():
            return why
        if state.full:
            return self.parked(state)
        asking = state.asking()
        if not self._lacks(asking):
            return ""
        room = self._room_now()
        if room.cpus < 1:
            kept = self._allocator.free.cpus >= 1
            return "room is kept for a message that has waited for long" if kept else "no core is free"
        short = self._allocator.short(asking.ask, asking.owner, room) if asking.ask is not None else ""
        return f"no room for what it last asked for: {short}"

    def parked(self, state: QueueState) -> str:
        """What is held until it can start, in words; empty when nothing is. What comes behind it may be taken."""
        held: dict[str, list[str]] = {}
        for parked in state.parked:
            want = "an endpoint" if parked.endpoint else "room"
            told = f"{parked.lacking} (for {time.monotonic() - parked.since:.0f} s)"
            held.setdefault(want, []).append(told)
        return "; ".join(
            f"{'1 message is' if len(told) == 1 else f'{len(told)} messages are'} parked for want of {want}: {'; '.join(told)}"
            for want, told in held.items()
        )

    def _returns(self, state: QueueState) -> bool:
        """Whether something that was parked has to be put back."""
        return any(parked.over for parked in state.parked)

    def _lacks(self, asking: Asking) -> bool:
        """Whether there is no room for queues that asked for that last."""
        room = self._room_now()
        return (
            bool(self._allocator.closed())
            or room.cpus < 1
            or (asking.ask is not None and bool(self._allocator.short(asking.ask, asking.owner, room)))
        )

    def _room_now(self) -> Resources:
        now = time.monotonic()
        if self._room is None or now - self._room[0] > FREE_SECS:
            self._room = now, self._allocator.room
        return self._room[1]

    def _wait_for(self, state: QueueState) -> str:
        """Why its worker has to wait. What was put back for want of room is waited for elsewhere, in `_reserved`."""
        if self._returns(state):
            return ""
        return self._forbidden(state) or ("" if state.waits_for_room else self._no_room(state))

    async def _opened(self, state: QueueState) -> None:
        """Wait until there is something to do for that queue."""
        while self._wait_for(state):
            room_alone = not self._forbidden(state) and not state.full
            await self._news(state, None if room_alone else lambda: not self._wait_for(state))

    async def _permitted(self, state: QueueState) -> None:
        """Wait until nothing but room speaks against that queue."""
        while self._forbidden(state):
            await self._news(state, lambda: not self._forbidden(state))

    async def _news(self, state: QueueState, ready: Callable[[], bool] | None) -> None:
        times = (state.closed_until, state.ask_until, state.endpoint_until)
        timers = [when - time.monotonic() for when in times]
        secs = min((timer for timer in timers if timer > 0), default=None)
        await self._gates.opened(state, ready, secs)

    async def _work(self, state: QueueState, before: Collection[asyncio.Task[None]]) -> None:
        """Until cancelled: take from the queue. One that is gone, or whose broker is, is tried again: `forget` ends the worker.

        `before`: earlier workers of that queue, which put back what they had.
        """
        if before:
            await asyncio.wait(before)
        try:
            while True:
                try:
                    await self._consume(state)
                except QueueGone:
                    log.info("queue is gone", queue=str(state.ref))
                    await self._admission.clear(state)
                except errors.QueueUnavailable as exc:
                    log.warning("queue is unavailable", queue=str(state.ref), error=str(exc))
                except Exception:
                    log.exception("a queue cannot be served", queue=str(state.ref))
                await asyncio.sleep(RECONSUME_SECS)
        finally:
            await self._admission.clear(state)

    async def _consume(self, state: QueueState) -> None:
        consumer = state.consumer = await state.backend.consumer(state.ref)
        try:
            older = self._left_behind.pop(state.older_key, ())
            for body in (*older, *self._left_behind.pop(state.ledger_key, ())):
                await self._opened(state)
                if (delivery := await state.backend.reclaim(state.ref, body)) is not None:
                    await self._admission.admit(state, delivery)
            while True:
                await self._opened(state)
                await self._admission.give_back(state)
                if state.waits_for_room and not self._runs.orphaned(state):
                    await self._take_into_room(state, consumer)
                elif (
                    not self.closed_because(state)
                    and (delivery := await self._next(state, consumer)) is not None
                ):
                    await self._admission.admit(state, delivery)
        finally:
            state.consumer = None
            await consumer.close()

    async def _await_returns(self, state: QueueState) -> None:
        """While draining: have runs that lose their messages adopt them. Gives up when others are in the way."""
        while True:
            await self._opened(state)
            try:
                if not await self._find_lost(state):
                    return
            except (QueueGone, errors.QueueUnavailable) as exc:
                log.info("a lost message cannot be asked for", queue=str(state.ref), error=str(exc))
            except Exception:
                log.exception("a lost message cannot be asked for", queue=str(state.ref))
            await asyncio.sleep(RECONSUME_SECS)

    async def _find_lost(self, state: QueueState) -> bool:
        """Whether the message that a run has lost was found. Others that come before it are held meanwhile, and put back once."""
        consumer = await state.backend.consumer(state.ref)
        others: list[Delivery] = []
        try:
            async with asyncio.timeout(None) as limit:
                while self._runs.orphaned(state) and len(others) <= MAX_PARKED:
                    delivery = await self._next(state, consumer)
                    if delivery is None:
                        continue
                    others.append(delivery)
                    if await self._admission.adopt(state, delivery):
                        others.remove(delivery)
                    elif len(others) == 1:
                        limit.reschedule(asyncio.get_running_loop().time() + queuestate.PARK_SECS)
        except TimeoutError:
            pass
        finally:
            await consumer.close()  # first, or they would come at once
            for delivery in others:
                await self._admission.release(delivery)
        return not self._runs.orphaned(state)

    async def _take_into_room(self, state: QueueState, consumer: Consumer) -> None:
        """Wait for the room that a message needs that was put back for want of it; then ask for the message."""
        room = await self._reserved(state)
        if room is None:
            return
        try:
            delivery = await self._next(state, consumer, RESERVE_SECS)
            if delivery is not None:
                await self._admission.admit(state, delivery, room)
            elif not self._forbidden(state):
                state.forget_ask()  # somebody else has it
        finally:
            room.release()

    async def _reserved(self, state: QueueState) -> Allocation | None:
        """That room; None when its time is over, or something else has come between."""
        ask = state.current_ask()
        if ask is None or self._forbidden(state):
            return None
        with self._gates.reserved(state) as news:
            try:
                return await self._admission.room(
                    state, ask, since=state.ask_since, secs=state.ask_until - time.monotonic(), unless=news
                )
            except errors.NoCapacity:
                return None
            except errors.NotForThisHost:  # a disk that others have filled: it is said when the message comes
                state.forget_ask()
                return None

    async def _next(
        self, state: QueueState, consumer: Consumer, reserved_secs: float | None = None
    ) -> Delivery | None:
        """The next message; None when the queue was closed meanwhile. For want of room only after a moment: it may come back.

        With `reserved_secs` there is room for it already, for so long.
        """
        wish = asyncio.create_task(consumer.next(), name=f"next {state.ref}")
        state.asked = True
        try:
            if reserved_secs is None:
                await self._listen(state, wish)
            else:
                with self._gates.reserved(state) as news:
                    ends: set[asyncio.Future[Any]] = {wish, news}
                    await asyncio.wait(ends, timeout=reserved_secs, return_when=asyncio.FIRST_COMPLETED)
            wish.cancel()
            await asyncio.wait({wish})
        except asyncio.CancelledError:
            wish.cancel()
            await asyncio.wait({wish})
            if not wish.cancelled() and wish.exception() is None:  # it has come, and nobody would end it
                await wish.result().requeue()
            raise
        finally:
            state.asked = False
        if wish.cancelled():
            await consumer.pause()
            return None
        return wish.result()

    async def _listen(self, state: QueueState, wish: asyncio.Task[Delivery]) -> None:
        """Until the wish is fulfilled, or the queue is not to be asked any more."""
        while not wish.done():
            no_room = await self._gates.closing(state, wish)
            if self._forbidden(state) or self._returns(state):
                return
            if no_room and self._no_room(state):
                return


async def _existence(state: QueueState) -> Existence:
    try:
        async with asyncio.timeout(EXISTENCE_LIMIT_SECS):
            return await state.backend.existence(state.ref)
    except TimeoutError:
        return Existence.UNKNOWN
