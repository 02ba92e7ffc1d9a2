"""The ledger: how often a message was tried here, and what finished here. It survives restarts (DESIGN.md rule 3, 5.3, 5.9).

SQLite in write-ahead mode: each call is one small transaction that is in the kernel's hands before it returns, so that a
`kill -9` right after loses nothing. Calls take well under a millisecond and are made in the daemon's loop.

A disk that is full stops what has not begun (`begin` raises), never what is over: the fate of a message that has run does
not hang on whether it could be noted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
import time
from typing import TYPE_CHECKING

import structlog

from runner import errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = structlog.get_logger(__name__)

#: Finished messages are remembered for a day: a redelivery of one is acknowledged on sight.
FINISHED_SECS = 24 * 3600
#: Attempts of messages that were never seen again (another host took them) are forgotten after a week.
ATTEMPTS_SECS = 7 * 24 * 3600
#: How often what is to be forgotten is removed.
PRUNE_SECS = 3600.0
#: How long another program's lock on the file is waited for: the daemon's loop stands still meanwhile.
LOCK_SECS = 0.5

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    queue TEXT NOT NULL, digest TEXT NOT NULL, count INTEGER NOT NULL, reason TEXT NOT NULL DEFAULT '',
    text TEXT NOT NULL DEFAULT '', time REAL NOT NULL, PRIMARY KEY (queue, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS finished (
    queue TEXT NOT NULL, digest TEXT NOT NULL, time REAL NOT NULL, PRIMARY KEY (queue, digest)) WITHOUT ROWID;
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempts:
    """What is known of a message's attempts."""

    count: int = 0
    reason: str = ""  #: an `errors.Reason`, of the last one that failed
    text: str = ""  #: its sentence


class Ledger:
    """Attempts and finished messages, by queue and digest of the body."""

    def __init__(self, path: Path) -> None:
        """Open, or make, the ledger.

        Raises:
            errors.UsageError: the file cannot be opened or is no ledger.
        """
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._db = _opened(path)
        except (OSError, sqlite3.Error) as exc:
            raise errors.UsageError(
                f"{path}: cannot be used as the attempt ledger: {exc}; move it away to start a new one"
            ) from exc
        self._pruned = 0.0
        self._queues: set[str] = set()
        with _noted():
            self._prune()
            known = self._db.execute("SELECT queue FROM attempts UNION SELECT queue FROM finished")
            self._queues = {queue for (queue,) in known}

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def attempts(self, queue: str, digest: str) -> Attempts:
        """What has been tried so far. Raises OSError."""
        with _translated():
            row = self._db.execute(
                "SELECT count, reason, text FROM attempts WHERE queue=? AND digest=?", (queue, digest)
            ).fetchone()
        return Attempts(count=row[0], reason=row[1], text=row[2]) if row else Attempts()

    def begin(self, queue: str, digest: str, carried: int = 0) -> int:
        """Count an attempt, before its work starts; its number, from 1. `carried` is what travelled with the message.

        Raises OSError: then nothing was counted, and nothing may start.
        """
        count = max(self.attempts(queue, digest).count, carried) + 1
        with _translated():
            self._db.execute(
                "INSERT INTO attempts (queue, digest, count, reason, text, time) VALUES (?,?,?,?,?,?) ON CONFLICT "
                "(queue, digest) DO UPDATE SET count=excluded.count, reason=excluded.reason, text=excluded.text, "
                "time=excluded.time",
                # Should this attempt kill the runner, this is what is said of it.
                (queue, digest, count, errors.Reason.RUNNER, "the runner ended while it ran", time.time()),
            )
        return count

    def undo(self, queue: str, digest: str, number: int = 1) -> None:
        """The last `number` calls of `begin` were no attempts after all (the other side was away, the runner drained)."""
        self._note(
            "UPDATE attempts SET count=max(count-?, 0), time=? WHERE queue=? AND digest=?",
            (number, time.time(), queue, digest),
        )

    def failed(self, queue: str, digest: str, reason: str, text: str) -> None:
        """Why the last attempt failed."""
        self._note(
            "UPDATE attempts SET reason=?, text=?, time=? WHERE queue=? AND digest=?",
            (reason, text, time.time(), queue, digest),
        )

    def finish(self, queue: str, digest: str, *, others: int = 0, unique: bool = True) -> None:
        """Its outcome is durable: a redelivery of it is acknowledged on sight, and a new message of the same bytes starts at 0.

        Not so when it was not `unique`: a redelivery may then be of another message with the same bytes, which has to run.
        `others`: the attempts of those that run now.
        """
        with _noted(), self._transaction():
            if others:
                self._db.execute(
                    "UPDATE attempts SET count=? WHERE queue=? AND digest=?", (others, queue, digest)
                )
            else:
                self._db.execute("DELETE FROM attempts WHERE queue=? AND digest=?", (queue, digest))
            if unique and not others:
                self._db.execute(
                    "INSERT OR REPLACE INTO finished VALUES (?,?,?)", (queue, digest, time.time())
                )
            if abs(time.time() - self._pruned) > PRUNE_SECS:
                self._prune()

    def finished(self, queue: str, digest: str) -> bool:
        """Whether it finished here in the last 24 hours. Raises OSError."""
        with _translated():
            row = self._db.execute(
                "SELECT time FROM finished WHERE queue=? AND digest=?", (queue, digest)
            ).fetchone()
        return row is not None and time.time() - row[0] < FINISHED_SECS

    def published_anew(self, queue: str, digest: str) -> None:
        """A new message of these bytes has come: from now on a redelivery may be its own, and has to run. Raises OSError."""
        if self.finished(queue, digest):
            with _translated():
                self._db.execute("DELETE FROM finished WHERE queue=? AND digest=?", (queue, digest))

    def renamed(self, old: str, new: str) -> None:
        """What was written down before this start of a queue called `old` is of `new`, another one. Costs nothing where there is none."""
        if old not in self._queues:
            return
        self._queues.discard(old)
        with _noted(), self._transaction():
            self._db.execute(
                "INSERT INTO attempts SELECT ?, digest, count, reason, text, time FROM attempts WHERE queue=? ON CONFLICT "
                "(queue, digest) DO UPDATE SET count=max(count, excluded.count)",
                (new, old),
            )
            self._db.execute("UPDATE OR REPLACE finished SET queue=? WHERE queue=?", (new, old))
            self._db.execute("DELETE FROM attempts WHERE queue=?", (old,))

    def _note(self, statement: str, values: tuple[object, ...]) -> None:
        with _noted():
            self._db.execute(statement, values)

    def _prune(self) -> None:
        self._pruned = time.time()
        self._db.execute("DELETE FROM finished WHERE time<?", (self._pruned - FINISHED_SECS,))
        self._db.execute("DELETE FROM attempts WHERE time<?", (self._pruned - ATTEMPTS_SECS,))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk may have ended it
                self._db.execute("ROLLBACK")
            raise


def _opened(path: Path) -> sqlite3.Connection:
    """The file, with its tables. Raises sqlite3.Error, and has closed it then."""
    with contextlib.ExitStack() as failed:
        db = sqlite3.connect(path, isolation_level=None, timeout=LOCK_SECS)
        failed.callback(db.close)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.executescript(_SCHEMA)
        failed.pop_all()
    return db


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise OSError(f"the attempt ledger cannot be used: {exc}") from exc


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        # A wrong count makes an attempt more or less; stopping here would leave a message neither ended nor run.
        log.error("the attempt ledger cannot be written", error=str(exc))  # noqa: TRY400 - the error tells it all
