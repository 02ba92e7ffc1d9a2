"""Runs that were cut off with their daemon: their documents are ended, their directories removed.

Their messages come back by themselves and are new attempts; what is done here is only for the readers of the old attempt's
document, which would say `running` for ever (DESIGN.md 5.6).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.experiment.lifecycle import Experiment
from runner.experiment.outcome import Outcome
from runner.experiment.workspace import Workspace
from runner.request import decode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from runner.daemon.runstate import RunState, RunStates
    from runner.experiment.tools import Tools

log = structlog.get_logger(__name__)

TRIES = 5
RETRY_SECS = 10.0


class Interrupted:
    """Ends what the last daemon left unfinished, in the background, one after the other."""

    def __init__(self, tools: Tools, states: RunStates, left: Iterable[RunState]) -> None:
        self._tools = tools
        self._states = states
        self._left = list(left)

    async def run(self) -> None:
        """End them all. Never raises: what cannot be told to its storage server is said in the log, and removed."""
        for state in self._left:
            workspace = Workspace(root=state.root)
            try:
                await self._end(state, workspace)
            except (errors.RunnerError, OSError) as exc:
                log.warning(
                    "the document of an interrupted run cannot be ended", run=state.run_id, error=str(exc)
                )
            self._states.remove(state.run_id)
            await asyncio.to_thread(workspace.remove)

    async def _end(self, state: RunState, workspace: Workspace) -> None:
        request = decode.decode(await asyncio.to_thread(workspace.request.read_bytes))
        experiment = Experiment.resumed(
            request=request,
            workspace=workspace,
            tools=self._tools,
            second=state.second,
            started=state.started,
        )
        experiment.attempt = state.attempt
        log.info("ending the document of an interrupted run", run=state.run_id, experiment=request.key)
        outcome = Outcome.of_error(errors.ProcessLost("the runner ended while it ran"))
        for number in range(TRIES):
            failed = await experiment.cut_off(outcome)
            if not any(isinstance(exc, errors.Unreachable) for exc in failed):
                return
            await asyncio.sleep(RETRY_SECS * (number + 1))
