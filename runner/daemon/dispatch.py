"""Which queue is asked next, and what is done with what it gives (DESIGN.md 5.1).

One task a queue. A queue is *open* while there is room for what it last asked for and nothing speaks against it: then its
consumer waits for the next message. A message that does not fit now is parked, unacknowledged, for a bounded time; when
capacity frees, the queue that has had the least of this machine lately goes first. After that time it is put back once, and
the queue waits for capacity, not for a timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import structlog

from runner import errors
from runner.daemon.queuestate import ELSEWHERE_SECS, QueueState
from runner.queues.base import Existence, QueueGone
from runner.request import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from runner.daemon.attempts import Ledger
    from runner.daemon.endpoints import Endpoints
    from runner.daemon.runs import Runs
    from runner.queues.base import Consumer, Delivery, QueueBackend, QueueRef
    from runner.request.model import Request, Resources
    from runner.resources.allocator import Allocator
    from runner.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

#: How long a message that fits this machine, but not now, is held before it is put back.
PARK_SECS = 60.0
#: A queue that has lost its room goes on listening for so long: closing and opening consumers at each start costs more.
LINGER_SECS = 1.0
#: After a queue was found gone or its broker away; discovery is what decides.
RECONSUME_SECS = 5.0
#: A closed queue is looked at again at least so often: room can come back without a word (a disk that others empty).
LOOK_SECS = 60.0
#: How long what is free is believed: asking costs a system call, and there may be thousands of queues.
FREE_SECS = 1.0
#: So many runs of one queue may wait for their storage without a part of the machine; then nothing more is taken from it.
MAX_WAITING = 16
#: Larger messages are decoded in a thread: the loop would stand still.
DECODE_IN_LOOP_BYTES = 128 << 10
#: How often the queues of running experiments are asked for: a deleted one stops its runs (DESIGN.md rule 11).
EXISTENCE_SECS = 15.0


class Dispatcher:
    """Opens and closes queues, admits messages. Made in the loop that it works in."""

    def __init__(
        self,
        *,
        allocator: Allocator,
        runs: Runs,
        ledger: Ledger,
        endpoints: Endpoints,
        metrics: Metrics,
        left_behind: Mapping[str, list[bytes]],
    ) -> None:
        """`left_behind`: messages of runs that the last daemon did not see to their end, by `QueueState.ledger_key`."""
        self._allocator = allocator
        self._runs = runs
        self._ledger = ledger
        self._endpoints = endpoints
        self._metrics = metrics
        self._left_behind = {queue: list(bodies) for queue, bodies in left_behind.items()}
        self._queues: dict[QueueRef, QueueState] = {}
        self._workers: dict[QueueRef, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()  # workers of queues that are not served any more
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._free: tuple[float, Resources] | None = None
        self._draining = False
        allocator.on_change(self.notify)

    @property
    def queues(self) -> list[QueueState]:
        """What is known of each queue that is served, or that experiments run from."""
        return list(self._queues.values())

    def notify(self) -> None:
        """Something changed that may open or close a queue. Cheap; callable often."""
        self._free = None
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()

    def serve(self, ref: QueueRef, backend: QueueBackend) -> None:
        """A queue was discovered: take work from it."""
        if self._draining or ref in self._workers:
            return
        state = self._queues.setdefault(ref, QueueState(ref=ref, backend=backend))
        state.backend = backend
        self._workers[ref] = asyncio.create_task(self._work(state), name=f"queue {ref}")

    def forget(self, ref: QueueRef) -> None:
        """A queue is not to be served any more; what runs from it finishes."""
        if worker := self._workers.pop(ref, None):
            worker.cancel()
            self._leaving.add(worker)
            worker.add_done_callback(self._leaving.discard)
        self._drop(ref)

    def _drop(self, ref: QueueRef) -> None:
        if ref not in self._workers and (state := self._queues.get(ref)) and not state.running:
            del self._queues[ref]

    async def drain(self) -> None:
        """Take no new message; give back what has not started. What runs is untouched."""
        self._draining = True
        workers = [*self._workers.values(), *self._leaving]
        self._workers.clear()
        for worker in workers:
            worker.cancel()
        if workers:
            await asyncio.wait(workers)

    async def watch_existence(self) -> None:
        """For ever: stop the runs whose queue was deleted. Seen twice, so that no hiccup cancels anything."""
        missing: set[QueueRef] = set()
        while True:
            await asyncio.sleep(EXISTENCE_SECS)
            states = list({active.queue for active in self._runs})
            found = await asyncio.gather(*[state.backend.existence(state.ref) for state in states])
            gone = {state.ref for state, seen in zip(states, found, strict=True) if seen is Existence.GONE}
            for state in states:
                if state.ref in gone & missing:
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
            return "the runner is draining"
        if self._runs.exhausted:
            return "the limit of tasks is reached"
        if state.endpoint:
            away = self._endpoints.away_secs(state.endpoint)
            if away is not None:
                return f"{state.endpoint} has not answered for {away:.0f} s"
            state.endpoint = ""
        if (wait := state.closed_until - time.monotonic()) > 0:
            return f"backing off for {wait:.0f} s more: {state.why}"
        if state.running >= MAX_WAITING and (waiting := self._runs.waiting(state)) >= MAX_WAITING:
            return f"the results of {waiting} experiments wait to be stored"
        return ""

    def _no_room(self, state: QueueState) -> str:
        if state.running and self._runs.orphaned(state):
            return ""  # its message is on its way back, and needs no room
        free = self._free_now()
        if free.cpus < 1:
            return "no core is free"
        ask = state.current_ask()
        if ask is not None and (short := self._allocator.lacking(ask, free)):
            return f"no room for what it last asked for: {short}"
        return ""

    def _free_now(self) -> Resources:
        now = time.monotonic()
        if self._free is None or now - self._free[0] > FREE_SECS:
            self._free = now, self._allocator.free
        return self._free[1]

    async def _until(self, state: QueueState, is_open: Callable[[], bool]) -> None:
        while not is_open():
            timers = [when - time.monotonic() for when in (state.closed_until, state.ask_until)]
            wait = min([timer for timer in timers if timer > 0] + [LOOK_SECS])
            await asyncio.wait({self._changed}, timeout=wait)

    async def _work(self, state: QueueState) -> None:
        """Until cancelled: take from the queue. One that is gone, or whose broker is, is tried again: `forget` ends the worker."""
        while True:
            try:
                await self._consume(state)
            except QueueGone:
                log.info("queue is gone", queue=str(state.ref))
            except errors.QueueUnavailable as exc:
                log.warning("queue is unavailable", queue=str(state.ref), error=str(exc))
            except Exception:
                log.exception("a queue cannot be served", queue=str(state.ref))
            await asyncio.sleep(RECONSUME_SECS)

    async def _consume(self, state: QueueState) -> None:
        consumer = await state.backend.consumer(state.ref)
        try:
            for body in self._left_behind.pop(state.ledger_key, ()):
                await self._until(state, lambda: not self.closed_because(state))
                if (delivery := await state.backend.reclaim(state.ref, body)) is not None:
                    await self._admit(state, delivery)
            while True:
                await self._until(state, lambda: not self.closed_because(state))
                if (delivery := await self._next(state, consumer)) is not None:
                    await self._admit(state, delivery)
        finally:
            await consumer.close()

    async def _next(self, state: QueueState, consumer: Consumer) -> Delivery | None:
        """The next message; None when the queue was closed meanwhile. For want of room only after a moment: it may come back."""
        wish = asyncio.create_task(consumer.next(), name=f"next {state.ref}")
        try:
            while not wish.done():
                news: set[asyncio.Future[Any]] = {wish, self._changed}
                await asyncio.wait(news, return_when=asyncio.FIRST_COMPLETED)
                if self._forbidden(state):
                    break
                if not wish.done() and self._no_room(state):
                    await asyncio.wait({wish}, timeout=LINGER_SECS)
                    if self.closed_because(state):
                        break
            wish.cancel()
            await asyncio.wait({wish})
        except asyncio.CancelledError:
            wish.cancel()
            await asyncio.wait({wish})
            if not wish.cancelled() and wish.exception() is None:  # it has come, and nobody would end it
                await wish.result().requeue()
            raise
        if wish.cancelled():
            await consumer.pause()
            return None
        return wish.result()

    async def _admit(self, state: QueueState, delivery: Delivery) -> None:
        """End the delivery, or hand it to a run. Cancelled (drained) while it is parked: it goes back."""
        try:
            if not delivery.redelivered:
                self._runs.published_anew(state, delivery.digest)
            if await self._may_start(state, delivery):
                await self._sort(state, delivery)
        except asyncio.CancelledError:
            if not self._runs.holds(delivery):
                await self._put_back(delivery)
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
        self._metrics.delivery("requeue")
        await delivery.requeue(wait_secs)

    async def _may_start(self, state: QueueState, delivery: Delivery) -> bool:
        """Whether the queue is open. A message that was on its way when it was closed is parked, or put back once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PARK_SECS):
                await self._until(state, lambda: self._draining or not self._forbidden(state))
        if why := self._forbidden(state):
            log.info("put back unopened", queue=str(state.ref), why=why)
            await self._put_back(delivery)
            return False
        return True

    async def _sort(self, state: QueueState, delivery: Delivery) -> None:
        if delivery.redelivered and await self._known(state, delivery):
            return
        digest = delivery.digest
        tried = self._ledger.attempts(state.ledger_key, digest)
        # Runs of the same bytes that are alive here have not failed (yet).
        count = max(tried.count, delivery.attempts) - len(self._runs.find(state, digest))
        request: Request | None = None
        try:
            request = await self._decode(delivery.body)
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
            state.remember(request.resources)
            await self._start(state, delivery, request)
            state.crowded = 0
        except errors.Refused as exc:
            await self._runs.settler.reject(
                state, delivery, reason=exc.reason, text=str(exc), attempts=count, request=request
            )
        except errors.NotForThisHost as exc:
            await self._elsewhere(state, delivery, exc)
        except errors.NoCapacity as exc:
            log.info(
                "put back for want of room", queue=str(state.ref), lacking=exc.lacking, parked_secs=PARK_SECS
            )
            state.crowded += 1
            if request is not None:
                state.remember(request.resources)
            await self._put_back(delivery)

    async def _decode(self, body: bytes) -> Request:
        if len(body) > DECODE_IN_LOOP_BYTES:
            return await asyncio.to_thread(decode.decode, body)
        return decode.decode(body)

    async def _known(self, state: QueueState, delivery: Delivery) -> bool:
        """Whether a redelivery is of what runs or has finished here; then it is dealt with (DESIGN.md 5.3)."""
        twins = self._runs.find(state, delivery.digest)
        if twins and await self._runs.adopt(twins, delivery):
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

    async def _start(self, state: QueueState, delivery: Delivery, request: Request) -> None:
        """When there is room for it. Raises errors.NoCapacity, errors.NotForThisHost, OSError."""
        self._runs.check(request)
        allocation = await self._allocator.acquire(
            request.resources, rank=state.usage, timeout_secs=PARK_SECS
        )
        try:
            if self._runs.exhausted:  # by another queue, meanwhile
                raise errors.NoCapacity(
                    "the limit of tasks is reached", lacking="the limit of tasks is reached"
                )
            self._runs.start(state, delivery, request, allocation)
        except BaseException:
            allocation.release()
            raise

    async def _elsewhere(self, state: QueueState, delivery: Delivery, exc: errors.NotForThisHost) -> None:
        wait = state.back_off(str(exc), at_least_secs=ELSEWHERE_SECS)
        if state.left != delivery.digest:  # said once for each message, while it is the one that comes
            state.left = delivery.digest
            log.warning("left to other hosts", queue=str(state.ref), why=str(exc), retry_secs=round(wait))
        await self._put_back(delivery, wait)
