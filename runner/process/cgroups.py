"""The control groups that a daemon makes for its runs, where it may: found, prepared, made, swept.

::

    <own>/studio-runner-daemon/        version 2: the daemon and its supervisors. A group that hands controllers on has no
                                       processes of its own ("no internal processes"), so they move into a leaf
    <own>/studio-runner.<pid>.<run>/   a run: memory.max, memory.swap.max, memory.oom.group, cpu.weight, pids.max

`<own>` is the group in which the daemon was started. It is rearranged only when nobody else is in it: a service that systemd
delegates (`Delegate=yes`), the main process of a container. A login shell's is left alone. Of version 1 the memory controller is
used where a group can be made below the daemon's own; nothing has to move there.

Everything is found below `root`, so that a tree made by a test serves as well.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runner.process import tree
from runner.process.cgroup import Group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LEAF = "studio-runner-daemon"
_PREFIX = "studio-runner."
#: Those that are handed on, as far as they are there. Without the first one version 2 is of no use here.
CONTROLLERS = ("memory", "cpu", "pids")
_MOVES = 10  #: rounds of moving the processes of our own group, while they fork
#: Processes and threads of one run: enough for any, and less than what a machine has ids for.
MAX_PIDS = 16_384
_WEIGHT, _MAX_WEIGHT = 100, 10_000  #: cpu.weight of one core


class Unavailable(Exception):  # noqa: N818 - no failure: a fact, whose text says why
    """No control groups can be made here."""


class Mount(NamedTuple):
    """A mounted hierarchy of control groups."""

    version: int
    directory: Path  #: of our own group
    top: Path  #: where it is mounted


def own(root: Path = Path("/"), controller: str = "") -> Mount | None:
    """Where this process's own control group is: that of a version 1 controller, or (empty) that of version 2.

    None when that hierarchy is not mounted. A path that lies outside of what is mounted (a container without a namespace
    of its own for control groups) stands for the mount itself.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(errors="replace")
        mounts = (root / "proc/self/mountinfo").read_text(errors="replace")
    except OSError:
        return None
    path = None
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, found = rest.partition(":")
        if controller in controllers.split(",") if controller else number == "0" and not controllers:
            path = found
    if path is None:
        return None
    kind = "cgroup" if controller else "cgroup2"
    for line in mounts.splitlines():
        first, _, second = line.partition(" - ")
        fields, kinds = first.split(), second.split()
        if len(fields) < 5 or len(kinds) < 3 or kinds[0] != kind:  # noqa: PLR2004 - proc(5)
            continue
        if controller and controller not in kinds[-1].split(","):
            continue
        top = root / _plain(fields[4]).lstrip("/")
        below = os.path.relpath(path, _plain(fields[3]))
        directory = top if below.startswith("..") or not (top / below).is_dir() else top / below
        return Mount(2 if kind == "cgroup2" else 1, Path(os.path.normpath(directory)), top)
    return None


def _plain(field: str) -> str:
    """A path of mountinfo: spaces and the like are written as octal numbers."""
    return field.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def oom_counter(root: Path = Path("/")) -> Path:
    """A file that tells (`oom_kill N`) how many processes beside us the kernel has ended for want of memory.

    That of our own group, where limits of a container and of the machine count; of the whole machine where there is none.
    """
    for controller, name in (
        ("memory", "memory.oom_control"),
        ("", "memory.events.local"),
        ("", "memory.events"),
    ):
        mount = own(root, controller)
        if mount is not None and (mount.directory / name).is_file():
            return mount.directory / name
    return root / "proc/vmstat"


def strangers(pids: Iterable[int]) -> set[int]:
    """Those that are neither we nor what we have started, nor a container's process 1."""
    ours = {entry.pid for entry in tree.descendants(os.getpid())}
    return {pid for pid in pids if tree.look(pid) is not None} - ours - {os.getpid(), 1}


class Groups:
    """Makes groups below `base`. Use `find`."""

    def __init__(self, base: Path, version: int) -> None:
        self.base = base
        self.version = version

    def __str__(self) -> str:
        what = "cgroup v2" if self.version == 2 else "cgroup v1, memory only,"  # noqa: PLR2004
        return f"{what} at {self.base}"

    @classmethod
    def find(
        cls, root: Path = Path("/"), *, strangers: Callable[[Iterable[int]], set[int]] = strangers
    ) -> Groups:
        """Prepare what there is, and remove what dead daemons have left in it. Blocking.

        Raises:
            Unavailable: with the reason, for a person.
        """
        try:
            groups = cls(_prepared(_second(root, strangers)), 2)
        except Unavailable as exc:
            groups = cls(_first(root, exc), 1)
        groups.sweep()
        return groups

    @classmethod
    def foreseen(cls, root: Path = Path("/")) -> Groups:
        """What `find` would probably give; nothing is changed. Blocking; raises as `find`."""
        try:
            return cls(_second(root, strangers), 2)
        except Unavailable as exc:
            return cls(_first(root, exc), 1)

    def make(self, name: str, *, cpus: int, ram_bytes: int) -> Group:
        """A new group for a run; `ram_bytes` 0 is no limit. Blocking.

        Raises:
            OSError: it cannot be made, or cannot be limited; nothing is left of it.
        """
        directory = self.base / f"{_PREFIX}{os.getpid()}.{name}"
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
        group = Group(str(directory), self.version)
        try:
            if self.version == 2:  # noqa: PLR2004
                self._limit(directory, cpus, ram_bytes)
            elif ram_bytes:
                (directory / "memory.limit_in_bytes").write_text(str(ram_bytes))
                with contextlib.suppress(OSError):  # swap may not be counted
                    (directory / "memory.memsw.limit_in_bytes").write_text(str(ram_bytes))
        except OSError:
            group.remove()
            raise
        return group

    def _limit(self, directory: Path, cpus: int, ram_bytes: int) -> None:
        (directory / "memory.max").write_text(str(ram_bytes) if ram_bytes else "max")
        weight = min(max(1, cpus) * _WEIGHT, _MAX_WEIGHT)
        for name, value in (
            ("memory.swap.max", "0" if ram_bytes else "max"),
            ("memory.oom.group", "1"),  # half a run is of no use, and could hang
            ("cpu.weight", str(weight)),
            ("pids.max", str(MAX_PIDS)),
        ):
            with contextlib.suppress(OSError):  # a kernel without swap, a controller that is not handed on
                (directory / name).write_text(value)

    def sweep(self) -> None:
        """Remove the groups of daemons that are gone, with whatever is in them."""
        for directory in self.base.glob(f"{_PREFIX}*.*"):
            pid = directory.name.split(".")[1]
            if pid.isdecimal() and int(pid) != os.getpid() and tree.look(int(pid)) is None:
                group = Group(str(directory), self.version)
                group.kill()
                group.remove()


def _first(root: Path, why: Unavailable) -> Path:
    """Our group of version 1. Raises `why` version 2 does not do, when this one does not either."""
    mount = own(root, CONTROLLERS[0])
    if mount is None or not _can_make(mount.directory):
        raise why
    if not (mount.directory / "memory.limit_in_bytes").exists():
        raise why
    return mount.directory


def _second(root: Path, strangers: Callable[[Iterable[int]], set[int]]) -> Path:
    """Our group of version 2, as it is. Raises Unavailable."""
    mount = own(root)
    if mount is None:
        raise Unavailable("cgroup v2 is not mounted")
    base = mount.directory.parent if mount.directory.name == LEAF else mount.directory
    needed = CONTROLLERS[0]
    if needed not in _words(base / "cgroup.controllers"):
        raise Unavailable(f"cgroup v2 at {base} has no {needed} controller")
    if not _can_make(base):
        raise Unavailable(f"{base} cannot be written")
    if others := strangers(_pids(base)):
        raise Unavailable(f"{base} is not the daemon's alone: process {min(others)} is in it as well")
    return base


def _prepared(base: Path) -> Path:
    """It, ready to have groups below it. Raises Unavailable."""
    needed = CONTROLLERS[0]
    try:
        _move(base, base / LEAF)
        for controller in CONTROLLERS:
            with contextlib.suppress(OSError):
                (base / "cgroup.subtree_control").write_text(f"+{controller}")
        if needed not in _words(base / "cgroup.subtree_control"):
            raise OSError(f"the {needed} controller of {base} cannot be handed on")
    except OSError as exc:
        with contextlib.suppress(OSError):
            _move(base / LEAF, base)
            (base / LEAF).rmdir()
        raise Unavailable(f"cgroup v2 cannot be used: {exc}") from exc
    return base


def _move(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for _ in range(_MOVES):
        pids = [pid for pid in _pids(source) if pid]
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (target / "cgroup.procs").write_text(str(pid))
    raise OSError(f"processes of {source} cannot be moved out of it")


def _pids(directory: Path) -> list[int]:
    return [int(word) for word in _words(directory / "cgroup.procs") if word.isdecimal()]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _can_make(directory: Path) -> bool:
    """Tried, not asked: what is mounted read-only, or is not ours, says so only then."""
    probe = directory / f"{_PREFIX}{os.getpid()}.probe"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True
