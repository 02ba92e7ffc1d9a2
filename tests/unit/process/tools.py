"""What the tests of the process room share: commands that can be recognised in /proc, and waiting for a condition."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.process import base, spawner, tree

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

PATH = "/usr/local/bin:/usr/bin:/bin"

#: A shell prelude: a process in a session of its own, orphaned twice, deaf to TERM, that holds stdout open.
STRAY = "(setsid sh -c \"trap '' TERM HUP INT; (while :; do sleep 0.2; done) & while :; do sleep 0.2; done\" &) ; "


class Bench:
    """Makes commands whose every process carries a mark in its environment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mark = f"RUN_MARK={uuid.uuid4()}"
        self.output = directory / "output"

    def command(self, *argv: str, env: dict[str, str] | None = None, **fields: Any) -> base.Command:
        name, _, value = self.mark.partition("=")
        env = {"PATH": PATH, name: value} if env is None else env
        return base.Command(
            **{"argv": argv, "env": env, "cwd": self.directory, "output": self.output, **fields}
        )

    def shell(self, script: str, **fields: Any) -> base.Command:
        return self.command("sh", "-c", script, **fields)

    def python(self, script: str, *args: str, **fields: Any) -> base.Command:
        return self.command(sys.executable, "-I", "-S", "-c", script, *args, **fields)

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def alive(self) -> set[int]:
        """Every living process that has been started by one of our commands."""
        mark = self.mark.encode()
        found = set()
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (directory / "environ").read_bytes().split(b"\0"):
                    found.add(int(directory.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    async def until_text(self, text: str) -> None:
        await until(lambda: text in self.text())


async def until(condition: Callable[[], object], limit_secs: float = 30) -> float:
    """Wait until it is true; return after how many seconds it was."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > limit_secs:
            raise AssertionError("it did not become true in time")
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def at_best(what: Callable[[], Awaitable[float]], under_secs: float) -> None:
    """One time of three takes less: a machine that stands still for a while makes no time shorter."""
    took = [await what()]
    while min(took) >= under_secs and len(took) < 3:
        took.append(await what())
    assert min(took) < under_secs, took


def exists(pid: int) -> bool:
    """It runs: zombies do not count."""
    entry = tree.look(pid)
    return entry is not None and not entry.zombie


def existing(pids: Iterable[int]) -> set[int]:
    return {pid for pid in pids if exists(pid)}


def nursery_of(starter: spawner.Spawner) -> int:
    assert starter._nursery is not None
    return starter._nursery._program.pid


def name(pid: int) -> str:
    """Its command's; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def status(pid: int, field: str) -> str:
    """A field of /proc/<pid>/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return line.partition(":")[2].strip()
    raise AssertionError(field)


def private_kib(pid: int) -> int:
    """Memory that is this process's alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def descriptors(pid: int) -> int:
    """How many it has open; of our own one more, every time."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
