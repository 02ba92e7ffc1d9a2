"""The runs in progress: started, adopted, settled. What becomes of each message is decided here (INTEROP.md 10, column REC)."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any

import structlog

from runner import errors
from runner.daemon.runstate import RunState
from runner.experiment import lifecycle
from runner.experiment.lifecycle import Experiment
from runner.experiment.outcome import Outcome, Status
from runner.experiment.workspace import Workspace
from runner.telemetry import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from runner.config import Config
    from runner.daemon.attempts import Ledger
    from runner.daemon.deadletters import DeadLetters
    from runner.daemon.endpoints import Endpoints
    from runner.daemon.queuestate import QueueState
    from runner.daemon.runstate import RunStates
    from runner.experiment.tools import Tools
    from runner.queues.base import Delivery, QueueBackend
    from runner.request.model import Request
    from runner.resources.allocator import Allocation

log = structlog.get_logger(__name__)

#: A message is tried that often at the most (DESIGN.md rule 3).
MAX_ATTEMPTS = 3
#: How many finished runs are kept in memory for `status`.
RECENT = 200
#: Results that are not stored after this long give their part of the machine back, and go on trying.
DELIVERY_HOLDS_MACHINE_SECS = 120.0
#: How often it is looked whether a lost message has come back.
LOSS_SECS = 1.0


@dataclasses.dataclass(kw_only=True, eq=False)
class Active:
    """A run in progress and the delivery that its outcome will end."""

    queue: QueueState
    delivery: Delivery
    request: Request
    experiment: Experiment
    attempt: int
    state: RunState
    started: float = dataclasses.field(default_factory=time.time)
    backend: QueueBackend | None = None  #: that of its delivery; a queue may get another one while it runs
    settling: bool = False  #: its delivery is being ended: what comes again from now on is no copy of it
    task: asyncio.Task[None] | None = None


class Runs:
    """All runs of this daemon."""

    def __init__(
        self,
        *,
        config: Config,
        tools: Tools,
        ledger: Ledger,
        dead_letters: DeadLetters,
        states: RunStates,
        endpoints: Endpoints,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when something may have opened or closed a queue."""
        self._config = config
        self._tools = tools
        self._ledger = ledger
        self._dead_letters = dead_letters
        self._states = states
        self._endpoints = endpoints
        self._changed = changed
        self._active: dict[str, Active] = {}
        self.started_total = 0
        self.idle_since = time.monotonic()
        self.recent: collections.deque[dict[str, Any]] = collections.deque(maxlen=RECENT)

    def __iter__(self) -> Iterator[Active]:
        return iter(list(self._active.values()))

    def __len__(self) -> int:
        return len(self._active)

    def find(self, queue: QueueState, digest: str) -> list[Active]:
        """The runs in progress of that message: several, when experimenters publish the same bytes more than once."""
        return [
            active
            for active in self
            if active.state.queue == queue.ledger_key
            and active.state.digest == digest
            and not active.settling
        ]

    def orphaned(self, queue: QueueState) -> bool:
        """Whether a run of that queue has lost its message, which is on its way back: it should come here."""
        return any(
            active.queue is queue and active.delivery.lost.is_set() and not active.settling for active in self
        )

    def holds(self, delivery: Delivery) -> bool:
        """Whether a run in progress will end that delivery."""
        return any(active.delivery is delivery for active in self)

    def start(self, queue: QueueState, delivery: Delivery, request: Request, allocation: Allocation) -> None:
        """Run it, in a task of its own that ends the delivery. The attempt is counted before anything else happens.

        Raises:
            OSError: its directory cannot be made; nothing was started and nothing counted.
        """
        workspace = Workspace.create(self._config.paths.working_dir / "runs", request.key)
        _write_private(workspace.request, delivery.body)
        experiment = Experiment(
            request=request, workspace=workspace, tools=self._tools, granted=allocation.amounts
        )
        self._tools.metrics.attempt()
        twins = len(self.find(queue, delivery.digest))
        attempt = self._ledger.begin(queue.ledger_key, delivery.digest, delivery.attempts) - twins
        experiment.attempt = attempt
        state = RunState(
            run_id=workspace.run_id,
            root=workspace.root,
            queue=queue.ledger_key,
            digest=delivery.digest,
            second=experiment.accession.second,
            started=experiment.started,
            attempt=attempt,
        )
        self._states.save(state)
        self._begin(
            Active(
                queue=queue,
                delivery=delivery,
                request=request,
                experiment=experiment,
                attempt=attempt,
                state=state,
            ),
            allocation,
        )

    def resume(self, queue: QueueState, delivery: Delivery, request: Request, state: RunState) -> None:
        """A run of an earlier daemon whose results are still to be stored: store them, and end the delivery."""
        experiment = Experiment.resumed(
            request=request,
            workspace=Workspace(root=state.root),
            tools=self._tools,
            second=state.second,
            started=state.started,
        )
        experiment.attempt = state.attempt
        self._begin(
            Active(
                queue=queue,
                delivery=delivery,
                request=request,
                experiment=experiment,
                attempt=state.attempt,
                state=state,
                started=state.started,
            ),
            None,
        )

    def _begin(self, active: Active, allocation: Allocation | None) -> None:
        active.backend = active.queue.backend
        self._active[active.state.run_id] = active
        active.queue.running += 1
        self.started_total += 1
        added = active.request.time_added
        waited = None if added is None or allocation is None else time.time() - added
        self._tools.metrics.experiment_started(_labels(active), wait_secs=waited)
        active.task = asyncio.create_task(self._run(active, allocation), name=f"run {active.state.run_id}")

    async def adopt(self, twins: list[Active], delivery: Delivery) -> None:
        """A message that runs here was delivered again: it is the run's own from now on, unless the run still holds the first.

        DESIGN.md 5.3: only a second copy is acknowledged at once.
        """
        for active in twins:
            if active.delivery.lost.is_set():
                active.delivery, active.backend = delivery, active.queue.backend
                log.info(
                    "adopted the redelivered message of a run in progress",
                    queue=str(delivery.queue),
                    run=active.state.run_id,
                )
                await delivery.began(active.attempt)
                return
        await delivery.ack()
        log.warning(
            "acknowledged a second copy of a message that runs here",
            queue=str(delivery.queue),
            run=twins[0].state.run_id,
        )

    async def _run(self, active: Active, allocation: Allocation | None) -> None:
        began = time.monotonic()
        context = {
            "run": active.state.run_id,
            "queue": str(active.queue.ref),
            "experiment": active.request.key,
            "project": active.request.project,
            "attempt": active.attempt,
        }
        held = allocation
        with structlog.contextvars.bound_contextvars(**context):
            watch = asyncio.create_task(self._watch_loss(active), name=f"loss {active.state.run_id}")
            try:
                outcome, fate = await self._attempt(active, held)
            except Exception as exc:  # the edge: a defect of ours fails one run, not the daemon
                log.exception("the runner failed")
                outcome = Outcome.of_error(
                    errors.RunnerError(f"the runner failed: {type(exc).__name__}: {exc}")
                )
                fate = errors.Fate.REQUEUE
                if not active.settling:  # nobody has ended the delivery
                    fate = await self._settle(active, outcome, None)
            finally:
                watch.cancel()
                if held is not None:
                    held.release()
                cores = held.amounts.cpus if held is not None else 0
                active.queue.running -= 1
                active.queue.used(cores * (time.monotonic() - began))
                self._active.pop(active.state.run_id, None)
                if not self._active:
                    self.idle_since = time.monotonic()
            self._remember(active, outcome, fate, time.monotonic() - began)

    async def _watch_loss(self, active: Active) -> None:
        """Until cancelled: when its message is lost, its queue is opened for the redelivered copy, however full the machine is."""
        while True:
            delivery = active.delivery
            await delivery.lost.wait()
            if not delivery.superseded:
                log.warning("the message of a run in progress was lost; the run goes on and waits for it")
            while active.delivery is delivery:
                if delivery.superseded:
                    self._supersede(active)
                    return
                self._changed()
                await asyncio.sleep(LOSS_SECS)

    def _supersede(self, active: Active) -> None:
        """Another runner has its message: two runs of it must not both store results. What has ended already, stores its own."""
        log.warning("another runner may have the message of a run in progress: stopping it")
        if active.state.outcome is None:
            active.experiment.stop(
                errors.Reason.LEASE_LOST,
                "its lease was lost: another runner has its message, or will have it soon",
            )

    async def _attempt(self, active: Active, allocation: Allocation | None) -> tuple[Outcome, errors.Fate]:
        """How it ended, and what became of its message."""
        outcome = active.state.outcome
        kept: Path | None = None
        experiment = active.experiment
        try:
            if outcome is None:
                await active.delivery.began(active.attempt)
                outcome = await experiment.execute(queue=str(active.queue.ref))
                active.state = dataclasses.replace(active.state, outcome=outcome)
                self._states.save(active.state)
            outcome, kept = await self._deliver(active, outcome, allocation)
            fate = await self._settle(active, outcome, kept)
        except BaseException:
            # Cancelled (a second signal) or a defect: the next start of the daemon sees to what is left.
            await experiment.abandon()
            raise
        if kept is None and not experiment.undelivered:
            self._states.remove(active.state.run_id)
            await experiment.discard(keep=self._config.paths.keep_runs)
        return outcome, fate

    async def _deliver(
        self, active: Active, outcome: Outcome, allocation: Allocation | None
    ) -> tuple[Outcome, Path | None]:
        """Store the results; the outcome, and where the results are when they cannot be stored."""
        delivery = asyncio.create_task(
            active.experiment.deliver(outcome, on_unreachable=lambda away: self._away(active, away))
        )
        try:
            await asyncio.wait({delivery}, timeout=DELIVERY_HOLDS_MACHINE_SECS)
            if not delivery.done() and allocation is not None:
                log.warning("results cannot be stored yet; the machine is given back meanwhile")
                allocation.release()
            await delivery
        except lifecycle.Undelivered as exc:
            return Outcome.of_stop(errors.Reason.DRAINED, str(exc)), None
        except errors.AttemptFailed as exc:
            text = f"the results cannot be stored: {exc}; they are kept in {active.state.root}"
            failed = Outcome.of_error(errors.Refused(text))
            return dataclasses.replace(
                failed, reason=exc.reason, exit_code=outcome.exit_code
            ), active.state.root
        finally:
            if not delivery.done():
                delivery.cancel()
                await asyncio.wait({delivery})
        return outcome, None

    def _away(self, active: Active, exc: errors.Unreachable) -> None:
        active.queue.endpoint = exc.endpoint
        self._endpoints.lost(exc.endpoint, lambda: active.experiment.answers(exc.endpoint))

    async def _settle(self, active: Active, outcome: Outcome, kept: Path | None) -> errors.Fate:
        active.settling = True
        queue, delivery, digest = active.queue, active.delivery, active.state.digest
        fate = self._fate(active, outcome)
        delivery.attempts = active.attempt if outcome.counts else active.attempt - 1
        if not outcome.counts:
            self._ledger.undo(queue.ledger_key, digest)
        else:
            self._ledger.failed(queue.ledger_key, digest, outcome.reason, outcome.text)
        told = {
            "status": outcome.status,
            "reason": outcome.reason,
            "text": outcome.text,
            "exit_code": outcome.exit_code,
        }
        match fate:
            case errors.Fate.ACK:
                self._ledger.finish(queue.ledger_key, digest)
                queue.succeeded()
                in_time = await delivery.ack()
                self._tools.metrics.delivery("ack" if in_time else "lost")
                log.info("experiment finished", **told, acknowledged=in_time)
            case errors.Fate.REQUEUE:
                wait = 0.0
                if outcome.reason in {errors.Reason.DRAINED, errors.Reason.LEASE_LOST}:
                    wait = 0.0
                elif outcome.endpoint and active.experiment.knows(outcome.endpoint):
                    queue.endpoint = outcome.endpoint
                    self._endpoints.lost(
                        outcome.endpoint, lambda: active.experiment.answers(outcome.endpoint)
                    )
                else:
                    wait = queue.back_off(outcome.text)
                self._changed()
                await delivery.requeue(wait)
                self._tools.metrics.delivery("requeue")
                log.warning("experiment goes back to its queue", **told, wait_secs=round(wait, 1))
            case errors.Fate.REJECT:
                text = (
                    outcome.text
                    if outcome.fate is fate
                    else f"gave up after {active.attempt} attempts: {outcome.text}"
                )
                rejected = await self._dead_letter(
                    queue, delivery, reason=outcome.reason, text=text, attempts=active.attempt, results=kept
                )
                fate = errors.Fate.REJECT if rejected else errors.Fate.REQUEUE
        return fate

    def _fate(self, active: Active, outcome: Outcome) -> errors.Fate:
        if outcome.fate is errors.Fate.REQUEUE and outcome.counts and active.attempt >= MAX_ATTEMPTS:
            return errors.Fate.REJECT
        failed_by_itself = (
            outcome.status is Status.FAILED and not outcome.by_runner and outcome.fate is errors.Fate.ACK
        )
        if failed_by_itself and active.attempt <= self._config.runs.retries:
            return errors.Fate.REQUEUE
        return outcome.fate

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
        """Dead-letter what does not run, and tell those who follow it."""
        if await self._dead_letter(queue, delivery, reason=reason, text=text, attempts=attempts):
            self.recent.append(
                {
                    "run": None,
                    "experiment": request.key if request is not None else None,
                    "project": request.project if request is not None else None,
                }
                | _ending(
                    queue=str(queue.ref),
                    digest=delivery.digest,
                    attempt=attempts,
                    outcome=Outcome(status=Status.FAILED, reason=reason, text=text, fate=errors.Fate.REJECT),
                    fate=errors.Fate.REJECT,
                    elapsed_secs=0.0,
                )
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
            )
        except OSError as exc:
            wait = queue.back_off(f"a dead letter cannot be written: {exc}", at_least_secs=60)
            log.error(  # noqa: TRY400 - the error tells it all
                "a dead letter cannot be written; the message goes back to its queue",
                error=str(exc),
                wait_secs=round(wait),
            )
            await delivery.requeue(wait)
            return False
        self._ledger.finish(queue.ledger_key, delivery.digest)
        self._tools.metrics.dead_letter(reason)
        await delivery.reject()
        self._tools.metrics.delivery("reject")
        log.warning(
            "message dead-lettered",
            queue=str(delivery.queue),
            reason=reason,
            text=text,
            attempts=attempts,
            path=str(path),
        )
        return True

    def stop_all(self, reason: errors.Reason, text: str, grace_secs: float) -> None:
        """End every run: TERM, grace, KILL; then each is settled by its own task."""
        for active in self:
            active.experiment.stop(reason, text, grace_secs)

    async def finished(self) -> None:
        """Wait until no run is left. Runs that start meanwhile are waited for too."""
        while tasks := [active.task for active in self if active.task is not None]:
            await asyncio.wait(tasks)

    async def abort(self) -> None:
        """At once: kill the workloads, leave the messages to their brokers."""
        tasks = [active.task for active in self if active.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _remember(self, active: Active, outcome: Outcome, fate: errors.Fate, elapsed_secs: float) -> None:
        self._tools.metrics.experiment_finished(_labels(active), status=outcome.status, reason=outcome.reason)
        self.recent.append(
            active.experiment.summary()
            | _ending(
                queue=str(active.queue.ref),
                digest=active.state.digest,
                attempt=active.attempt,
                outcome=outcome,
                fate=fate,
                elapsed_secs=elapsed_secs,
            )
        )


def _write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)


def _ending(
    *, queue: str, digest: str, attempt: int, outcome: Outcome, fate: errors.Fate, elapsed_secs: float
) -> dict[str, Any]:
    """What `recent` tells of an attempt that is over. Not `final`: its message went back to its queue."""
    return {
        "queue": queue,
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


def _labels(active: Active) -> metrics.Run:
    return metrics.Run(
        kind=active.queue.backend.kind,
        queue=str(active.queue.ref),
        project=active.request.project or "",
        experiment=active.request.key,
    )
