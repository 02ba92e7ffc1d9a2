"""Files of the kernel that root in a Singularity container could write, although it has no capabilities.

Who owns a setting in /proc/sys or /sys may write it, and both belong to root: in /proc/sys/kernel/core_pattern it could name a
program that the kernel runs on the host. Docker and Podman mount them read-only by themselves; Apptainer and Singularity do
not, and a daemon that is root starts containers as root, also with --run-as.
"""

from __future__ import annotations

import os
from pathlib import Path

#: Shown as empty directories: the host has other file systems in them, which would come along with theirs, and be written.
_HIDDEN = tuple(
    Path(name)
    for name in (
        "/proc/acpi",
        "/proc/fs",
        "/proc/scsi",
        "/proc/sys/fs",
        "/sys/firmware",
        "/sys/fs",
        "/sys/kernel",
    )
)
_READ_ONLY = (Path("/proc/bus"), Path("/proc/irq"))
_PARENTS = (Path("/proc/sys"), Path("/sys"))  #: whatever else is in them can be read, and not written
_TRIGGER = Path("/proc/sysrq-trigger")


def binds(empty: Path) -> tuple[str, ...]:
    """The engine's flags; none where this process is not root. `empty` is an empty directory. Blocks, below 1 ms."""
    if os.geteuid() != 0:
        return ()
    inside = [path for parent in _PARENTS if parent.is_dir() for path in sorted(parent.iterdir())]
    mounts = [f"{empty}:{path}:ro" for path in _HIDDEN if path.is_dir()]
    mounts += [
        f"{path}:{path}:ro" for path in (*_READ_ONLY, *inside) if path not in _HIDDEN and path.exists()
    ]
    if _TRIGGER.exists():
        mounts.append(f"/dev/null:{_TRIGGER}:ro")
    return ("--bind", ",".join(mounts))
