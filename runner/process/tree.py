"""The processes below one, and how to signal all of them. Standard library only.

/proc is read as a whole: `/proc/<pid>/task/*/children` is not in every kernel, and misses children while others end.
A scan costs some milliseconds and is made only when something has to be ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import NamedTuple


class Entry(NamedTuple):
    """A process as it was seen."""

    pid: int
    parent: int
    group: int
    start: int  #: in clock ticks since boot: with the pid it names one process for ever
    zombie: bool  #: it has ended (its other threads may not have)


def look(pid: int) -> Entry | None:
    """The process with this id, or None."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:  # noqa: PTH123 - pathlib costs megabytes here
            text = file.read(1024)
    except OSError:
        return None
    # The second field is the program's name in brackets, and may hold anything, also spaces and brackets.
    fields = text[text.rindex(b")") + 2 :].split()
    return Entry(pid, int(fields[1]), int(fields[2]), int(fields[19]), fields[0] in b"ZX")


def descendants(root: int, spare: frozenset[int] = frozenset()) -> list[Entry]:
    """Every process below `root`, parents before their children, without those in `spare` and what is below them."""
    children: dict[int, list[Entry]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - see look()
        if name.isdigit() and (entry := look(int(name))) is not None:
            children.setdefault(entry.parent, []).append(entry)
    found: list[Entry] = []
    parents = [root]
    for parent in parents:  # grows while it is walked
        for entry in children.get(parent, ()):
            if entry.pid not in spare:
                found.append(entry)
                parents.append(entry.pid)
    return found


def send(entry: Entry, number: signal.Signals) -> None:
    """Signal exactly this process: never another one that has got its id since."""
    try:
        handle = os.pidfd_open(entry.pid)
    except ProcessLookupError:
        return
    except OSError:  # a kernel or sandbox without pidfds
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(entry.pid, number)
        return
    try:
        current = look(entry.pid)
        if current is not None and current.start == entry.start:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(handle, number)
    finally:
        os.close(handle)


def terminate(entries: list[Entry]) -> None:
    """Ask each to end, once (programs take a second TERM for impatience). Stopped ones are woken up to hear it."""
    for entry in entries:
        send(entry, signal.SIGTERM)
        send(entry, signal.SIGCONT)


def kill(entries: list[Entry]) -> None:
    """Kill each, and before that each one's group as a whole: no fork can slip through between two of its members.

    A workload starts in a session of its own, and nobody from outside can join a group of that session, so every
    group found below a supervisor is its own; but for ours, where a child is before its `setsid`.
    """
    for group in {entry.group for entry in entries} - {os.getpgrp(), 0}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for entry in entries:  # parents first: they start no replacement for a child
        send(entry, signal.SIGKILL)
