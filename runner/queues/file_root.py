"""The root of directory queues: what queues there are, and whether one that is missing is really gone. All calls block."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from runner.queues.base import Existence
from runner.queues.file_names import is_queue_name

if TYPE_CHECKING:
    from pathlib import Path


class QueueRoot:
    """A directory whose visible sub-directories are queues.

    A directory is durable, so a missing one was removed by somebody: GONE. Except when the root itself went away or was
    exchanged, as an unmounted file system does: then nothing is known. So it is remembered on which root (device and
    inode) each queue was last seen; that root is the "unbroken connection" of DESIGN.md rule 11.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.real = ""  #: its path without links, as of the last `discover`
        self._seen: dict[str, tuple[int, int]] = {}

    def queue(self, name: str) -> Path:
        """The directory of a queue."""
        return self.path / name

    def discover(self) -> list[str]:
        """The names of all queues, sorted. Links are not followed. Raises OSError."""
        identity = self._identity()
        with os.scandir(self.path) as entries:
            names = [e.name for e in entries if is_queue_name(e.name) and e.is_dir(follow_symlinks=False)]
        self._seen = {**self._seen, **dict.fromkeys(names, identity)}
        self.real = str(self.path.resolve())
        return sorted(names)

    def existence(self, name: str) -> Existence:
        """Whether the queue is there. Never raises."""
        try:
            identity = self._identity()
            try:
                here = stat.S_ISDIR(self.queue(name).lstat().st_mode)
            except FileNotFoundError:
                here = False
        except (OSError, ValueError):  # ValueError: a NUL in the name
            return Existence.UNKNOWN
        if here and is_queue_name(name):
            self._seen[name] = identity
            return Existence.HERE
        return Existence.GONE if self._seen.get(name, identity) == identity else Existence.UNKNOWN

    def _identity(self) -> tuple[int, int]:
        found = self.path.stat()
        return found.st_dev, found.st_ino
