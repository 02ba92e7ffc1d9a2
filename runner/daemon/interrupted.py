"""Runs whose documents in storage still say that they run: they were cut off with their daemon, or storage was away at their end.

Their messages come back by themselves and are new attempts; what is done here is only for the readers of the old attempt's
document, which would say `running` for ever (DESIGN.md 5.6).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.daemon import reading
from runner.experiment.lifecycle import Experiment
from runner.experiment.outcome import Outcome
from runner.experiment.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterable

    from runner.daemon.runstate import RunState, RunStates
    from runner.experiment.tools import Tools

log = structlog.get_logger(__name__)

TRIES = 5
RETRY_SECS = 10.0


class Interrupted:
    """Ends such documents in the background, one after the other, and removes the directories of their runs (not with --debug)."""

    def __init__(self, tools: Tools, states: RunStates, left: Iterable[RunState]) -> None:
        self._tools = tools
        self._states = states
        self._left: asyncio.Queue[RunState] = asyncio.Queue()
        for state in left:
            self.add(state)

    def add(self, state: RunState) -> None:
        """One more."""
        self._left.put_nowait(state)

    async def run(self) -> None:
        """For ever. Never raises: what cannot be told to its storage server is said in the log, and removed."""
        while True:
            state = await self._left.get()
            workspace = Workspace(root=state.root)
            try:
                await self._end(state, workspace)
            except Exception as exc:
                expected = isinstance(exc, errors.RunnerError | OSError)
                log.warning(
                    "the document of an interrupted run cannot be ended",
                    run=state.run_id,
                    error=str(exc),
                    exc_info=not expected,
                )
            self._states.remove(state.run_id)
            if not self._tools.config.paths.keep_runs:
                await asyncio.to_thread(workspace.remove)

    async def _end(self, state: RunState, workspace: Workspace) -> None:
        request = await reading.request_of(await asyncio.to_thread(workspace.request.read_bytes))
        experiment = Experiment.resumed(
            request=request,
            workspace=workspace,
            tools=self._tools,
            second=state.second,
            started=state.started,
            attempt=state.attempt,
            staged=state.staged,
        )
        outcome = state.outcome or Outcome.of_error(errors.ProcessLost("the runner ended while it ran"))
        with experiment.capturing():
            log.info("ending the document of an interrupted run", experiment=request.key)
            for number in range(TRIES):
                failed = await experiment.cut_off(outcome)
                if not any(isinstance(exc, errors.Unreachable) for exc in failed):
                    return
                await asyncio.sleep(RETRY_SECS * (number + 1))
