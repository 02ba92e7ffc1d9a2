"""File locks between the daemons that share a directory, and between the tasks of one."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

POLL_SECS = 0.05  #: another holder cannot wake us; what is waited for takes seconds


@contextlib.asynccontextmanager
async def held(path: Path, *, shared: bool) -> AsyncIterator[None]:
    """Holds the lock `path` while open. Waits without a limit of its own: the holder's work has one; cancel-safe.

    Ends with its process, however that dies. Not re-entrant; one task may hold several different locks.
    """
    while (lock := _try(path, shared=shared)) is None:  # noqa: ASYNC110 - see POLL_SECS
        await asyncio.sleep(POLL_SECS)
    try:
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def held_if_free(path: Path) -> Iterator[bool]:
    """Holds `path` alone while open, if nobody has it; else gives False. The lock's file is removed afterwards."""
    lock = _try(path, shared=False)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)  # while it is held: `_try` of others sees that it has gone
            os.close(lock)


def _try(path: Path, *, shared: bool) -> int | None:
    """An open descriptor that holds the lock, or None."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None
