"""What a container leaves of the machine: the quotas of control groups, versions 1 and 2. Pure but for reading files below `root`.

A quota holds for everything below the group that has it, so every group from our own to the top of what is mounted counts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from runner.process import cgroups

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Larger ones are no limits: version 1 writes one near 2**63 for "none".
_UNLIMITED_BYTES = 1 << 60
_MAX_CORES = 1 << 16
#: No group lies deeper; a tree of links would otherwise never end.
_MAX_DEPTH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quota:
    """What the control groups allow; None where they do not limit."""

    cores: int | None = None  #: whole ones, at least one
    memory_bytes: int | None = (
        None  #: what may still be used: the limit, less what is used and cannot be given back
    )


def quota(root: Path = Path("/")) -> Quota:
    """The quota of the group that this process is in. What is missing or makes no sense does not limit. Blocking."""
    return Quota(cores=_least(_cores(root)), memory_bytes=_least(left for _, left in _memory(root)))


def memory_limit(root: Path = Path("/")) -> int | None:
    """All the memory that the group of this process may ever have, whoever uses it now; None: no limit. Blocking."""
    return _least(limit for limit, _ in _memory(root))


def _least(values: Iterator[int]) -> int | None:
    return min(values, default=None)


def _cores(root: Path) -> Iterator[int]:
    if (mount := cgroups.own(root)) is not None:
        for group in _upward(mount):
            given, _, period = _read(group / "cpu.max").partition(" ")
            yield from _whole(given, period)
            yield from _counted(_read(group / "cpuset.cpus.effective"))
    if (mount := cgroups.own(root, "cpu")) is not None:
        for group in _upward(mount):
            yield from _whole(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))
    if (mount := cgroups.own(root, "cpuset")) is not None:
        effective = _read(mount.directory / "cpuset.effective_cpus")
        yield from _counted(effective or _read(mount.directory / "cpuset.cpus"))


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """Each limit, and what is left of it."""
    if (mount := cgroups.own(root)) is not None:
        for group in _upward(mount):
            for name in ("memory.max", "memory.high"):
                yield from _left(group, name, "memory.current", "inactive_file")
    if (mount := cgroups.own(root, "memory")) is not None:
        for group in _upward(mount):
            yield from _left(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _upward(mount: cgroups.Mount) -> Iterator[Path]:
    group = mount.directory
    for _ in range(_MAX_DEPTH):
        yield group
        if group == mount.top or mount.top not in group.parents:
            return
        group = group.parent


def _whole(given: str, period: str) -> Iterator[int]:
    """Time per period. Half a core is one: something has to run. One and a half are one: two would be throttled."""
    time, per = _number(given), _number(period or "100000")
    if time and per and time // per < _MAX_CORES:
        yield max(1, time // per)


def _counted(cpus: str) -> Iterator[int]:
    """How many `0-3,8` are."""
    count = 0
    for part in cpus.split(","):
        first, dash, last = part.partition("-")
        low, high = _number(first), _number(last if dash else first)
        if low is None or high is None or not low <= high < _MAX_CORES:
            return
        count += high - low + 1
    if count:
        yield count


def _left(group: Path, limit_name: str, used_name: str, cache_name: str) -> Iterator[tuple[int, int]]:
    limit = _number(_read(group / limit_name))
    if not limit or limit >= _UNLIMITED_BYTES:
        return
    used = _number(_read(group / used_name)) or 0
    for line in _read(group / "memory.stat").splitlines():
        name, _, count = line.partition(" ")
        if name == cache_name:  # of files, not used lately: given back when it is wanted
            used -= min(used, _number(count) or 0)
    yield limit, max(0, limit - used)


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None  # noqa: PLR2004 - 64 bits


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
