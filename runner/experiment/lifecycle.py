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
import os
import random
import time
from typing import TYPE_CHECKING, Any

import structlog

from runner import errors
from runner.executors.base import RunSpec
from runner.experiment import environ
from runner.experiment.artifacts import Artifacts
from runner.experiment.outcome import Outcome
from runner.experiment.record import Record
from runner.metadata import names
from runner.process.base import Command
from runner.request.redact import secret_values
from runner.telemetry import logs, redact

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from runner.executors.base import Prepared
    from runner.experiment.tools import Tools
    from runner.experiment.workspace import Workspace
    from runner.process.base import ProcessExit
    from runner.process.spawner import Process
    from runner.request.model import Request, Resources

log = structlog.get_logger(__name__)

#: Between TERM and KILL when the runner ends a workload.
KILL_GRACE_SECS = 10.0
#: A run that ends sooner needs no document that says it is running.
FIRST_CHECKPOINT_SECS = 2.0
FIRST_RETRY_SECS = 1.0
LAST_RETRY_SECS = 30.0


class Undelivered(Exception):  # noqa: N818 - not a failure: the results are on disk, and a later daemon stores them
    """The runner has to stop before the results could be stored."""


class Experiment:
    """One attempt. Made and owned by `daemon.runs`."""

    def __init__(
        self,
        *,
        request: Request,
        workspace: Workspace,
        tools: Tools,
        granted: Resources | None,
        second: int | None = None,
        started: float | None = None,
    ) -> None:
        self.request = request
        self.workspace = workspace
        self.attempt = 1
        self.stage = "starting"
        self.started = time.time() if started is None else started
        self.undelivered = False
        self._tools = tools
        self._granted = granted
        self.accession = names.Accession(
            tools.host,
            names.claim_second(tools.config.paths.state_dir, tools.host, self.started)
            if second is None
            else second,
        )
        self._artifacts = Artifacts(request, workspace, tools)
        self._record = Record(self, tools)
        self._secrets = secret_values(request.raw)
        self._staged = False
        self._process: Process | None = None
        self._work: asyncio.Task[Outcome] | None = None
        self._stopping: tuple[errors.Reason, str] | None = None
        self._give_up = asyncio.Event()
        self._stops: set[asyncio.Task[Any]] = set()
        self._stage_began = time.monotonic()

    @classmethod
    def resumed(
        cls, *, request: Request, workspace: Workspace, tools: Tools, second: int, started: float
    ) -> Experiment:
        """An attempt of an earlier daemon whose workload is over: only `deliver` is left."""
        experiment = cls(
            request=request, workspace=workspace, tools=tools, granted=None, second=second, started=started
        )
        experiment._staged = True  # its own class
        experiment._artifacts.locate()
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
            "last": self._record.last,
            "artifacts": self._artifacts.addresses(),
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

        TERM, grace, KILL for the workload, a prompt end for anything before it; results that cannot be stored now are left
        to the next daemon.
        """
        if self._stopping is None:
            self._stopping = (reason, text)
        if self.stage == "uploading":
            self._give_up.set()
        elif self._process is not None:
            stop = asyncio.create_task(self._process.stop(grace_secs), name=f"stop {self.workspace.run_id}")
            self._stops.add(stop)
            stop.add_done_callback(self._stops.discard)
        elif self._work is not None:
            self._work.cancel()

    async def execute(self, *, queue: str) -> Outcome:
        """Stage, prepare and run; how it ended. The metadata document on disk is the final one when it returns."""
        with self._capturing():
            log.info("experiment started", queue_name=queue, request_warnings=list(self.request.warnings))
            outcome = await self._outcome()
            await self._close(outcome)
            return outcome

    async def _outcome(self) -> Outcome:
        if self._stopping is not None:
            return Outcome.of_stop(*self._stopping)
        self._work = asyncio.create_task(self._run(), name=f"work {self.workspace.run_id}")
        try:
            return await self._work
        except asyncio.CancelledError:
            if self._stopping is None or not self._work.cancelled():
                self._work.cancel()
                await asyncio.wait({self._work})
                raise
            return Outcome.of_stop(*self._stopping)
        except errors.RunnerError as exc:
            return Outcome.of_error(exc)
        except OSError as exc:
            return Outcome.of_error(errors.AttemptFailed(f"the run's directory cannot be used: {exc}"))

    async def _run(self) -> Outcome:
        self._artifacts.locate()
        if (expired := self._expired()) is not None:
            return expired
        self._enter("staging")
        await self._artifacts.fetch()
        self._staged = True
        if (expired := self._expired()) is not None:
            return expired
        self._enter("environment")
        if self.request.filename is None:
            raise errors.UnsupportedRequest("the message names no program; containers are not supported yet")
        spec = RunSpec(
            run_dir=self.workspace.root,
            workspace=self.workspace.workspace,
            filename=self.request.filename,
            args=self.request.args,
            env=environ.workload(self.request, self.workspace, self._granted, os.environ)
            if self._granted
            else {},
            python=self.request.python,
            requirements=self.request.requirements,
            extra_requirements=self.request.extra_requirements,
            gpus=False,
        )
        async with self._tools.executor.prepare(spec, self.workspace.builder_log) as prepared:
            if (expired := self._expired()) is not None:
                return expired
            return await self._run_program(prepared)

    async def _run_program(self, prepared: Prepared) -> Outcome:
        self._enter("running")
        self._record.running(prepared.facts)
        command = Command(
            argv=prepared.argv, env=prepared.env, cwd=self.workspace.workspace, output=self.workspace.output
        )
        async with self._side_task(self._checkpoints()), self._limited():
            self._process = await self._tools.spawner.start(command)
            if self._stopping is not None:  # asked for while it was being started
                self.stop(*self._stopping)
            ended = await self._wait(self._process)
        self._record.ended(ended)
        if ended.stopped and self._stopping is not None:
            return Outcome.of_stop(*self._stopping)
        return Outcome.of_exit(ended)

    async def _wait(self, process: Process) -> ProcessExit:
        try:
            return await process.wait()
        except asyncio.CancelledError:
            await process.stop(0)
            raise

    @contextlib.asynccontextmanager
    async def _side_task(self, work: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(work, name=f"checkpoints {self.workspace.run_id}")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

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

    async def _checkpoints(self) -> None:
        """For ever: store what changed, each artifact at its own interval."""
        regular = self.request.checkpoint_secs
        due = {
            artifact.tag: time.monotonic() + (artifact.save_frequency_secs or regular)
            for artifact in self.request.artifacts
            if artifact.mutable
        }
        frequency = {
            artifact.tag: artifact.save_frequency_secs or regular for artifact in self.request.artifacts
        }
        document_due = time.monotonic() + FIRST_CHECKPOINT_SECS
        while True:
            await asyncio.sleep(max(0.05, min([document_due, *due.values()]) - time.monotonic()))
            now = time.monotonic()
            tags = [tag for tag, when in due.items() if when <= now]
            began = now
            failed = await self._artifacts.upload(tags) if tags else []
            failed += await self._record.upload()
            for tag in tags:
                due[tag] = time.monotonic() + frequency[tag]
            if document_due <= now:
                document_due = time.monotonic() + regular
            log.debug(
                "checkpoint", artifacts=tags, failed=len(failed), secs=round(time.monotonic() - began, 3)
            )

    async def _close(self, outcome: Outcome) -> None:
        """Write down how it ended: the closing line of the output, and the final document."""
        if outcome.by_runner:
            await asyncio.to_thread(
                _closing_line, self.workspace, f"studio-runner: {redact.redact_text(outcome.text)}"
            )
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
        """Store the results. Returns when they are durable, or, where the outcome does not depend on them, when that was tried.

        While a server is away it goes on trying, for ever, and calls `on_unreachable` each time.

        Raises:
            errors.AttemptFailed: the server refuses them.
            Undelivered: `stop` was called meanwhile.
        """
        self._enter("uploading")
        with self._capturing():
            wait = FIRST_RETRY_SECS
            while failed := await self._deliver_once(outcome):
                if outcome.fate is not errors.Fate.ACK:
                    return
                away = [exc for exc in failed if isinstance(exc, errors.Unreachable)]
                if not away:
                    raise errors.AttemptFailed(str(failed[0])) from failed[0]
                on_unreachable(away[0])
                log.warning(
                    "results cannot be stored yet, trying again", error=str(away[0]), wait_secs=round(wait, 1)
                )
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait * random.uniform(0.8, 1.2)):
                        await self._give_up.wait()
                    self.undelivered = True
                    raise Undelivered(
                        f"the results could not be stored yet ({away[0]}); they are kept in {self.workspace.root}"
                    )
                wait = min(wait * 2, LAST_RETRY_SECS)
        self._enter("done")

    async def _deliver_once(self, outcome: Outcome) -> list[errors.RunnerError]:
        # Of an attempt that was not staged completely only the output may be stored: the rest would overwrite older results.
        failed = await self._artifacts.upload(None if self._staged else {"output"})
        if failed and outcome.fate is errors.Fate.ACK:
            return failed  # the document says that the results are there: not before they are
        return await self._record.upload(final=True) or failed

    async def cut_off(self, outcome: Outcome) -> list[errors.RunnerError]:
        """The daemon that ran this attempt is dead: end its document. Nothing but metadata is stored; what failed is returned."""
        with self._capturing():
            await asyncio.to_thread(self._record.finish, outcome)
            return await self._record.upload(final=True)

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
    def _capturing(self) -> Iterator[None]:
        """This run's records go to its own log as well, and its secrets go nowhere."""
        with (
            logs.capture(self.workspace.run_id, self.workspace.runner_log),
            redact.secrets.known(self._secrets),
        ):
            yield


def _closing_line(workspace: Workspace, line: str) -> None:
    with workspace.output.open("ab+") as file:
        end = file.tell()
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode(errors="replace") + b"\n")
