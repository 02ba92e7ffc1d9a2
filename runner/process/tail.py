"""Reading a file that grows, each byte once."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from pathlib import Path


def open_unlinked(path: Path, flags: int) -> int:
    """Open a file of which neither the name nor the directory is a link: a workload could have put one there. Raises OSError."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.open(path.name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    finally:
        os.close(directory)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open, unbuffered, a file that lies where a workload can put something else: a named pipe would wait for ever.

    Raises OSError; FileNotFoundError also for a link, or a directory that is one, and for what is no regular file.
    """
    try:
        fd = open_unlinked(path, flags | os.O_NONBLOCK)
    except OSError as exc:
        if exc.errno in {errno.ELOOP, errno.ENOTDIR, errno.ENXIO}:
            raise FileNotFoundError(errno.ENOENT, "no regular file", str(path)) from exc
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "no regular file", str(path))
    return os.fdopen(fd, "r+b" if flags & os.O_RDWR else "rb", buffering=0)


class Tail:
    """A place in a file that somebody else appends to. Holds no descriptor between reads; blocking, so for threads.

    `offset` is the place: what lies before it was read. It may be given to go on where another Tail has ended.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset

    def read_new(self, max_bytes: int) -> bytes:
        """Return the next bytes, at most so many; nothing when there are none yet, or no file.

        A file that has become shorter than `offset` was truncated and is read from its start again. Raises OSError
        when there is a file but it cannot be read.
        """
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            return b""
        with file:
            if file.seek(0, 2) < self.offset:
                self.offset = 0
            file.seek(self.offset)
            data = file.read(max_bytes)
        self.offset += len(data)
        return data
