"""Who holds a claim or a lock: a process, so that others can tell whether it still lives."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """One process of one machine. `started` tells it from a later process with the same number."""

    host: str
    boot: str  #: the kernel's boot id: two machines may carry the same host name
    namespace: str  #: the pid namespace: a number means something only inside it
    pid: int
    started: int  #: clock ticks since boot, not a wall time: it stays the same when the clock is set

    @classmethod
    def here(cls, host: str | None = None) -> Owner:
        """This process; `host` instead of the machine's name."""
        pid = os.getpid()
        return cls(
            host=host or socket.gethostname(),
            boot=_boot_id(),
            namespace=_pid_namespace(),
            pid=pid,
            started=_started(pid) or 0,
        )

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Owner | None:
        """The owner that `to_json` wrote, None when it is none (half-written, or of another program)."""
        try:
            fields = json.loads(text)
            return cls(
                host=str(fields["host"]),
                boot=str(fields["boot"]),
                namespace=str(fields["namespace"]),
                pid=int(fields["pid"]),
                started=int(fields["started"]),
            )
        except (ValueError, TypeError, KeyError):
            return None

    def is_alive(self, seen_from: Owner) -> bool | None:
        """Whether that process lives; None where it cannot be seen from here (another machine or container)."""
        if (self.host, self.boot, self.namespace) != (seen_from.host, seen_from.boot, seen_from.namespace):
            return None
        return _started(self.pid) == self.started


def _started(pid: int) -> int | None:
    """When a process started, in ticks since boot; None when there is none, or only its zombie.

    psutil has this only as a wall time, which moves when the clock is set: a living daemon would look dead.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = line.rpartition(")")[2].split()  # the command before it may hold anything
    return None if fields[0] in {"Z", "X"} else int(fields[19])


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
