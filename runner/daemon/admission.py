"""What becomes of one delivery: ended at once, handed to a run, or parked until there is room for it (DESIGN.md 5.1)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import structlog

from runner import errors
from runner.daemon import queuestate, reading

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from runner.daemon.attempts import Ledger
    from runner.daemon.endpoints import Endpoints
    from runner.daemon.queuestate import QueueState
    from runner.daemon.runs import Runs
    from runner.queues.base import Delivery
    from runner.request.model import Request, Resources
    from runner.resources.allocator import Allocation, Allocator
    from runner.resources.gpuwatch import GpuWatch
    from runner.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)


class Admission:
    """Sorts deliveries. Each is ended once, or belongs to a run or to `QueueState.parked` when `admit` returns."""

    def __init__(
        self,
        *,
        allocator: Allocator,
        gpus: GpuWatch,
        runs: Runs,
        ledger: Ledger,
        endpoints: Endpoints,
        metrics: Metrics,
        forbidden: Callable[[QueueState], str],
        permitted: Callable[[QueueState], Awaitable[None]],
    ) -> None:
        """`forbidden`: why nothing may start from a queue, room or not. `permitted` waits until nothing forbids it."""
        self._allocator = allocator
        self._gpus = gpus
        self._runs = runs
        self._ledger = ledger
        self._endpoints = endpoints
        self._metrics = metrics
        self._forbidden = forbidden
        self._permitted = permitted

    async def admit(self, state: QueueState, delivery: Delivery, room: Allocation | None = None) -> None:
        """End the delivery, hand it to a run, or park it. Cancelled (drained) before that: it goes back.

        `room`: a part of the machine for it, if it fits in; what it does not use is released.
        """
        try:
            await self._guarded(state, delivery, self._admit(state, delivery, room))
        finally:
            if room is not None:
                room.release()

    async def adopt(self, state: QueueState, delivery: Delivery) -> bool:
        """Whether a run in progress had lost that message, and has it again. Nothing else is taken."""
        twins = self._runs.find(state, delivery.digest)
        lost = any(active.delivery.lost.is_set() for active in twins)
        return delivery.redelivered and lost and await self._runs.adopt(twins, state, delivery)

    async def release(self, delivery: Delivery) -> None:
        """Put back what no run has adopted."""
        if not self._runs.holds(delivery):
            await self._put_back(delivery)

    async def _guarded(self, state: QueueState, delivery: Delivery, work: Awaitable[None]) -> None:
        """`work`, which is to end the delivery or to hand it on; whatever goes wrong there, it is not left without an end."""
        try:
            await work
        except asyncio.CancelledError:
            await self.release(delivery)
            raise
        except OSError as exc:
            wait = state.back_off(f"this host cannot start an experiment: {exc}")
            log.error(  # noqa: TRY400 - the error tells it all
                "nothing can be started here: is the disk full?",
                queue=str(state.ref),
                error=str(exc),
                wait_secs=round(wait),
            )
            await self._put_back(delivery, wait)
        except Exception as exc:
            log.exception("a message could not be handled", queue=str(state.ref))
            await self._fumbled(state, delivery, exc)

    async def _fumbled(self, state: QueueState, delivery: Delivery, exc: Exception) -> None:
        """A defect of ours: another attempt may go better, but not for ever."""
        reason, text = errors.Reason.RUNNER, f"the runner failed: {type(exc).__name__}: {exc}"
        wait = state.back_off(text)
        try:
            count = self._ledger.begin(state.ledger_key, delivery.digest, delivery.attempts)
        except OSError:
            count = 0
        self._ledger.failed(state.ledger_key, delivery.digest, reason, text)
        if count >= self._runs.settler.max_attempts:
            await self._runs.settler.reject(state, delivery, reason=reason, text=text, attempts=count)
        else:
            await self._put_back(delivery, wait)

    async def _put_back(self, delivery: Delivery, wait_secs: float = 0.0) -> None:
        self._metrics.delivery("requeue" if await delivery.requeue(wait_secs) else "lost")

    async def _admit(self, state: QueueState, delivery: Delivery, room: Allocation | None) -> None:
        if not delivery.redelivered:
            self._runs.published_anew(state, delivery.digest)
            state.found_room(delivery.digest)  # whatever is known of that is of another message
        if await self._may_start(state, delivery):
            await self._sort(state, delivery, room)

    async def _may_start(self, state: QueueState, delivery: Delivery) -> bool:
        """Whether the queue is open. A message that was on its way when it was closed is held for a while, or put back once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(queuestate.PARK_SECS):
                await self._permitted(state)
        if why := self._forbidden(state):
            log.info("put back unopened", queue=str(state.ref), why=why)
            await self._put_back(delivery)
            return False
        return True

    async def _sort(self, state: QueueState, delivery: Delivery, room: Allocation | None) -> None:
        if delivery.redelivered and await self._known(state, delivery):
            return
        digest = delivery.digest
        tried = self._ledger.attempts(state.ledger_key, digest)
        # Runs of the same bytes that are alive here have not failed (yet).
        count = max(tried.count, delivery.attempts) - len(self._runs.find(state, digest))
        request: Request | None = None
        try:
            request = await reading.request_of(delivery.body)
            if self._runs.resume(state, delivery, request):
                return
            if count >= self._runs.settler.max_attempts:
                text = f"gave up after {count} attempts: {tried.text or 'they were made by other hosts'}"
                await self._runs.settler.reject(
                    state,
                    delivery,
                    reason=errors.Reason.ATTEMPTS,
                    text=text,
                    attempts=count,
                    request=request,
                )
                return
            if self._runs.exhausted:  # by another queue, meanwhile
                await self._put_back(delivery)
                return
            self._runs.check(request)
            if (away := self._endpoints.away()) and (endpoint := self._runs.needs(request, away)):
                self._park(state, delivery, request, f"{endpoint} does not answer", endpoint)
                return
            await self._gpus.refresh(request.resources)
            allocation = self._allocator.allocate(request.resources, state.ledger_key, instead_of=room)
            self._start(state, delivery, request, allocation)
            state.remember(request.resources)
        except errors.Refused as exc:
            await self._runs.settler.reject(
                state, delivery, reason=exc.reason, text=str(exc), attempts=count, request=request
            )
        except errors.NotForThisHost as exc:
            await self._elsewhere(state, delivery, exc)
        except errors.NoCapacity as exc:
            assert request is not None
            self._park(state, delivery, request, exc.lacking)

    async def _known(self, state: QueueState, delivery: Delivery) -> bool:
        """Whether a redelivery is of what runs or has finished here; then it is dealt with (DESIGN.md 5.3)."""
        twins = self._runs.find(state, delivery.digest)
        if twins and await self._runs.adopt(twins, state, delivery):
            return True
        if self._ledger.finished(state.ledger_key, delivery.digest):
            log.info(
                "acknowledged a redelivery of what finished here",
                queue=str(state.ref),
                digest=delivery.digest[:12],
            )
            self._metrics.delivery("ack")
            await delivery.ack()
            return True
        return False

    def _start(self, state: QueueState, delivery: Delivery, request: Request, allocation: Allocation) -> None:
        """Run it. Raises OSError: nothing was started."""
        try:
            self._runs.start(state, delivery, request, allocation)
        except BaseException:
            allocation.release()
            raise
        state.found_room(delivery.digest)

    async def _elsewhere(self, state: QueueState, delivery: Delivery, exc: errors.NotForThisHost) -> None:
        """Other hosts are to have it, at once. What they have not taken is held here for a while before they may again.

        It would be the next one again, for ever: a message that is put back returns to the head of its queue.
        """
        if state.crowded(delivery.digest).put_backs:
            self._park(state, delivery, None, str(exc))
        else:
            await self._leave(state, delivery, str(exc))

    async def _leave(self, state: QueueState, delivery: Delivery, why: str) -> None:
        first = not state.crowded(delivery.digest).put_backs
        rest = round(state.leave(delivery, why))
        say = log.warning if first else log.debug
        say("left to other hosts", queue=str(state.ref), why=why, retry_secs=rest)
        await self._put_back(delivery)

    # -- parked

    def _park(
        self,
        state: QueueState,
        delivery: Delivery,
        request: Request | None,
        lacking: str,
        endpoint: str = "",
    ) -> None:
        """Hold it until it can start, or (`request` is None) for a while, and look at what comes behind it.

        To start it needs room, and before that an endpoint to answer, if one is named.
        """
        parked = queuestate.Parked(
            delivery=delivery, request=request, lacking=lacking, endpoint=endpoint, since=time.monotonic()
        )
        state.parked.append(parked)
        state.crowded(delivery.digest)
        state.forget_ask()
        parked.task = asyncio.create_task(self._hold(state, parked), name=f"parked {state.ref}")
        log.debug("parked", queue=str(state.ref), lacking=lacking)

    async def _hold(self, state: QueueState, parked: queuestate.Parked) -> None:
        """Until it starts, or its time is over: then `give_back` is left to do."""
        delivery, request = parked.delivery, parked.request
        until = time.monotonic() + state.park_secs(delivery)
        lost = asyncio.create_task(delivery.lost.wait(), name=f"parked {state.ref} lost")
        try:
            if request is None:
                await asyncio.wait({lost}, timeout=until - time.monotonic())
                return
            if parked.endpoint and not await self._reached(state, parked, request, lost, until):
                return
            allocation = await self.room(
                state,
                request.resources,
                since=state.crowded(delivery.digest).since,
                secs=until - time.monotonic(),
                unless=lost,
            )
            if delivery.lost.is_set() or self._forbidden(state):
                allocation.release()
            else:
                state.parked.remove(parked)
                await self._guarded(state, delivery, self._begin(state, delivery, request, allocation))
        except errors.NoCapacity:
            pass
        except errors.NotForThisHost as exc:  # a disk that others have filled
            state.parked.remove(parked)
            await self._elsewhere(state, delivery, exc)
        finally:
            lost.cancel()
            parked.over = True
            state.changed()

    async def _reached(
        self,
        state: QueueState,
        parked: queuestate.Parked,
        request: Request,
        lost: asyncio.Future[Any],
        until: float,
    ) -> bool:
        """Wait until the endpoints that it needs answer; False: they do not in time, or the message is lost."""
        while parked.endpoint:
            back = asyncio.create_task(self._endpoints.answers(parked.endpoint))
            try:
                await asyncio.wait(
                    {back, lost},
                    timeout=max(0.0, until - time.monotonic()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not back.done():
                    return False
            finally:
                back.cancel()
            parked.endpoint = self._runs.needs(request, self._endpoints.away())
        parked.lacking = self._allocator.short(request.resources, state.ledger_key)
        return True

    async def _begin(
        self, state: QueueState, delivery: Delivery, request: Request, allocation: Allocation
    ) -> None:
        self._start(state, delivery, request, allocation)

    async def room(
        self,
        state: QueueState,
        ask: Resources,
        *,
        since: float,
        secs: float,
        unless: asyncio.Future[Any],
    ) -> Allocation:
        """Wait for a part of the machine for a message that has waited since then; now and then it is kept for it.

        Raises:
            errors.NeverFits, and errors.NoCapacity: there was none within `secs`, or before `unless` was done.
        """
        until = time.monotonic() + secs
        while True:
            now = time.monotonic()
            keeps, stays_secs = queuestate.keeping(now - since)
            try:
                return await self._allocator.acquire(
                    ask,
                    owner=state.ledger_key,
                    rank=state.usage,
                    timeout_secs=max(0.0, min(until - now, stays_secs)),
                    keeps=keeps,
                    unless=unless,
                )
            except errors.NoCapacity:
                if unless.done() or time.monotonic() >= until:
                    raise

    async def give_back(self, state: QueueState) -> None:
        """Put back what was parked for as long as it may be. Not while the queue's consumer asks: it would come at once."""
        while parked := next((each for each in state.parked if each.over), None):
            state.parked.remove(parked)
            if parked.request is None:
                await self._leave(state, parked.delivery, parked.lacking)
                continue
            if parked.endpoint:
                state.strand(parked.delivery, parked.endpoint)
                log.info("put back for want of an endpoint", queue=str(state.ref), endpoint=parked.endpoint)
                await self._put_back(parked.delivery)
                continue
            rest = state.put_back(parked.delivery, parked.request.resources)
            log.info(
                "put back for want of room",
                queue=str(state.ref),
                lacking=parked.lacking,
                parked_secs=round(time.monotonic() - parked.since),
                rest_secs=round(rest),
                lost=parked.delivery.lost.is_set(),
            )
            await self._put_back(parked.delivery)

    async def clear(self, state: QueueState) -> None:
        """Put back all that is parked, now."""
        self.stop_holding(state)
        if tasks := [each.task for each in state.parked if each.task is not None]:
            await asyncio.wait(tasks)
        while state.parked:  # one by one: cancelled meanwhile, the rest is still to be found there
            await self._put_back(state.parked.pop().delivery)

    def stop_holding(self, state: QueueState) -> None:
        """What is parked does not start any more; it is for `clear` to put it back."""
        for each in state.parked:
            if each.task is not None:
                each.task.cancel()
