"""One attempt at an experiment: stage, prepare, run, checkpoint, deliver (DESIGN.md section 2).

::

    starting -> staging -> environment -> running -> uploading -> done
        any stage before `uploading` may end early: refused, failed, stopped

`execute` gives an Outcome and never raises but for cancellation; `deliver` makes that outcome durable. Between the two the
daemon writes the outcome down, so that a restart resumes with `deliver` instead of running everything again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any

import structlog

from runner import errors
from runner.executors.base import Limits, RunSpec
from runner.experiment import environ, image, runas
from runner.experiment.artifacts import Artifacts
from runner.experiment.cancel import Cancellation
from runner.experiment.limits import Bounds, memory_ceiling
from runner.experiment.outcome import Outcome
from runner.experiment.record import Record
from runner.experiment.results import Results, Undelivered
from runner.metadata import names
from runner.process.base import Command
from runner.process.tail import open_regular
from runner.request.redact import secret_values
from runner.telemetry import logs, redact

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from runner.executors.base import Prepared
    from runner.experiment.tools import Tools
    from runner.experiment.workspace import Workspace
    from runner.process.base import ProcessExit
    from runner.process.cgroup import Group
    from runner.process.spawner import Process
    from runner.request.model import Request, Resources
    from runner.resources.gpupool import Grant

log = structlog.get_logger(__name__)

#: Between TERM and KILL when the runner ends a workload.
KILL_GRACE_SECS = 10.0
#: ... when it uses more than it was granted: meanwhile it may take still more, from others.
OVER_LIMIT_GRACE_SECS = 3.0


class Experiment:
    """One attempt. Made and owned by `daemon.runs`."""

    def __init__(
        self,
        *,
        request: Request,
        workspace: Workspace,
        tools: Tools,
        granted: Resources | None,
        gpus: tuple[Grant, ...] = (),
        second: int | None = None,
        started: float | None = None,
    ) -> None:
        """Raises OSError when the state directory cannot be written. `second` and `started`: of an attempt that was begun."""
        self.request = request
        self.workspace = workspace
        self.attempt = 1
        self.stage = "starting"
        self.started = time.time() if started is None else started
        self.staged = False  #: all inputs are there
        self.undelivered = False  #: the results are kept for the next daemon
        self.unrecorded = False  #: its document in storage does not say how it ended
        self._tools = tools
        self._granted = granted
        self.gpus = gpus  #: the parts of cards that it was given
        self.accession = names.Accession(
            tools.host,
            names.claim_second(tools.config.paths.state_dir, tools.host, self.started)
            if second is None
            else second,
        )
        self._artifacts = Artifacts(request, workspace, tools)
        self._cancellation = Cancellation(request, tools.stores, tools.config)
        self._resumed = second is not None
        self._record = Record(self, tools, resumed=self._resumed)
        self._results = Results(request, workspace, artifacts=self._artifacts, record=self._record)
        self._secrets = secret_values(request.raw)
        self._process: Process | None = None
        self._work: asyncio.Task[Outcome] | None = None
        self._stopping: tuple[errors.Reason, str] | None = None
        self._stops: set[asyncio.Task[Any]] = set()
        self._stage_began = time.monotonic()

    @classmethod
    def resumed(
        cls,
        *,
        request: Request,
        workspace: Workspace,
        tools: Tools,
        second: int,
        started: float,
        attempt: int,
        staged: bool,
    ) -> Experiment:
        """An attempt of an earlier daemon whose workload is over: only `deliver` is left. Raises errors.Refused."""
        experiment = cls(
            request=request, workspace=workspace, tools=tools, granted=None, second=second, started=started
        )
        experiment.attempt, experiment.staged = attempt, staged
        experiment._artifacts.locate()  # its own class
        return experiment

    # -- what others may know

    @property
    def artifacts(self) -> Artifacts:
        """Where its artifacts are."""
        return self._artifacts

    @property
    def granted(self) -> Resources | None:
        """What it was given of the machine."""
        return self._granted

    def summary(self) -> dict[str, Any]:
        """For status pages and clients; no secrets."""
        return {
            "run": self.workspace.run_id,
            "experiment": self.request.key,
            "project": self.request.project,
            "accession": str(self.accession),
            "stage": self.stage,
            "started": self.started,
            "gpus": list(self._uuids),
            "last": self._record.last,
            "artifacts": self._artifacts.addresses(),
            "used": self._record.used,
        }

    def knows(self, endpoint: str) -> bool:
        """Whether that endpoint is one of its storage servers."""
        return self._artifacts.knows(endpoint)

    def answers(self, endpoint: str) -> Awaitable[bool]:
        """Whether that storage server answers now."""
        return self._artifacts.answers(endpoint)

    # -- the run

    def stop(self, reason: errors.Reason, text: str, grace_secs: float = KILL_GRACE_SECS) -> None:
        """End it, in the background; the first reason stays.

        TERM, grace, KILL for the workload, a prompt end for anything before it. One whose workload is over stores its results
        all the same; only when the runner has to end, what cannot be stored now is left to the next daemon.
        """
        if self._stopping is None:
            self._stopping = (reason, text)
        if reason is errors.Reason.DRAINED:
            self._results.give_up()
        if self._process is not None:
            stop = asyncio.create_task(self._process.stop(grace_secs), name=f"stop {self.workspace.run_id}")
            self._stops.add(stop)
            stop.add_done_callback(self._stopped)
        elif self._work is not None:
            self._work.cancel()

    def _stopped(self, stop: asyncio.Task[Any]) -> None:
        self._stops.discard(stop)
        if not stop.cancelled():
            stop.exception()  # whoever waits for the process is told the same

    async def execute(self) -> Outcome:
        """Stage, prepare and run; how it ended. The metadata document is the final one when it returns."""
        log.info("experiment started")
        for warning in self.request.warnings:
            log.warning("the message is not quite as it should be", warning=warning)
        outcome = await self._outcome()
        outcome = dataclasses.replace(outcome, text=redact.redact_text(outcome.text))
        await self._close(outcome)
        return outcome

    async def _outcome(self) -> Outcome:
        if self._stopping is not None:
            return Outcome.of_stop(*self._stopping)
        self._work = asyncio.create_task(self._run(), name=f"work {self.workspace.run_id}")
        try:
            return await self._work
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._stopping is None or (task is not None and task.cancelling()):
                self._work.cancel()
                await asyncio.wait({self._work})
                raise
            return Outcome.of_stop(*self._stopping)
        except errors.RunnerError as exc:
            return Outcome.of_error(exc)
        except OSError as exc:
            return Outcome.of_error(errors.DiskFailed(f"the run's directory cannot be used: {exc}"))
        except Exception as exc:
            log.exception("the runner failed")
            return Outcome.of_error(errors.RunnerError(f"the runner failed: {type(exc).__name__}: {exc}"))

    async def _run(self) -> Outcome:
        self._artifacts.locate()
        async with self._cancellable():
            return await self._stages()

    async def _stages(self) -> Outcome:
        if (expired := self._expired()) is not None:
            return expired
        self._enter("staging")
        if (asked := image.asked(self.request.container, self._artifacts)) is not None:
            await self._tools.executor.vet(asked)  # before anything is fetched for it in vain
        await self._artifacts.fetch()
        self.staged = True
        if (expired := self._expired()) is not None:
            return expired
        self._enter("environment")
        spec = RunSpec(
            run_dir=self.workspace.root,
            workspace=self.workspace.workspace,
            filename=self.request.filename,
            args=self.request.args,
            env=environ.workload(self.request, self.workspace, self._granted, os.environ, self._uuids)
            if self._granted
            else {},
            python=self.request.python,
            requirements=self.request.requirements,
            extra_requirements=self.request.extra_requirements,
            gpus=bool(self.gpus),
            image=image.staged(self.request.container, self.workspace),
            limits=_limits(self._granted, self._uuids, enforced=self._tools.config.runs.enforce_limits),
        )
        async with self._tools.executor.prepare(spec, self.workspace.builder_log) as prepared:
            if (expired := self._expired()) is not None:
                return expired
            return await self._run_program(prepared)

    async def _run_program(self, prepared: Prepared) -> Outcome:
        self._enter("running")
        self._record.running(prepared.facts)
        async with (
            self._confined(prepared) as command,
            self._results.checkpointing(),
            self._limited(),
        ):
            self._process = await self._tools.spawner.start(command)
            if self._stopping is not None:  # asked for while it was being started
                self.stop(*self._stopping)
            ended = await self._sampled(self._process, prepared)
        if prepared.cleanup:  # the figures of a client say nothing of what ran elsewhere
            ended = dataclasses.replace(ended, user_secs=0.0, system_secs=0.0, max_rss_bytes=0)
        if prepared.verdict is not None and not ended.stopped:
            ended = await prepared.verdict(ended)
        self._record.ended(ended)
        if ended.stopped:  # without a reason: everything is being closed
            return Outcome.of_stop(*self._stopping or (errors.Reason.DRAINED, "the runner ended"))
        if not ended.ok and (why := await self._tools.gpus.failed(self._uuids)):
            return Outcome.of_stop(errors.Reason.GPU, why)
        return Outcome.of_exit(ended)

    @property
    def _uuids(self) -> tuple[str, ...]:
        return tuple(grant.uuid for grant in self.gpus)

    @contextlib.asynccontextmanager
    async def _confined(self, prepared: Prepared) -> AsyncIterator[Command]:
        """The program as it is to be started: in a group of its own and under its own user, where that can be had."""
        group = await self._group()
        env, user = prepared.env, None if prepared.as_daemon else self._tools.user
        try:
            if user is not None:
                user = await asyncio.to_thread(runas.hand_over, self.workspace, user)
                env = runas.environment(env, user, self.workspace)
            yield Command(
                argv=prepared.argv,
                env=env,
                cwd=self.workspace.workspace,
                output=self.workspace.output,
                cleanup=prepared.cleanup,
                user=user,
                group=group,
            )
        finally:
            if (
                group is not None and not group.gone()
            ):  # nothing was started in it, or its supervisor was killed
                await asyncio.to_thread(_clear, group)

    async def _group(self) -> Group | None:
        """A control group for it; None where none can be had."""
        groups, granted = self._tools.groups, self._granted
        if groups is None or granted is None:
            return None
        ram_bytes = memory_ceiling(granted) if self._tools.config.runs.enforce_limits else 0
        making = asyncio.create_task(
            asyncio.to_thread(groups.make, self.workspace.run_id, cpus=granted.cpus, ram_bytes=ram_bytes)
        )
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:  # the thread makes it all the same
            await asyncio.wait({making})
            if making.exception() is None:
                _clear(making.result())
            raise
        except OSError as exc:
            log.warning("no control group can be made; what the run uses is measured", error=str(exc))
            return None

    async def _sampled(self, process: Process, prepared: Prepared) -> ProcessExit:
        """Wait for its end; what it uses is watched meanwhile, and held against what it was granted."""
        granted = self._granted
        if granted is None or process.supervisor_pid is None:
            return await self._wait(process)
        bounds = Bounds(
            granted,
            enforced=self._tools.config.runs.enforce_limits,
            stop=lambda reason, text: self.stop(reason, text, OVER_LIMIT_GRACE_SECS),
        )
        with self._tools.sampler.watch(
            # What needs a cleanup runs elsewhere (in a container): below the supervisor is only its client.
            None if prepared.cleanup else process.supervisor_pid,
            self.workspace.root,
            search=prepared.first,
            ram_bytes=memory_ceiling(granted),
            hdd_bytes=granted.hdd_bytes,
            cards=self._uuids,
            told=bounds,
        ) as use:
            self._record.using(use)
            return await self._wait(process)

    async def _wait(self, process: Process) -> ProcessExit:
        try:
            return await process.wait()
        except asyncio.CancelledError:
            await process.stop(0)
            raise

    @contextlib.asynccontextmanager
    async def _limited(self) -> AsyncIterator[None]:
        """Stops the run when its time is over (INTEROP.md 7.3)."""
        loop = asyncio.get_running_loop()
        timers = []
        if (limit := self.request.max_duration_secs) is not None:
            text = f"it ran for its max_duration of {limit:g} s"
            timers.append(loop.call_later(max(0.0, limit), self.stop, errors.Reason.TIMEOUT, text))
        if (left := self._lifetime_left()) is not None:
            timers.append(
                loop.call_later(
                    max(0.0, left), self.stop, errors.Reason.EXPIRED, "its lifetime ended while it ran"
                )
            )
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()

    @contextlib.asynccontextmanager
    async def _cancellable(self) -> AsyncIterator[None]:
        """Stops the run when its experimenter asks for it."""
        asking = asyncio.create_task(self._cancelled(), name=f"cancellation {self.workspace.run_id}")
        try:
            yield
        finally:
            asking.cancel()
            await asyncio.wait({asking})

    async def _cancelled(self) -> None:
        by = await self._cancellation.asked()
        log.info("cancelled", by=by)
        self.stop(errors.Reason.CANCELLED, f"cancelled: {by} says stopped")

    def _lifetime_left(self) -> float | None:
        lifetime, added = self.request.lifetime_secs, self.request.time_added
        # Small numbers are no point in time; the reference ignores them too.
        return None if lifetime is None or added is None or added <= 10 else added + lifetime - time.time()  # noqa: PLR2004

    def _expired(self) -> Outcome | None:
        left = self._lifetime_left()
        if left is None or left > 0:
            return None
        return Outcome.of_stop(
            errors.Reason.EXPIRED, f"its lifetime ended {-left:.0f} s before it could start"
        )

    # -- checkpoints and results

    async def _close(self, outcome: Outcome) -> None:
        """Write down how it ended: the closing line of the output, and the final document. A full disk changes no outcome."""
        if outcome.by_runner:
            try:
                await asyncio.to_thread(_closing_line, self.workspace, f"studio-runner: {outcome.text}")
            except OSError as exc:
                log.warning("the output cannot be told why", error=str(exc))
        await asyncio.to_thread(self._record.finish, outcome)
        log.info(
            "workload over",
            status=outcome.status,
            reason=outcome.reason,
            text=outcome.text,
            exit_code=outcome.exit_code,
        )

    async def deliver(
        self, outcome: Outcome, *, on_unreachable: Callable[[errors.Unreachable], None]
    ) -> None:
        """Store the results: as `Results.deliver`, with what it raises."""
        self._enter("uploading")
        if self._resumed:
            await asyncio.to_thread(self._record.restore, outcome)
        try:
            self.unrecorded = not await self._results.deliver(
                outcome, staged=self.staged, on_unreachable=on_unreachable
            )
        except Undelivered:
            self.undelivered = True
            raise
        self._enter("done")

    async def cut_off(self, outcome: Outcome) -> list[errors.RunnerError]:
        """End its document, and store nothing else: its daemon has died, or its results are refused. What failed is returned."""
        await asyncio.to_thread(self._record.finish, outcome)
        failed = await self._record.upload(final=True)
        self.unrecorded = bool(failed)
        return failed

    async def abandon(self) -> None:
        """The daemon ends at once: nothing is stored or removed. The supervisor sees to the processes."""
        if self._process is not None:
            await self._process.stop(0)

    async def discard(self, *, keep: bool) -> None:
        """The message is settled: remove the run's directory, unless the operator wants to look into it."""
        if not keep:
            await asyncio.to_thread(self.workspace.remove)

    def _enter(self, stage: str) -> None:
        now = time.monotonic()
        self._tools.metrics.stage(self.stage, now - self._stage_began)
        self.stage, self._stage_began = stage, now
        log.debug("stage", stage=stage)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """While it is open, this run's records go to its own log as well, and its secrets go nowhere. Open it around all else."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(redact.secrets.known(self._secrets))
            try:
                stack.enter_context(logs.capture(self.workspace.run_id, self.workspace.runner_log))
            except OSError as exc:
                log.warning("the run has no log of its own", error=str(exc))
            yield


def _clear(group: Group) -> None:
    """Blocking."""
    group.kill()
    group.remove()


def _limits(granted: Resources | None, gpus: tuple[str, ...], *, enforced: bool) -> Limits:
    if granted is None:
        return Limits()
    ram_bytes = memory_ceiling(granted) if enforced else 0
    return Limits(cpus=granted.cpus, ram_bytes=ram_bytes, hdd_bytes=granted.hdd_bytes, gpus=gpus)


def _closing_line(workspace: Workspace, line: str) -> None:
    with open_regular(workspace.output, os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
        end = file.seek(0, 2)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode(errors="replace") + b"\n")
