"""What is known on disk of the runs of this daemon, so that a restart can finish or sweep what they left (DESIGN.md rule 2, 5.9)."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from runner import errors
from runner.experiment.outcome import Outcome, Status
from runner.experiment.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from runner.daemon.attempts import Ledger

log = structlog.get_logger(__name__)

#: Results whose message has not come back for so long (another host has run it) are not waited for any more.
KEEP_SECS = 30 * 24 * 3600
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunState:
    """One run. Written when it starts, written again when its workload has ended, removed when its message is settled."""

    run_id: str
    root: Path  #: its directory
    queue: str  #: `QueueState.ledger_key`
    digest: str
    second: int  #: the start second in its metadata objects' names
    started: float  #: unix time
    attempt: int
    outcome: Outcome | None = None  #: set: the workload is over, the results may not be stored yet
    shared: bool = False  #: another message of the same bytes has come: a redelivery may be either's
    staged: bool = False  #: with an outcome: whether all inputs were there
    corrected: bool = False  #: the ledger was corrected by it: a later daemon does not do so again

    @property
    def key(self) -> tuple[str, str]:
        """Of its message."""
        return self.queue, self.digest

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
        """All that are there; files that cannot be read, or were written too long ago, are removed and named in the log."""
        states = []
        for path in sorted(self.directory.glob("*.json")):
            try:
                if time.time() - path.stat().st_mtime > KEEP_SECS:
                    raise ValueError("its message has not come back")
                states.append(_last_whole(path.read_bytes()))
            except (ValueError, KeyError, TypeError, OSError) as exc:
                log.warning("run state removed", path=str(path), error=str(exc))
                path.unlink(missing_ok=True)
        return states


def _last_whole(data: bytes) -> RunState:
    """The state in the last line that was written to its end. Raises as `RunState.of_document` when there is none."""
    *lines, _ = data.split(b"\n")
    for line in reversed(lines):
        with contextlib.suppress(orjson.JSONDecodeError):
            return RunState.of_document(orjson.loads(line))
    raise ValueError("no whole line")


def sweep(states: RunStates, runs: Path, *, keep: bool = False) -> tuple[list[RunState], list[RunState]]:
    """Sort what the last daemon left: runs whose results are still to be stored, and runs whose documents are to be ended.

    The latter were cut off, or go back to their queue. Directories of runs that no state tells of, and states whose directory
    is gone, are removed; the former stay with `keep`. No process of theirs is left: their supervisors have seen to that.
    """
    undelivered: list[RunState] = []
    interrupted: list[RunState] = []
    known = set()
    for state in states.load():
        if not state.root.is_dir() or state.root.parent != runs:
            states.remove(state.run_id)
            continue
        known.add(state.root.name)
        final = state.outcome is not None and state.outcome.fate is errors.Fate.ACK
        (undelivered if final else interrupted).append(state)
    for path in runs.iterdir() if runs.is_dir() else ():
        if not keep and path.name not in known and Workspace.is_one(path):
            Workspace(root=path).remove()
    return undelivered, interrupted


def messages(states: Iterable[RunState]) -> dict[str, list[bytes]]:
    """The messages of those runs, by queue. Those that cannot be read are left out: they come back by themselves."""
    found: dict[str, list[bytes]] = {}
    for state in states:
        with contextlib.suppress(OSError):
            found.setdefault(state.queue, []).append(Workspace(root=state.root).request.read_bytes())
    return found


def correct(ledger: Ledger, states: RunStates, interrupted: Sequence[RunState]) -> list[RunState]:
    """Take back attempts that were none: put-backs that were cut off, and all but one of the runs of the same bytes.

    Those ran at the same time, each as the same attempt of a message of its own; what has ended them counts once. Each state
    does so once, however often daemons are killed before they are done with it: returned as they are from now on.
    """
    seen = set()
    known = []
    for state in interrupted:
        if not state.corrected:
            if state.key in seen or (state.outcome is not None and not state.outcome.counts):
                ledger.undo(*state.key)
            seen.add(state.key)
            state = dataclasses.replace(state, corrected=True)  # noqa: PLW2901 - the same, from now on
            with contextlib.suppress(
                OSError
            ):  # a full disk: a later daemon may do it again, which makes an attempt more
                states.save(state)
        known.append(state)
    return known


def _plain(value: object) -> object:
    if isinstance(value, errors.Fate):
        return value.value
    raise TypeError
