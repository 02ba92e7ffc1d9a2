"""Trees of files as the kernel shows control groups, of both versions; and the real ones of this machine."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING

from runner.process import cgroups

if TYPE_CHECKING:
    from pathlib import Path


class Tree:
    """A root directory with /proc/self and /sys/fs/cgroup as a process would see them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.groups = root / "sys/fs/cgroup"
        self._own: list[str] = []
        self._mounts: list[str] = []

    def second(self, path: str = "/", *, mounted: str = "/") -> Path:
        """Mount version 2; `path` is ours, `mounted` the part of the hierarchy that is shown."""
        self._own.append(f"0::{path}")
        self._mounts.append(f"30 23 0:26 {mounted} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate")
        return self._placed(self.groups, path, mounted)

    def first(self, controllers: str, path: str = "/", *, mounted: str = "/") -> Path:
        """Mount these version 1 controllers together."""
        number = 2 + len(self._own)
        self._own.append(f"{number}:{controllers}:{path}")
        self._mounts.append(
            f"3{number} 23 0:3{number} {mounted} /sys/fs/cgroup/{controllers} rw,nosuid shared:9 - "
            f"cgroup cgroup rw,{controllers}"
        )
        return self._placed(self.groups / controllers, path, mounted)

    def _placed(self, top: Path, path: str, mounted: str) -> Path:
        (self.root / "proc/self").mkdir(parents=True, exist_ok=True)
        (self.root / "proc/self/cgroup").write_text("\n".join(self._own) + "\n")
        (self.root / "proc/self/mountinfo").write_text("\n".join(self._mounts) + "\n")
        below = os.path.relpath(path, mounted)
        directory = top if below.startswith("..") else top / below
        directory.mkdir(parents=True, exist_ok=True)
        return directory


def write(directory: Path, **files: object) -> None:
    """Files in it; two underscores stand for a dot."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(f"{content}\n")


def real(controller: str = "") -> Path | None:
    """Where this process may make real groups: below its own of version 2, or of a version 1 controller. None: nowhere."""
    mount = cgroups.own(controller=controller)
    if mount is None:
        return None
    probe = mount.directory / f"probe-{uuid.uuid4().hex[:8]}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return None
    return mount.directory
