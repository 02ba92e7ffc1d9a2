"""The runs in progress: started, resumed, adopted, brought to their end. `daemon.settle` decides what becomes of their messages."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import time
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.daemon.active import Active
from runner.daemon.runstate import RunState
from runner.daemon.settle import Settler
from runner.experiment.artifacts import located
from runner.experiment.lifecycle import Experiment
from runner.experiment.outcome import Outcome
from runner.experiment.results import Undelivered
from runner.experiment.workspace import Workspace
from runner.metadata import names
from runner.telemetry import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping
    from pathlib import Path

    from runner.config import Config
    from runner.daemon.attempts import Ledger
    from runner.daemon.deadletters import DeadLetters
    from runner.daemon.endpoints import Endpoints
    from runner.daemon.queuestate import QueueState
    from runner.daemon.runstate import RunStates
    from runner.experiment.tools import Tools
    from runner.queues.base import Delivery
    from runner.request.model import Request
    from runner.resources.allocator import Allocation

log = structlog.get_logger(__name__)

#: Results that are not stored after this long give back what is left of their part of the machine, too, and go on trying.
DELIVERY_HOLDS_MACHINE_SECS = 120.0
#: How often it is looked whether a lost message has come back.
LOSS_SECS = 1.0
#: Nothing is started on a disk with less room than that: it would only fail, and count.
MIN_FREE_BYTES = 64 << 20


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
        undelivered: Iterable[RunState],
        interrupted: Iterable[RunState],
        endpoints: Endpoints,
        unrecorded: Callable[[RunState], None],
    ) -> None:
        """`undelivered` and `interrupted`: what earlier daemons left (`runstate.sweep`). `unrecorded` takes runs whose documents are to be ended later."""
        self._config = config
        self._tools = tools
        self._ledger = ledger
        self._states = states
        self._undelivered = list(undelivered)
        self._shared = {state.key for state in (*self._undelivered, *interrupted) if state.shared}
        self._endpoints = endpoints
        self._unrecorded = unrecorded
        self._active: dict[str, Active] = {}
        self.settler = Settler(
            config=config,
            metrics=tools.metrics,
            ledger=ledger,
            dead_letters=dead_letters,
            endpoints=endpoints,
            others=self._others,
        )
        self.recent = self.settler.recent
        self.started_total = 0
        self.idle_since = time.monotonic()

    def __iter__(self) -> Iterator[Active]:
        return iter(list(self._active.values()))

    def __len__(self) -> int:
        return len(self._active)

    @property
    def exhausted(self) -> bool:
        """Whether as many were started as this daemon may start (INTEROP.md 8.6)."""
        limit = self._config.limits.tasks
        return bool(limit) and self.started_total >= limit

    def find(self, queue: QueueState, digest: str) -> list[Active]:
        """The runs in progress of that message: several, when experimenters publish the same bytes more than once."""
        return [
            active
            for active in self
            if active.state.key == (queue.ledger_key, digest) and not active.settling
        ]

    def _others(self, queue: QueueState, digest: str) -> int:
        """What the ledger has to know of the runs of those bytes that go on when one has finished: as if each were alone."""
        twins = self.find(queue, digest)
        return max((twin.attempt for twin in twins), default=0) + len(twins) - 1 if twins else 0

    def orphaned(self, queue: QueueState) -> bool:
        """Whether a run of that queue, by whatever account, has lost its message, which is on its way back: it should come here."""
        return any(
            active.delivery.lost.is_set() and not active.settling and active.state.queue == queue.ledger_key
            for active in self
        )

    def know(self, queue: QueueState) -> None:
        """A queue is served: what was written down of it under the name that older versions had for it, is its own."""
        old, new = queue.older_key, queue.ledger_key
        if old == new:
            return
        self._ledger.renamed(old, new)
        self._shared |= {(new, digest) for name, digest in self._shared if name == old}
        for number, state in enumerate(self._undelivered):
            if state.queue == old:
                self._undelivered[number] = dataclasses.replace(state, queue=new)
                with contextlib.suppress(OSError):  # then the next daemon finds it as this one has
                    self._states.save(self._undelivered[number])

    def waiting(self, queue: QueueState) -> int:
        """How many runs of that queue are over and wait for their storage, without a part of the machine."""
        return sum(active.queue is queue and active.allocation is None for active in self)

    def holds(self, delivery: Delivery) -> bool:
        """Whether a run in progress will end that delivery."""
        return any(active.delivery is delivery for active in self)

    def published_anew(self, queue: QueueState, digest: str) -> None:
        """A message of those bytes has come that is no redelivery: a new run, and what comes again may be either. Raises OSError."""
        for twin in self.find(queue, digest):
            if not twin.state.shared:
                twin.state = dataclasses.replace(twin.state, shared=True)
                self._states.save(twin.state)
        self._ledger.published_anew(queue.ledger_key, digest)

    def check(self, request: Request) -> None:
        """Raises errors.NoEngine when it wants a container that this host cannot give."""
        self._tools.executor.check(request.container.engine if request.container is not None else None)

    def needs(self, request: Request, endpoints: Container[str]) -> str:
        """The first of these endpoints that an artifact of it is at; empty: none. Raises errors.Refused."""
        there = (location.endpoint for _, location in located(request, self._config))
        return next((endpoint for endpoint in there if endpoint in endpoints), "")

    def start(self, queue: QueueState, delivery: Delivery, request: Request, allocation: Allocation) -> None:
        """Run it, in a task of its own that ends the delivery. The attempt is counted before anything else happens.

        Raises:
            OSError: its directory or its state cannot be made; nothing was started and nothing counted.
        """
        working_dir = self._config.paths.working_dir
        if shutil.disk_usage(working_dir).free < MIN_FREE_BYTES:
            raise OSError(f"less than {MIN_FREE_BYTES >> 20} MiB are free below {working_dir}")
        workspace = Workspace.create(working_dir / "runs", request.key)
        try:
            active = self._prepared(workspace, queue, delivery, request, allocation)
        except OSError:
            self._states.remove(workspace.run_id)
            workspace.remove()
            raise
        self._tools.metrics.attempt()
        self.started_total += 1
        self._begin(active)

    def _prepared(
        self,
        workspace: Workspace,
        queue: QueueState,
        delivery: Delivery,
        request: Request,
        allocation: Allocation,
    ) -> Active:
        """A run that is written down and counted. Raises OSError, and then it is not counted."""
        _write_private(workspace.request, delivery.body)
        experiment = Experiment(
            request=request,
            workspace=workspace,
            tools=self._tools,
            granted=allocation.amounts,
            gpus=allocation.gpus,
        )
        allocation.name(str(workspace.root))
        twins = self.find(queue, delivery.digest)
        key = (queue.ledger_key, delivery.digest)
        experiment.attempt = max(1, self._ledger.begin(*key, delivery.attempts) - len(twins))
        state = RunState(
            run_id=workspace.run_id,
            root=workspace.root,
            queue=queue.ledger_key,
            digest=delivery.digest,
            second=experiment.accession.second,
            started=experiment.started,
            attempt=experiment.attempt,
            shared=bool(twins) or key in self._shared,
        )
        try:
            self._states.save(state)
        except OSError:
            self._ledger.undo(*key)
            raise
        return Active(
            queue=queue,
            delivery=delivery,
            request=request,
            experiment=experiment,
            state=state,
            allocation=allocation,
        )

    def resume(self, queue: QueueState, delivery: Delivery, request: Request) -> bool:
        """Whether results of that message are still to be stored: then it is done, and ends the delivery. Raises errors.Refused."""
        key = (queue.ledger_key, delivery.digest)
        state = next((each for each in self._undelivered if each.key == key), None)
        if state is None:
            return False
        experiment = Experiment.resumed(
            request=request,
            workspace=Workspace(root=state.root),
            tools=self._tools,
            second=state.second,
            started=state.started,
            attempt=state.attempt,
            staged=state.staged,
        )
        self._undelivered.remove(state)
        self._begin(
            Active(queue=queue, delivery=delivery, request=request, experiment=experiment, state=state)
        )
        return True

    def _begin(self, active: Active) -> None:
        active.backend = active.queue.backend
        self._active[active.state.run_id] = active
        active.queue.running += 1
        if active.allocation is not None:
            active.queue.holding += 1
        added = active.request.time_added
        waited = None if added is None or active.allocation is None else time.time() - added
        self._tools.metrics.experiment_started(_labels(active), wait_secs=waited)
        active.task = asyncio.create_task(self._run(active), name=f"run {active.state.run_id}")

    async def adopt(self, twins: list[Active], queue: QueueState, delivery: Delivery) -> bool:
        """A message that runs here was delivered again: it is the run's own from now on, unless the run still holds the first.

        DESIGN.md 5.3: only a second copy is acknowledged at once. False: it may be another message of the same bytes.
        """
        for active in twins:
            if active.delivery.lost.is_set():
                active.move(queue, delivery)
                log.info(
                    "adopted the redelivered message of a run in progress",
                    queue=str(delivery.queue),
                    run=active.state.run_id,
                )
                await delivery.began(active.attempt)
                return True
        if any(active.state.shared for active in twins):
            return False
        await delivery.ack()
        log.warning(
            "acknowledged a second copy of a message that runs here",
            queue=str(delivery.queue),
            run=twins[0].state.run_id,
        )
        return True

    async def _run(self, active: Active) -> None:
        began = time.monotonic()
        context = {
            "run": active.state.run_id,
            "queue": str(active.queue.ref),
            "experiment": active.request.key,
            "project": active.request.project,
            "attempt": active.attempt,
        }
        with structlog.contextvars.bound_contextvars(**context), active.experiment.capturing():
            watch = asyncio.create_task(self._watch_loss(active), name=f"loss {active.state.run_id}")
            try:
                outcome, fate = await self._guarded(active)
            finally:
                watch.cancel()
                active.release()
                active.queue.running -= 1
                self._active.pop(active.state.run_id, None)
                if not self._active:
                    self.idle_since = time.monotonic()
                active.queue.changed()
            self._tools.metrics.experiment_finished(
                _labels(active), status=outcome.status, reason=outcome.reason
            )
            self.settler.remember(active, outcome, fate, elapsed_secs=time.monotonic() - began)

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
                active.queue.changed()
                await asyncio.sleep(LOSS_SECS)

    def _supersede(self, active: Active) -> None:
        """Another runner has its message: two runs of it must not both store results. What has ended already, stores its own."""
        log.warning("another runner may have the message of a run in progress: stopping it")
        if active.state.outcome is None:
            active.experiment.stop(
                errors.Reason.LEASE_LOST,
                "its lease was lost: another runner has its message, or will have it soon",
            )

    async def _guarded(self, active: Active) -> tuple[Outcome, errors.Fate]:
        """As `_attempt`. A defect of ours fails one run, not the daemon; its directory is left to the next start."""
        try:
            return await self._attempt(active)
        except Exception as exc:
            log.exception("the runner failed")
            outcome = Outcome.of_error(errors.RunnerError(f"the runner failed: {type(exc).__name__}: {exc}"))
            if active.settling:  # the delivery is being ended, or has been
                return outcome, errors.Fate.REQUEUE
            return outcome, await self.settler.settle(active, outcome, None)

    async def _attempt(self, active: Active) -> tuple[Outcome, errors.Fate]:
        """How it ended, and what became of its message."""
        experiment = active.experiment
        try:
            outcome = active.state.outcome
            if outcome is None:
                await active.delivery.began(active.attempt)
                outcome = await experiment.execute()
                self._save(active, outcome)
            outcome, results = await self._deliver(active, outcome)
            fate = await self.settler.settle(active, outcome, results)
        except BaseException as exc:
            # A second signal, or a defect: the next start of the daemon sees to what is left.
            if isinstance(exc, asyncio.CancelledError) and active.state.outcome is None:
                text = "the runner was told to end at once"
                active.delivery.attempts = active.attempt - 1  # it was none
                self._save(active, Outcome.of_stop(errors.Reason.DRAINED, text))
            await experiment.abandon()
            raise
        if results is not None:
            self._keep(active)
        elif experiment.unrecorded:
            active.state = dataclasses.replace(active.state, corrected=True)  # the ledger knows how it ended
            with contextlib.suppress(OSError):
                self._states.save(active.state)
            self._unrecorded(active.state)
        elif not experiment.undelivered:
            active.release()  # the next run need not wait for a directory to be removed
            self._states.remove(active.state.run_id)
            await experiment.discard(keep=self._config.paths.keep_runs)
        return outcome, fate

    def _keep(self, active: Active) -> None:
        """Results that were refused: should the message come again, they are stored then, with a document of their own."""
        paths = self._config.paths
        with contextlib.suppress(OSError):
            second = names.claim_second(paths.state_dir, self._tools.host, time.time())
            active.state = dataclasses.replace(active.state, second=second)
            self._states.save(active.state)
        self._undelivered.append(active.state)

    def _save(self, active: Active, outcome: Outcome) -> None:
        active.state = dataclasses.replace(active.state, outcome=outcome, staged=active.experiment.staged)
        try:
            self._states.save(active.state)
        except OSError as exc:
            log.warning("how the run ended cannot be written down: a crash would repeat it", error=str(exc))

    async def _deliver(self, active: Active, outcome: Outcome) -> tuple[Outcome, Path | None]:
        """Store the results; the outcome, and where the results are when they cannot be stored.

        Meanwhile others work with its cores, memory and cards: as many runs at most store their results that way as the machine
        has cores, so that nothing piles up. Not those of one that goes back to its queue: what keeps that queue from starting the
        next one, which would fare no better, is known when it is settled.
        """
        final = outcome.fate is errors.Fate.ACK
        if final and sum(each.resting for each in self) < self._tools.allocator.total.cpus:
            active.rest()
        delivery = asyncio.create_task(
            active.experiment.deliver(outcome, on_unreachable=lambda away: self._away(active, away))
        )
        try:
            await asyncio.wait({delivery}, timeout=DELIVERY_HOLDS_MACHINE_SECS)
            if not delivery.done() and active.allocation is not None:
                log.warning("results cannot be stored yet; the machine is given back meanwhile")
                active.release()
            await delivery
        except Undelivered as exc:
            return Outcome.of_stop(errors.Reason.DRAINED, str(exc)), None
        except errors.AttemptFailed as exc:
            refusal = Outcome.of_error(
                errors.Refused(f"the results cannot be stored: {exc}; they are kept in {active.state.root}")
            )
            refusal = dataclasses.replace(refusal, reason=exc.reason, exit_code=outcome.exit_code)
            await active.experiment.cut_off(refusal)
            return refusal, active.state.root
        finally:
            if not delivery.done():
                delivery.cancel()
                await asyncio.wait({delivery})
        return outcome, None

    def _away(self, active: Active, exc: errors.Unreachable) -> None:
        if self._endpoints.away_secs(exc.endpoint) is None:  # else each try would close the queue anew
            active.queue.wants(exc.endpoint)
        self._endpoints.lost(exc.endpoint, lambda: active.experiment.answers(exc.endpoint))

    def gpus_failed(self, fenced: Mapping[str, str]) -> None:
        """End the runs that have one of these cards (UUIDs, and what is wrong): their messages go back to their queues."""
        for active in self:
            for grant in active.experiment.gpus:
                if grant.uuid in fenced and active.state.outcome is None:
                    text = f"its GPU {grant.name} ({grant.uuid}) failed: {fenced[grant.uuid]}"
                    active.experiment.stop(errors.Reason.GPU, text)

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


def _write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)


def _labels(active: Active) -> metrics.Run:
    return metrics.Run(
        kind=active.queue.backend.kind,
        queue=str(active.queue.ref),
        project=active.request.project or "",
        experiment=active.request.key,
    )
