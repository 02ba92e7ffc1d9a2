"""The lock file that the Python client holds while it writes or reads a queue (`filelock.SoftFileLock`, INTEROP.md 2.7).

It exists while somebody holds it. Nobody removes it after a crash, hence the breaking here: at once when the process
that is named in it is known to be dead, else by its age. Ours is a hard link to the owner's record: never seen without
its content, whenever its maker is killed, and as young as his last heartbeat.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from typing import TYPE_CHECKING

import structlog

from runner.queues.file_names import LOCK
from runner.queues.file_owner import Owner

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = structlog.get_logger(__name__)

#: what file systems without hard links say
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


@contextlib.contextmanager
def locked(queue: Path, record: Path, owner: Owner, *, stale_secs: float) -> Iterator[bool]:
    """Hold the queue's lock if it is free now; yields whether it is held. Never waits: the caller asks again.

    `record` is the file that tells of `owner`. Raises OSError: FileNotFoundError when the queue is gone.
    """
    path = queue / LOCK
    inode = _create(path, record)
    if inode is None and _break(path, owner, stale_secs):
        inode = _create(path, record)
    try:
        yield inode is not None
    finally:
        if inode is not None:
            # Only our own: it may have been broken, and taken by another, while this process was asleep.
            with contextlib.suppress(OSError):
                if path.lstat().st_ino == inode:
                    path.unlink()


def _create(path: Path, record: Path) -> int | None:
    """Make the file, which is to take the lock; its inode, or None when somebody holds it."""
    try:
        try:
            path.hardlink_to(record)
        except FileNotFoundError:
            raise
        except OSError as exc:
            if exc.errno not in _NO_LINKS:
                raise
            with path.open("xb") as file:
                file.write(record.read_bytes())
        return path.lstat().st_ino
    except FileExistsError:
        return None


def _break(path: Path, owner: Owner, stale_secs: float) -> bool:
    """Remove the lock of a dead holder. True when it is worth another try."""
    try:
        before = path.lstat()
        age_secs = time.time() - before.st_mtime
        if age_secs < stale_secs and not _is_of_dead(path, owner):
            return False
        # By rename, so that of several who break it only one does; and looked at again, because between the look and
        # the rename it may have become somebody's fresh lock: that one is put back.
        aside = path.with_name(f".{LOCK}.{secrets.token_hex(6)}")
        path.rename(aside)
        if aside.lstat().st_ino != before.st_ino:
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(aside)
            aside.unlink()
            return False
        aside.unlink()
    except FileNotFoundError:
        return True
    log.warning("stale lock broken", queue=path.parent.name, age_secs=round(age_secs, 1))
    return True


def _is_of_dead(path: Path, owner: Owner) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        holder = Owner.from_json(os.read(fd, 4096).decode("utf-8", "replace"))
    finally:
        os.close(fd)
    return holder is not None and holder.is_alive(owner) is False
