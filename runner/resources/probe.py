"""The only place that looks at the host: how much of everything this machine has."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from runner import errors, units
from runner.process import tree
from runner.request.model import Resources
from runner.resources import containers

if TYPE_CHECKING:
    from runner.config import Machine

#: Of the volume of the working directory this share is never promised (INTEROP.md 8.3).
DISK_RESERVE = 0.10


def machine(limits: Machine, volume: Path, root: Path = Path("/")) -> Resources:
    """What this runner may give away: the machine, cut to the container's quotas (found below `root`) and the operator's limits.

    Memory is what is available now (`memory_available`), also when the operator's limit is above that: a daemon that is started
    again while memory is short has to come back. `hdd_bytes` is the size of the volume less its reserve;
    how much of it is free is asked anew at each allocation (`disk_free`).

    Raises:
        errors.UsageError: a limit is above what the machine has; the text says how much that is.
    """
    quota = containers.quota(root)
    cores = len(os.sched_getaffinity(0))
    cores = min(cores, quota.cores or cores)
    memory = psutil.virtual_memory().total
    memory = min(memory, containers.memory_limit(root) or memory)
    disk = int(shutil.disk_usage(volume).total * (1 - DISK_RESERVE))
    if limits.max_cores > cores:
        raise errors.UsageError(
            f"--max-cores {limits.max_cores}: this machine has {cores} cores; ask for at most that"
        )
    if limits.max_mem_bytes > memory:
        raise errors.UsageError(
            f"--max-mem {units.format_bytes(limits.max_mem_bytes)}: "
            f"this machine has {units.format_bytes(memory)}; ask for at most that"
        )
    return Resources(
        cpus=limits.max_cores or cores,
        ram_bytes=memory_available(limits, root),
        hdd_bytes=min(limits.max_disk_bytes or disk, disk),
    )


def memory_available(limits: Machine, root: Path = Path("/")) -> int:
    """What of the memory nobody uses, our own runs included, cut to the container's quotas and the operator's limit. Blocking."""
    free = psutil.virtual_memory().available
    quota = containers.quota(root).memory_bytes
    return min(free, free if quota is None else quota, limits.max_mem_bytes or free)


def disk_free(volume: Path) -> int:
    """Bytes that may be promised on that volume now: what is free, less the reserve."""
    usage = shutil.disk_usage(volume)
    return max(0, usage.free - int(usage.total * DISK_RESERVE))


#: The inode of the machine's first process id namespace, in every kernel since Linux 3.8 (PROC_PID_INIT_INO).
_HOST_PIDS = "pid:[4026531836]"


def sees_all_processes() -> bool:
    """Whether process ids mean here what they mean to the kernel: not in a container, unless it shares the host's."""
    with contextlib.suppress(OSError):
        return str(pathlib.Path("/proc/self/ns/pid").readlink()) == _HOST_PIDS
    return False


#: No process of a run has more above it.
_MAX_DEPTH = 64


def home(pid: int) -> str | None:
    """The `STUDIOML_HOME` of the run that this process belongs to; None when it belongs to none that is known.

    A program that gives itself another title (setproctitle) or starts its workers with an empty environment hides it: then what
    has started it is asked. Empty for one that descends from this very process, and nobody says of which run.
    """
    for _ in range(_MAX_DEPTH):
        if told := environment(pid).get("STUDIOML_HOME"):
            return told
        entry = tree.look(pid)
        if entry is None or entry.parent <= 1:
            return None
        pid = entry.parent
        if pid == os.getpid():
            return ""
    return None


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty when it is gone, or another user's."""
    with contextlib.suppress(OSError):
        content = pathlib.Path("/proc", str(pid), "environ").read_bytes()
        pairs = (entry.partition(b"=") for entry in content.split(b"\0") if b"=" in entry)
        return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
    return {}
