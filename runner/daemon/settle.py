"""The ends of deliveries: what becomes of each message is decided here (INTEROP.md 10, column REC; DESIGN.md rules 1 and 3)."""

from __future__ import annotations

import asyncio
import collections
from typing import TYPE_CHECKING, Any

import structlog

from runner import errors
from runner.experiment.outcome import Outcome, Status

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from runner.config import Config
    from runner.daemon.active import Active
    from runner.daemon.attempts import Ledger
    from runner.daemon.deadletters import DeadLetters
    from runner.daemon.endpoints import Endpoints
    from runner.daemon.queuestate import QueueState
    from runner.queues.base import Delivery
    from runner.request.model import Request
    from runner.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

#: A message is tried that often at the most (DESIGN.md rule 3), unless the operator asks for more retries.
MAX_ATTEMPTS = 3
#: How many ended attempts are kept in memory for `status`.
RECENT = 200


class Settler:
    """Ends each delivery once, and remembers how."""

    def __init__(
        self,
        *,
        config: Config,
        metrics: Metrics,
        ledger: Ledger,
        dead_letters: DeadLetters,
        endpoints: Endpoints,
        others: Callable[[QueueState, str], int],
    ) -> None:
        """`others`: the attempts of the runs in progress of those bytes."""
        self._metrics = metrics
        self._ledger = ledger
        self._dead_letters = dead_letters
        self._endpoints = endpoints
        self._others = others
        self._retries = config.runs.retries
        self.max_attempts = max(MAX_ATTEMPTS, self._retries + 1)
        self.recent: collections.deque[dict[str, Any]] = collections.deque(maxlen=RECENT)

    async def settle(self, active: Active, outcome: Outcome, results: Path | None) -> errors.Fate:
        """End the delivery of a run; what became of its message. `results`: where they are when they could not be stored."""
        active.settling = True
        queue, delivery = active.queue, active.delivery
        fate = self._fate(active, outcome)
        delivery.attempts = active.attempt if outcome.counts else active.attempt - 1
        if outcome.counts:
            self._ledger.failed(queue.ledger_key, delivery.digest, outcome.reason, outcome.text)
        else:
            self._ledger.undo(queue.ledger_key, delivery.digest)
        told = {
            "status": outcome.status,
            "reason": outcome.reason,
            "text": outcome.text,
            "exit_code": outcome.exit_code,
        }
        match fate:
            case errors.Fate.ACK:
                self._finish(queue, delivery, unique=not active.state.shared)
                queue.succeeded()
                in_time = await delivery.ack()
                self._metrics.delivery("ack" if in_time else "lost")
                log.info("experiment finished", **told, acknowledged=in_time)
            case errors.Fate.REQUEUE:
                wait = self._back_off(active, outcome)
                await delivery.requeue(wait)
                self._metrics.delivery("requeue")
                log.warning("experiment goes back to its queue", **told, wait_secs=round(wait, 1))
            case errors.Fate.REJECT:
                text = (
                    outcome.text
                    if outcome.fate is fate
                    else f"gave up after {active.attempt} attempts: {outcome.text}"
                )
                rejected = await self._dead_letter(
                    queue,
                    delivery,
                    reason=outcome.reason,
                    text=text,
                    attempts=active.attempt,
                    results=results,
                    unique=not active.state.shared,
                )
                fate = errors.Fate.REJECT if rejected else errors.Fate.REQUEUE
        return fate

    def _fate(self, active: Active, outcome: Outcome) -> errors.Fate:
        if outcome.fate is errors.Fate.REQUEUE and outcome.counts and active.attempt >= self.max_attempts:
            return errors.Fate.REJECT
        failed_by_itself = (
            outcome.status is Status.FAILED and not outcome.by_runner and outcome.fate is errors.Fate.ACK
        )
        if failed_by_itself and active.attempt <= self._retries:
            return errors.Fate.REQUEUE
        return outcome.fate

    def _back_off(self, active: Active, outcome: Outcome) -> float:
        """Until when the queue is left alone after a put-back: seconds, or until an endpoint answers."""
        queue, experiment, endpoint = active.queue, active.experiment, outcome.endpoint
        if outcome.reason in {errors.Reason.DRAINED, errors.Reason.LEASE_LOST}:
            return 0.0
        if endpoint and experiment.knows(endpoint):
            queue.wants(endpoint)
            self._endpoints.lost(endpoint, lambda: experiment.answers(endpoint))
            return 0.0
        return queue.back_off(outcome.text)

    def _finish(self, queue: QueueState, delivery: Delivery, *, unique: bool) -> None:
        others = self._others(queue, delivery.digest)
        self._ledger.finish(queue.ledger_key, delivery.digest, others=others, unique=unique)

    async def reject(
        self,
        queue: QueueState,
        delivery: Delivery,
        *,
        reason: errors.Reason,
        text: str,
        attempts: int,
        request: Request | None = None,
    ) -> None:
        """Dead-letter what does not run, and tell those who follow it. Goes on to its end when it is cancelled."""
        work = asyncio.create_task(
            self._dead_letter(queue, delivery, reason=reason, text=text, attempts=attempts)
        )
        try:
            rejected = await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait({work})
            raise
        if rejected:
            outcome = Outcome(status=Status.FAILED, reason=reason, text=text, fate=errors.Fate.REJECT)
            self.recent.append(
                {
                    "run": None,
                    "experiment": request.key if request is not None else None,
                    "project": request.project if request is not None else None,
                }
                | _ending(queue, delivery.digest, attempts, outcome, errors.Fate.REJECT, elapsed_secs=0.0)
            )

    async def _dead_letter(
        self,
        queue: QueueState,
        delivery: Delivery,
        *,
        reason: errors.Reason,
        text: str,
        attempts: int,
        results: Path | None = None,
        unique: bool = True,
    ) -> bool:
        """Dead-letter it, then remove it from its queue. False: it cannot be written, and the message goes back to its queue."""
        try:
            path = await asyncio.to_thread(
                self._dead_letters.add,
                delivery.queue,
                delivery.body,
                digest=delivery.digest,
                reason=reason,
                text=text,
                attempts=attempts,
                results=results,
                identity=queue.backend.identity,
            )
        except OSError as exc:
            wait = queue.back_off(f"a dead letter cannot be written: {exc}", at_least_secs=60)
            log.error(  # noqa: TRY400 - the error tells it all
                "a dead letter cannot be written; the message goes back to its queue",
                error=str(exc),
                wait_secs=round(wait),
            )
            self._metrics.delivery("requeue")
            await delivery.requeue(wait)
            return False
        self._finish(queue, delivery, unique=unique)
        self._metrics.dead_letter(reason)
        await delivery.reject()
        self._metrics.delivery("reject")
        log.warning(
            "message dead-lettered",
            queue=str(delivery.queue),
            reason=reason,
            text=text,
            attempts=attempts,
            path=str(path),
        )
        return True

    def remember(self, active: Active, outcome: Outcome, fate: errors.Fate, *, elapsed_secs: float) -> None:
        """An attempt is over."""
        self.recent.append(
            active.experiment.summary()
            | _ending(
                active.queue,
                active.state.digest,
                active.attempt,
                outcome,
                fate,
                elapsed_secs=elapsed_secs,
            )
        )


def _ending(
    queue: QueueState,
    digest: str,
    attempt: int,
    outcome: Outcome,
    fate: errors.Fate,
    *,
    elapsed_secs: float,
) -> dict[str, Any]:
    """What `recent` tells of an attempt that is over. Not `final`: its message went back to its queue."""
    return {
        "queue": str(queue.ref),
        "digest": digest,
        "attempt": attempt,
        "stage": "done",
        "status": outcome.status,
        "reason": outcome.reason,
        "text": outcome.text,
        "exit_code": outcome.exit_code,
        "fate": fate.value,
        "final": fate is not errors.Fate.REQUEUE,
        "elapsed_secs": round(elapsed_secs, 3),
    }
