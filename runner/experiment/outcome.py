"""How one attempt at an experiment ended, as a value."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

from runner import errors

if TYPE_CHECKING:
    from runner.process.base import ProcessExit


class Status(enum.StrEnum):
    """`studioml.status` (DESIGN.md 5.6). It goes from running to one of the others, on every ending."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"
    SUPERSEDED = "superseded"


#: Reasons of the runner's own ending a run, and the status each gives.
_STOPS = {
    errors.Reason.CANCELLED: Status.STOPPED,
    errors.Reason.QUEUE_DELETED: Status.STOPPED,
    errors.Reason.DRAINED: Status.STOPPED,
    errors.Reason.LEASE_LOST: Status.SUPERSEDED,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended, and what becomes of its message."""

    status: Status
    reason: errors.Reason
    text: str  #: one sentence for a person
    fate: errors.Fate
    counts: bool = True  #: whether it used up one of the message's attempts
    exit_code: int | None = None  #: the workload's
    endpoint: str = ""  #: what did not answer, when that is why

    @property
    def by_runner(self) -> bool:
        """Whether the runner ended it or could not start it: then the output gets a closing line that says so."""
        return self.status is not Status.COMPLETED and self.reason not in {
            errors.Reason.EXIT,
            errors.Reason.SIGNAL,
        }

    @classmethod
    def of_error(cls, error: errors.RunnerError) -> Outcome:
        """What an error of the runner's makes of the attempt."""
        return cls(
            status=Status.FAILED,
            reason=error.reason,
            text=str(error),
            fate=error.fate,
            counts=error.counts,
            endpoint=getattr(error, "endpoint", ""),
        )

    @classmethod
    def of_exit(cls, ended: ProcessExit) -> Outcome:
        """The workload ended by itself: final, whatever its exit code (DESIGN.md rule 3)."""
        if ended.ok:
            return cls(
                status=Status.COMPLETED,
                reason=errors.Reason.EXIT,
                text="completed",
                fate=errors.Fate.ACK,
                exit_code=0,
            )
        if ended.error is not None:
            return cls.of_error(errors.UnsupportedRequest(f"the program {ended}"))
        if ended.oom:
            return cls(
                status=Status.FAILED,
                reason=errors.Reason.OOM,
                text=f"out of memory: {ended.oom}",
                fate=errors.Fate.ACK,
                exit_code=ended.code if ended.signal is None else 128 + ended.signal,
            )
        return cls(
            status=Status.FAILED,
            reason=errors.Reason.EXIT if ended.signal is None else errors.Reason.SIGNAL,
            text=f"the workload ended: {ended}",
            fate=errors.Fate.ACK,
            exit_code=ended.code if ended.signal is None else 128 + ended.signal,
        )

    @classmethod
    def of_stop(cls, reason: errors.Reason, text: str) -> Outcome:
        """The runner ended it. Only a drained one goes back to its queue, and that is no attempt.

        Nor is one whose lease was lost: its message is there already, or with another runner.
        """
        drained = reason in {errors.Reason.DRAINED, errors.Reason.LEASE_LOST}
        return cls(
            status=_STOPS.get(reason, Status.FAILED),
            reason=reason,
            text=text,
            fate=errors.Fate.REQUEUE if drained else errors.Fate.ACK,
            counts=not drained,
        )
