"""Claims on messages of directory queues: taken, forgotten, given back; those of dead daemons are returned by any other.

A claim is a rename into the directory of its owner, so that of several daemons one wins, and a crash at any point leaves
the message either in its queue or in that directory. The owner's record lies there before the first claim does. All
calls block; they may come from several threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import os
import threading
import time
import uuid
from typing import TYPE_CHECKING

import structlog

from runner.queues import file_names as names
from runner.queues.base import Existence
from runner.queues.file_owner import Owner

if TYPE_CHECKING:
    from pathlib import Path

    from runner.queues.file_root import QueueRoot

log = structlog.get_logger(__name__)

_RETRY_SECS = 30.0  #: a message whose queue cannot be reached now is tried again after so long
_LITTER_SECS = 3600.0  #: half-written files of crashed publishers are removed when older


class Returned(enum.Enum):
    """What became of a message that was to go back."""

    BACK = "back"  #: it waits in its queue, or for its time
    DROPPED = "dropped"  #: its queue was removed
    LOST = "lost"  #: it was not held any more: another daemon had returned it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep did and learned."""

    returned: frozenset[str]  #: queues into which messages were put back
    next_due: float | None  #: wall time at which the first delayed message is due


class Claims:
    """The claims of one backend, and its part in returning those of the dead."""

    def __init__(self, root: QueueRoot, owner: Owner, *, stale_secs: float) -> None:
        self._root = root
        self._owner = owner
        self._stale_secs = stale_secs
        self._area = root.path / names.CLAIMED
        self._own = self._area / uuid.uuid4().hex
        self._registering = threading.Lock()
        self._numbers = itertools.count(1)

    # -- our own -----------------------------------------------------------------------------------------------------

    def take(self, queue: str, name: str) -> Path:
        """Claim a message: its new path. Raises FileNotFoundError when it is not there any more, OSError else."""
        number = str(next(self._numbers))
        place = self._own / queue / number
        try:
            place.mkdir()
        except FileNotFoundError:  # the first of its queue, or of all
            place = self._register() / queue / number
            names.make_like(place.parent, self._root.path)
            place.mkdir()
        try:
            return (self._root.queue(queue) / name).rename(place / name)
        except OSError:
            with contextlib.suppress(OSError):
                place.rmdir()
            raise

    def forget(self, claim: Path) -> bool:
        """Remove a claimed message for good. False when it was not held any more. Raises OSError."""
        try:
            claim.unlink()
        except FileNotFoundError:
            return False
        _remove_empty(claim.parent)
        return True

    def holds(self, claim: Path) -> bool:
        """Whether a claim still stands; True also when it cannot be told."""
        try:
            claim.lstat()
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True

    def give_back(self, claim: Path, queue: str) -> Returned:
        """Put a claimed message back into its queue, where its age gives it its old place. Raises OSError."""
        try:
            claim.rename(self._root.queue(queue) / names.returned_name(claim.name))
        except (FileNotFoundError, NotADirectoryError):
            return self.delay(claim, queue, _RETRY_SECS) if self.holds(claim) else Returned.LOST
        _remove_empty(claim.parent)
        return Returned.BACK

    def delay(self, claim: Path, queue: str, secs: float) -> Returned:
        """Keep a claimed message until its time has come; it outlives this process. Dropped when its queue is gone.

        Raises OSError.
        """
        if self._root.existence(queue) is Existence.GONE:
            return self._drop(claim, queue)
        # Wall time, because it must mean the same to other hosts and after a restart.
        place = self._shared(names.DELAYED, queue) / f"{int((time.time() + secs) * 1000)}-{uuid.uuid4().hex}"
        try:
            claim.parent.rename(place)
        except FileNotFoundError:
            return Returned.LOST
        return Returned.BACK

    def set_aside(self, claim: Path, queue: str) -> Path:
        """Put a claimed message where nobody takes it any more. Raises OSError."""
        aside = claim.rename(self._shared(names.OVERSIZE, queue) / names.returned_name(claim.name))
        _remove_empty(claim.parent)
        return aside

    def record(self) -> Path:
        """The file that tells who we are; made when there is none yet. Raises OSError."""
        return self._register() / names.OWNER

    def temporary(self) -> Path:
        """The directory for files that are being written. Raises OSError."""
        return self._shared(names.TEMPORARY)

    def heartbeat(self) -> None:
        """Tell other hosts that this owner lives. Raises OSError.

        After a long sleep of this machine the claims may have been returned: the next `take` then starts afresh.
        """
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._own / names.OWNER)

    def close(self) -> None:
        """Remove what is left of this owner, when nothing is held any more. Raises OSError."""
        _remove_tree(self._own)

    # -- those of others ---------------------------------------------------------------------------------------------

    def sweep(self) -> Sweep:
        """Return what the dead held and what was delayed and is due. Raises OSError."""
        returned: set[str] = set()
        next_due: float | None = None
        for entry in _directories(self._area):
            if entry.name == names.DELAYED:
                next_due = self._return_due(entry, returned)
            elif entry.name == names.TEMPORARY:
                _remove_litter(entry)
            elif entry.name.startswith(names.DEAD):
                self._return_all(entry, returned)
            elif not entry.name.startswith(".") and entry != self._own and self._is_dead(entry):
                # One rename takes everything from an owner that may yet wake up, and makes of several sweepers one.
                with contextlib.suppress(FileNotFoundError):
                    self._return_all(entry.rename(entry.with_name(names.DEAD + entry.name)), returned)
        return Sweep(returned=frozenset(returned), next_due=next_due)

    def _is_dead(self, directory: Path) -> bool:
        record = directory / names.OWNER
        try:
            owner = Owner.from_json(record.read_text(encoding="utf-8", errors="replace"))
            alive = owner.is_alive(self._owner) if owner else None
            if alive is not None:
                return not alive
            # Both times are the file system's, so the clocks of the hosts do not matter.
            return self._now() - record.stat().st_mtime > self._stale_secs
        except FileNotFoundError:
            return not directory.exists()
        except OSError:
            return False

    def _now(self) -> float:
        """The file system's clock."""
        record = self.record()
        os.utime(record)
        return record.stat().st_mtime

    def _return_all(self, directory: Path, returned: set[str]) -> None:
        for queue in _directories(directory):
            for place in _directories(queue):
                for message in _entries(place):
                    self._return(message, queue.name, returned)
        _remove_tree(directory)

    def _return_due(self, directory: Path, returned: set[str]) -> float | None:
        next_due: float | None = None
        for queue in _directories(directory):
            for place in _directories(queue):
                due = _due(place.name)
                if due <= time.time():
                    for message in _entries(place):
                        self._return(message, queue.name, returned)
                    _remove_empty(place)
                else:
                    next_due = due if next_due is None else min(due, next_due)
        return next_due

    def _return(self, message: Path, queue: str, returned: set[str]) -> None:
        try:
            became = self.give_back(message, queue)
        except OSError as exc:  # one that cannot go back must not keep the others
            log.warning(
                "message cannot be returned",
                queue=queue,
                message=names.printable(message.name),
                error=exc.strerror,
            )
            return
        if became is Returned.BACK:
            returned.add(queue)
            log.info("message returned to its queue", queue=queue, message=names.printable(message.name))

    def _drop(self, claim: Path, queue: str) -> Returned:
        if not self.forget(claim):
            return Returned.LOST
        log.warning(
            "message dropped, its queue was removed", queue=queue, message=names.printable(claim.name)
        )
        return Returned.DROPPED

    def _register(self) -> Path:
        """Our directory, made with our record in it in one step. One that was taken over is not used again."""
        with self._registering:
            if not (self._own / names.OWNER).exists():
                names.make_like(self._area, self._root.path)
                own = self._area / uuid.uuid4().hex
                new = own.with_name(names.NEW + own.name)
                names.make_like(new, self._root.path)
                (new / names.OWNER).write_text(self._owner.to_json() + "\n", encoding="utf-8")
                self._own = new.rename(own)
            return self._own

    def _shared(self, *parts: str) -> Path:
        place = self._area
        names.make_like(place, self._root.path)
        for part in parts:
            place /= part
            names.make_like(place, self._root.path)
        return place


def _entries(path: Path) -> list[Path]:
    """What lies in a directory; nothing when somebody else has removed it."""
    try:
        return list(path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _directories(path: Path) -> list[Path]:
    return [entry for entry in _entries(path) if entry.is_dir() and not entry.is_symlink()]


def _due(name: str) -> float:
    """The wall time in the name of a delayed message's directory; 0 for what is none."""
    digits = name.partition("-")[0]
    return int(digits) / 1000 if digits.isascii() and digits.isdigit() else 0.0


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _remove_tree(owner: Path) -> None:
    """Remove an owner's directory if nothing is claimed in it: the record last, as it says whose the rest is."""
    for queue in _directories(owner):
        for place in _directories(queue):
            _remove_empty(place)
        _remove_empty(queue)
    if not any(True for _ in _directories(owner)):
        (owner / names.OWNER).unlink(missing_ok=True)
        _remove_empty(owner)


def _remove_litter(directory: Path) -> None:
    for path in _entries(directory):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime > _LITTER_SECS:
                path.unlink()
