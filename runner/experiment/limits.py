"""What a run may use of memory and disk, and what is done when it uses more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from runner import errors, units

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner.request.model import Resources
    from runner.resources.usage import Use

log = structlog.get_logger(__name__)

#: A run may use so much more memory than it has asked for: a tenth, and at least 64 MiB. People ask for round figures.
TOLERANCE, MIN_TOLERANCE_BYTES = 0.1, 64 << 20
#: At this share of its `hdd` a run is warned.
WARN_SHARE = 0.9


def memory_ceiling(granted: Resources) -> int:
    """How much memory a run may use at the most, by whatever mechanism that is seen to; 0: no limit, as it has asked for none."""
    if not granted.ram_bytes:
        return 0
    return granted.ram_bytes + max(MIN_TOLERANCE_BYTES, int(granted.ram_bytes * TOLERANCE))


class Bounds:
    """Holds what one run uses against what it was granted. Called with each sample."""

    def __init__(
        self, granted: Resources, *, enforced: bool, stop: Callable[[errors.Reason, str], None]
    ) -> None:
        """`stop` ends the run; with `enforced` False the log is told instead, once."""
        self._granted = granted
        self._enforced = enforced
        self._stop = stop
        self._said: set[str] = set()
        self._stopped = False

    def __call__(self, use: Use) -> None:
        """Warn or stop when it uses too much."""
        ceiling = memory_ceiling(self._granted)
        memory = int(use.memory.now)
        if ceiling and memory > ceiling:
            self._over(
                errors.Reason.OOM,
                f"out of memory: its {use.processes} processes use {units.format_bytes(memory)}, "
                f"{units.format_bytes(self._granted.ram_bytes)} were granted",
            )
        granted = self._granted.hdd_bytes
        used = int(use.disk.now)
        if granted and used > granted:
            self._over(
                errors.Reason.DISK,
                f"out of disk: its directory takes {units.format_bytes(used)}, "
                f"{units.format_bytes(granted)} were granted",
            )
        elif granted and used > WARN_SHARE * granted:
            self._once("a run has nearly used up its disk", used_bytes=used, granted_bytes=granted)
        if not use.disk_complete:
            self._once("a run's directory cannot be measured whole", used_bytes=used)

    def _over(self, reason: errors.Reason, text: str) -> None:
        if self._enforced:
            if not self._stopped:
                self._stop(reason, text)
            self._stopped = True
        else:
            self._once("a run uses more than it was granted", why=text)

    def _once(self, event: str, **data: object) -> None:
        if event not in self._said:
            self._said.add(event)
            log.warning(event, **data)
