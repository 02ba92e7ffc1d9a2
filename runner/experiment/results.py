"""Storing what a run leaves: what has changed at checkpoints, and everything at its end (INTEROP.md 3.6, 3.7; DESIGN.md 5.5)."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.experiment.outcome import Status
from runner.telemetry import redact

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from runner.experiment.artifacts import Artifacts
    from runner.experiment.outcome import Outcome
    from runner.experiment.record import Record
    from runner.experiment.workspace import Workspace
    from runner.request.model import Request

log = structlog.get_logger(__name__)

#: A run that ends sooner needs no document that says it is running.
FIRST_CHECKPOINT_SECS = 2.0
FIRST_RETRY_SECS = 1.0
LAST_RETRY_SECS = 30.0
#: How long a disk of this machine that fails the packing of results is tried again.
DISK_SECS = 300.0


class Undelivered(Exception):  # noqa: N818 - not a failure: the results are on disk, and a later daemon stores them
    """The runner has to stop before the results could be stored."""


class Results:
    """The results of one attempt on their way to storage."""

    def __init__(
        self, request: Request, workspace: Workspace, *, artifacts: Artifacts, record: Record
    ) -> None:
        self._request = request
        self._workspace = workspace
        self._artifacts = artifacts
        self._record = record
        self._give_up = asyncio.Event()

    @contextlib.asynccontextmanager
    async def checkpointing(self) -> AsyncIterator[None]:
        """While it is open, what changes is stored, each artifact at its own interval.

        On exit an upload in progress is waited for: were it overtaken by the final one, it would undo that. When cancelled it
        is not.
        """
        over = asyncio.Event()
        task = asyncio.create_task(self._checkpoints(over), name=f"checkpoints {self._workspace.run_id}")
        try:
            yield
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            over.set()
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                task.cancel()
                await asyncio.wait({task})
                raise

    def give_up(self) -> None:
        """The runner has to end: results that cannot be stored now are left to the next daemon."""
        self._give_up.set()

    async def _checkpoints(self, over: asyncio.Event) -> None:
        regular = self._request.checkpoint_secs
        frequency = {
            artifact.tag: artifact.save_frequency_secs or regular
            for artifact in self._request.artifacts
            if artifact.mutable
        }
        due = {tag: time.monotonic() + secs for tag, secs in frequency.items()}
        document_due = time.monotonic() + FIRST_CHECKPOINT_SECS
        while not await _within(over, max(0.05, min([document_due, *due.values()]) - time.monotonic())):
            began = time.monotonic()
            tags = [tag for tag, when in due.items() if when <= began]
            try:
                failed = await self._artifacts.upload(tags) if tags else []
                if not over.is_set():
                    failed += await self._record.upload()
                log.debug(
                    "checkpoint",
                    artifacts=tags,
                    failed=len(failed),
                    secs=round(time.monotonic() - began, 3),
                )
            except Exception:
                log.exception("a checkpoint failed")
            due |= {tag: time.monotonic() + frequency[tag] for tag in tags}
            if document_due <= began:
                document_due = time.monotonic() + regular

    async def deliver(
        self,
        outcome: Outcome,
        *,
        staged: bool,
        on_unreachable: Callable[[errors.Unreachable], None],
    ) -> bool:
        """Store the results. Returns when they are durable, or, where the outcome does not depend on them, when that was tried.

        While a server is away it goes on trying, for ever, and calls `on_unreachable` each time; a disk that fails is given
        some minutes. Of an attempt that was not `staged` completely only the output is stored: the rest would overwrite older
        results. False: something was not stored.

        Raises:
            errors.AttemptFailed: the server refuses them, or the disk fails.
            Undelivered: `give_up` was called meanwhile.
        """
        wait, patient_until = FIRST_RETRY_SECS, time.monotonic() + DISK_SECS
        while failed := await self._once(outcome, staged=staged):
            if outcome.fate is not errors.Fate.ACK:
                return False
            away = [exc for exc in failed if isinstance(exc, errors.Unreachable)]
            here = [exc for exc in failed if isinstance(exc, errors.DiskFailed)]
            if not away and not (here and time.monotonic() < patient_until):
                raise _refused(failed[0])
            if away:
                on_unreachable(away[0])
            error = redact.redact_text(str((away or here)[0]))
            log.warning("results cannot be stored yet, trying again", error=error, wait_secs=round(wait, 1))
            if await _within(self._give_up, wait * random.uniform(0.8, 1.2)):
                raise Undelivered(
                    f"the results could not be stored yet ({error}); they are kept in {self._workspace.root}"
                )
            wait = min(wait * 2, LAST_RETRY_SECS)
        return True

    async def _once(self, outcome: Outcome, *, staged: bool) -> list[errors.RunnerError]:
        tags = None if staged else {"output"}
        if outcome.status is Status.SUPERSEDED:
            tags = set()  # they are the other runner's to store; the document is this attempt's own
        failed = await self._artifacts.upload(tags)
        if failed and outcome.fate is errors.Fate.ACK:
            return failed  # the document says that the results are there: not before they are
        return await self._record.upload(final=True) or failed


def _refused(exc: errors.RunnerError) -> errors.AttemptFailed:
    kind = errors.DiskFailed if isinstance(exc, errors.DiskFailed) else errors.ArtifactFailed
    refused = kind(redact.redact_text(str(exc)))
    refused.__cause__ = exc
    return refused


async def _within(event: asyncio.Event, secs: float) -> bool:
    """Wait for it, but not longer; whether it has come."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(secs):
            await event.wait()
    return event.is_set()
