"""Messages that SQS may forget because this machine keeps them (LEASE.md, last paragraph).

SQS lets nobody hold a message for more than 12 hours. A run that goes on longer has its message written here, and then deleted
from the queue. It is sent again when the run is given up. A file a message, mode 0600: messages hold credentials.

What a daemon that ended left here is first offered to the next one's own consumers, as a redelivery, so that results that are
still to be stored are stored from here; what nobody takes in a minute is sent again.

The windows that remain: the machine or its state directory is lost after that point (the message is, too); the daemon stays
away (the message waits on its disk, out of everybody's sight); a crash, or no answer, between the writing and the deletion (two
copies: where the run is still here, the second is acknowledged); the same between the sending and the removal of the file.
"""

from __future__ import annotations

import dataclasses
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
    attempts: int = 0  #: as `Delivery.attempts`
    group: str | None = None  #: the MessageGroupId of a FIFO queue
    path: Path = Path()  #: its file


class Keep:
    """A directory of kept messages, of any number of accounts. Blocking."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(self, kept: Kept) -> Kept:
        """Write it, durably; with its path. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        document = dataclasses.asdict(kept)
        del document["path"]
        path = self._directory / f"{uuid4().hex}.json"
        unfinished = path.with_suffix(".part")
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(orjson.dumps(document))
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(path)
            _sync(self._directory)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        return dataclasses.replace(kept, path=path)

    def remove(self, kept: Kept) -> None:
        """Forget it. Idempotent."""
        kept.path.unlink(missing_ok=True)

    def load(self, account: str) -> list[Kept]:
        """What is kept for an account; files that cannot be read stay, and are named in the log."""
        found = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                kept = Kept(**orjson.loads(path.read_bytes()), path=path)
            except (ValueError, TypeError, OSError) as error:
                log.warning("a kept message cannot be read", path=str(path), error=str(error))
                continue
            if kept.account == account:
                found.append(kept)
        return found


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
