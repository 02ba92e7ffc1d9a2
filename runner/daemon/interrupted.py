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

#: Between two tries of one, doubled each time until the last; about a day in all. A restart of the daemon begins anew.
RETRY_SECS = 10.0
LAST_RETRY_SECS = 600.0
TRIES = 150


class Interrupted:
    """Ends such documents in the background, one after the other, and removes the directories of their runs (not with --debug).

    One whose storage is away makes room for the next, and comes again later.
    """

    def __init__(self, tools: Tools, states: RunStates, left: Iterable[RunState]) -> None:
        self._tools = tools
        self._states = states
        self._left: asyncio.Queue[tuple[RunState, int]] = asyncio.Queue()  # and how often it was tried
        for state in left:
            self.add(state)

    def add(self, state: RunState, tried: int = 0) -> None:
        """One more."""
        self._left.put_nowait((state, tried))

    async def run(self) -> None:
        """For ever. Never raises: what cannot be told to its storage server is said in the log, and removed."""
        while True:
            state, tried = await self._left.get()
            workspace = Workspace(root=state.root)
            try:
                await self._end(state, workspace)
            except errors.Unreachable as exc:
                if tried + 1 < TRIES:
                    secs = min(RETRY_SECS * 2.0 ** min(tried, 20), LAST_RETRY_SECS)
                    asyncio.get_running_loop().call_later(secs, self.add, state, tried + 1)
                    continue
                log.warning(
                    "given up on the document of an interrupted run", run=state.run_id, error=str(exc)
                )
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
        """Raises errors.Unreachable: its storage does not answer."""
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
            failed = await experiment.cut_off(outcome)
        if away := next((exc for exc in failed if isinstance(exc, errors.Unreachable)), None):
            raise away
