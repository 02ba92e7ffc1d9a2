"""Programs that build and fetch for a run: one of them to its end, and the last of what it printed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from runner.executors.requirements import redacted

if TYPE_CHECKING:
    from pathlib import Path

    from runner.process.base import Command, ProcessExit
    from runner.process.spawner import Spawner

#: For a build from source of something large.
INSTALL_SECS = 3600.0
TAIL_BYTES = 64 * 1024
TAIL_LINES = 12  #: of a builder's output in an error's text


async def run(spawner: Spawner, command: Command, *, timeout_secs: float) -> tuple[ProcessExit, str]:
    """How it ended, and the last of what it has added to `command.output`. Cancelling it ends it."""
    before = await asyncio.to_thread(_size, command.output)
    ended = await spawner.run(command, timeout_secs=timeout_secs, grace_secs=2.0)
    return ended, await asyncio.to_thread(_read_from, command.output, before)


def last_lines(said: str) -> str:
    """The end of it for an error's text, without the passwords of addresses."""
    lines = [line.rstrip() for line in said.splitlines() if line.strip()]
    return redacted("\n".join(lines[-TAIL_LINES:]))


def write_private(file: Path, text: str) -> None:
    """Write a file that only this user may read. Blocking; raises OSError."""
    file.unlink(missing_ok=True)
    file.touch(mode=0o600, exist_ok=False)
    file.write_text(text)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _read_from(file: Path, start: int) -> str:
    with file.open("rb") as output:
        output.seek(max(start, output.seek(0, 2) - TAIL_BYTES))
        return output.read().decode(errors="replace")
