"""What is known on disk of the runs of this daemon, so that a restart can finish or sweep what they left (DESIGN.md rule 2, 5.9)."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from runner import errors
from runner.experiment.outcome import Outcome, Status

if TYPE_CHECKING:
    from collections.abc import Mapping

log = structlog.get_logger(__name__)

_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunState:
    """One run. Written when it starts, written again when its workload has ended, removed when its message is settled."""

    run_id: str
    root: Path  #: its directory
    queue: str  #: `account/name`, the ledger's key
    digest: str
    second: int  #: the start second in its metadata objects' names
    started: float  #: unix time
    attempt: int
    outcome: Outcome | None = None  #: set: the workload is over, the results may not be stored yet

    def as_document(self) -> dict[str, Any]:
        """For the file."""
        outcome = None if self.outcome is None else dict(vars(self.outcome))
        return vars(self) | {"root": str(self.root), "outcome": outcome}

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> RunState:
        """From the file. Raises KeyError, TypeError or ValueError when it is not one of ours."""
        outcome = document["outcome"]
        if outcome is not None:
            outcome = Outcome(
                **outcome
                | {
                    "status": Status(outcome["status"]),
                    "reason": errors.Reason(outcome["reason"]),
                    "fate": errors.Fate(outcome["fate"]),
                }
            )
        return cls(**dict(document) | {"root": Path(document["root"]), "outcome": outcome})


class RunStates:
    """A directory with a small file per run. Blocking, each call well under a millisecond."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def save(self, state: RunState) -> None:
        """Write it: a line more in its file, of which the last whole one counts. Raises OSError."""
        # Not a new file in place of the old one: where runs come and go a new inode costs more than all the rest.
        line = b"\n%b\n" % orjson.dumps(state.as_document(), default=_plain)
        fd = os.open(self.directory / f"{state.run_id}.json", _APPEND, 0o600)
        try:
            if os.write(fd, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)

    def remove(self, run_id: str) -> None:
        """Forget it. Idempotent."""
        (self.directory / f"{run_id}.json").unlink(missing_ok=True)

    def load(self) -> list[RunState]:
        """All that are there; files that cannot be read are removed and named in the log."""
        states = []
        for path in sorted(self.directory.glob("*.json")):
            try:
                states.append(_last_whole(path.read_bytes()))
            except (ValueError, KeyError, TypeError, OSError) as exc:
                log.warning("unreadable run state removed", path=str(path), error=str(exc))
                path.unlink(missing_ok=True)
        return states


def _last_whole(data: bytes) -> RunState:
    """The state in the last line that was written to its end. Raises as `RunState.of_document` when there is none."""
    *lines, _ = data.split(b"\n")
    for line in reversed(lines):
        with contextlib.suppress(orjson.JSONDecodeError):
            return RunState.of_document(orjson.loads(line))
    raise ValueError("no whole line")


def sweep(states: RunStates, runs: Path) -> tuple[list[RunState], list[RunState]]:
    """Sort what the last daemon left: runs whose results are still to be stored, and runs that were cut off.

    Directories that no state tells of, and states whose directory is gone, are removed. No process of theirs is left: their
    supervisors have seen to that.
    """
    undelivered: list[RunState] = []
    interrupted: list[RunState] = []
    known = set()
    for state in states.load():
        if not state.root.is_dir() or state.root.parent != runs:
            states.remove(state.run_id)
        else:
            known.add(state.root.name)
            (interrupted if state.outcome is None else undelivered).append(state)
    if runs.is_dir():
        for path in runs.iterdir():
            if path.name not in known:
                shutil.rmtree(path, ignore_errors=True)
    return undelivered, interrupted


def _plain(value: object) -> object:
    if isinstance(value, errors.Fate):
        return value.value
    raise TypeError
