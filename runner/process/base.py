"""What the process room gives: a command in, an exit out, and nothing left behind."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from runner.process.cgroup import Group


@dataclasses.dataclass(frozen=True, kw_only=True)
class User:
    """Whom a workload runs as, when that is not the daemon's own user."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()  #: supplementary ones
    home: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One program to run. An argument list, never a shell string."""

    argv: tuple[str, ...]  #: argv[0] is looked up on the PATH of `env` when it has no slash
    env: Mapping[str, str]  #: the complete environment: nothing is inherited
    cwd: Path
    #: stdout and stderr are appended here; made (0600) when missing; never through a link. stdin is /dev/null
    output: Path
    grace_secs: float = (
        10.0  #: between TERM and KILL when the daemon vanishes, bounded to 3 by the supervisor
    )
    #: Run by the supervisor, in the workload's environment, when nothing of the workload is left, however it ended and also
    #: when the daemon is gone; ended itself after some seconds. Empty: nothing.
    cleanup: tuple[str, ...] = ()
    cleanup_secs: float = 20.0
    user: User | None = None  #: None: the daemon's own. `cleanup` runs as the daemon's in any case
    #: The run's control group: entered before the program starts, killed with it, and removed when nothing is left.
    group: Group | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessExit:
    """How a command ended."""

    code: int | None  #: exit code, None when it died of a signal or never started
    signal: int | None = None  #: the signal it died of
    error: str | None = None  #: why it never started ("No such file or directory: 'x'")
    stopped: bool = False  #: the runner asked for its end
    strays: int = 0  #: processes it had left behind, and that were ended with it
    elapsed_secs: float = 0.0
    user_secs: float = 0.0
    system_secs: float = 0.0
    max_rss_bytes: int = 0  #: of the largest single process
    oom: str = ""  #: it ran out of memory: the figures, for a person

    @property
    def ok(self) -> bool:
        """It ended by itself with exit code 0."""
        return self.code == 0

    def __str__(self) -> str:
        if self.error is not None:
            return f"could not be started: {self.error}"
        if self.signal is not None:
            return f"killed by signal {self.signal}"
        return f"exit code {self.code}"
