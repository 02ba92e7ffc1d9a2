"""The control group of one run: what a supervisor does with it. Standard library only. `cgroups` makes it.

Version 2 limits memory, processor weight and the number of processes, and kills as a whole. Of version 1 only the memory
controller is used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time

from runner.process import kernel

_ENTRIES = {  #: by version: how often the kernel has ended a process for want of memory; the most that was used; the limit
    1: ("memory.oom_control", "memory.max_usage_in_bytes", "memory.limit_in_bytes"),
    2: ("memory.events", "memory.peak", "memory.max"),
}
_UNLIMITED = 1 << 60  #: version 1 has no word for it, but a number near the largest
_REMOVE_SECS = 1.0  #: what was reaped a moment ago may still be in it


class Group:
    """A directory below a control group file system. Every method blocks for some microseconds."""

    def __init__(self, path: str, version: int) -> None:
        self.path = path
        self.version = version

    def fork(self) -> int:
        """`os.fork`, whose child is in the group, and what that starts too; not so when the group is gone. Without other threads."""
        if self.version == 2:  # noqa: PLR2004
            with contextlib.suppress(OSError):
                fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    return kernel.fork_into(fd)
                finally:
                    os.close(fd)
        pid = os.fork()
        if pid == 0:
            # `tasks` moves this thread, the only one: to move a process by `cgroup.procs` waits for every processor to
            # pass by, 10 to 30 ms during which nobody on the machine can fork. Version 2 moves processes only.
            with contextlib.suppress(OSError):
                self._write("cgroup.procs" if self.version == 2 else "tasks", b"0")  # noqa: PLR2004
        return pid

    def kill(self) -> None:
        """End everything in it at once, where the kernel can (5.14, version 2): no fork slips through."""
        if self.version == 2:  # noqa: PLR2004
            with contextlib.suppress(OSError):
                self._write("cgroup.kill", b"1")

    def oom_kills(self) -> int:
        """How many of its processes the kernel has ended for want of memory; 0 where that is not told."""
        for line in self._read(_ENTRIES[self.version][0]).splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
        return 0

    def peak_bytes(self) -> int:
        """The most memory that was charged to it, caches of files included; 0 where that is not told."""
        return self._number(_ENTRIES[self.version][1])

    def limit_bytes(self) -> int:
        """The memory that it may use; 0: no limit."""
        limit = self._number(_ENTRIES[self.version][2])
        return limit if limit < _UNLIMITED else 0

    def gone(self) -> bool:
        """Whether it has been removed."""
        return not os.path.isdir(self.path)  # noqa: PTH112 - pathlib costs megabytes here

    def remove(self) -> None:
        """Remove it, with the groups that a workload has made in it; nothing when it is gone.

        One that is not empty stays: the next start of a daemon removes it.
        """
        until = time.monotonic() + _REMOVE_SECS
        while True:
            for directory, _, _ in os.walk(self.path, topdown=False):
                try:
                    os.rmdir(directory)  # noqa: PTH106 - pathlib costs megabytes here
                except OSError as exc:
                    if exc.errno != errno.EBUSY:
                        return
            if self.gone() or time.monotonic() >= until:
                return
            time.sleep(0.005)

    def _number(self, name: str) -> int:
        text = self._read(name).strip()
        return int(text) if text.isdecimal() else 0

    def _read(self, name: str) -> str:
        try:
            fd = os.open(f"{self.path}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return ""
        try:
            return os.read(fd, 4096).decode()
        except OSError:
            return ""
        finally:
            os.close(fd)

    def _write(self, name: str, content: bytes) -> None:
        fd = os.open(f"{self.path}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, content)
        finally:
            os.close(fd)
