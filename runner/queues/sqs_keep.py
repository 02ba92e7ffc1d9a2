"""Messages that SQS may forget because this machine keeps them (LEASE.md, last paragraph).

SQS lets nobody hold a message for more than 12 hours. A run that goes on longer has its message written here, and then deleted
from the queue. It is sent again when the run is given up. A file a message, mode 0600: messages hold credentials.

A file is locked by the backend that keeps its message, so that another one of the same account leaves it alone. What a backend
that ended has left is first offered to the run that it belonged to, whose results may still have to be stored from here
(`QueueBackend.reclaim`); what no run claims in a minute is sent again.

The windows that remain: the machine or its state directory is lost after that point (the message is, too); the daemon stays
away (the message waits on its disk, out of everybody's sight); a crash, or no answer, between the writing and the deletion (two
copies: where the run is still here, the second is acknowledged); the same between the sending and the removal of the file.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from pathlib import Path
from uuid import uuid4

import orjson
import structlog

log = structlog.get_logger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """A message that is on this disk and, once it was deleted there, in no queue."""

    account: str  #: the label of the account
    queue: str
    body: str
    attempts: int = 0  #: as `Delivery.attempts`: of the run that has it, too
    group: str | None = None  #: the MessageGroupId of a FIFO queue
    path: Path = Path()  #: its file


class Keep:
    """A directory of kept messages, of any number of accounts. Blocking; calls about different messages may overlap."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._locks: dict[Path, int] = {}  # open files, of what this backend keeps

    def save(self, kept: Kept) -> Kept:
        """Write it, durably, in the place of what was written of it before; with its path. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        document = dataclasses.asdict(kept)
        del document["path"]
        path = kept.path if kept.path.name else self._directory / f"{uuid4().hex}.json"
        unfinished = path.with_suffix(".part")
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with os.fdopen(fd, "wb", closefd=False) as file:
                file.write(orjson.dumps(document))
                file.flush()
                os.fsync(fd)
            unfinished.rename(path)
            _sync(self._directory)
        except OSError:
            os.close(fd)
            unfinished.unlink(missing_ok=True)
            raise
        self._unlock(path)
        self._locks[path] = fd
        return dataclasses.replace(kept, path=path)

    def remove(self, kept: Kept) -> None:
        """Forget it. Idempotent."""
        kept.path.unlink(missing_ok=True)
        self._unlock(kept.path)

    def load(self, account: str) -> list[Kept]:
        """What was left of an account, ours from now on; files that cannot be read stay, and are named in the log."""
        found = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                kept = self._claim(path, account)
            except (ValueError, TypeError, OSError) as error:
                log.warning("a kept message cannot be read", path=str(path), error=str(error))
            else:
                found += [kept] if kept is not None else []
        return found

    def close(self) -> None:
        """What is kept still is left to others."""
        for path in tuple(self._locks):
            self._unlock(path)

    def _claim(self, path: Path, account: str) -> Kept | None:
        """Lock and read it; None when somebody keeps it, or it is another account's."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink == 0:  # done with, or rewritten, since it was listed
                return None
            with os.fdopen(fd, "rb", closefd=False) as file:
                kept = Kept(**orjson.loads(file.read()), path=path)
            if kept.account != account:
                return None
            self._locks[path], fd = fd, -1
            return kept
        except BlockingIOError:
            return None
        finally:
            if fd >= 0:
                os.close(fd)

    def _unlock(self, path: Path) -> None:
        if (fd := self._locks.pop(path, None)) is not None:
            os.close(fd)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
