"""The cleanup of a command: run when nothing of the workload is left, whatever became of it and of the daemon."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.unit.process import tools
from tests.unit.process.test_survivors import HARD, daemon

if TYPE_CHECKING:
    from runner.process.base import Command
    from runner.process.spawner import Spawner
    from tests.unit.process.tools import Bench


def told(bench: Bench) -> str:
    path = bench.directory / "cleaned"
    return path.read_text() if path.exists() else ""


def cleaning(bench: Bench, script: str, *, cleanup: str = "", **fields: object) -> Command:
    """Its cleanup tells who is left of the workload, by the mark in the environment that both have."""
    place = bench.directory / "cleaned"
    cleanup = cleanup or f'echo "args $1, mark $RUN_MARK" >> {place}; echo unseen; echo unseen >&2'
    return bench.shell(script, cleanup=("sh", "-c", cleanup, "sh", "a b"), **fields)


@pytest.mark.parametrize("script", ["exit 0", "exit 3", "kill -SEGV $$", tools.STRAY + "exit 1"])
async def test_it_runs_once_however_the_workload_ends(bench: Bench, starter: Spawner, script: str) -> None:
    plain = await starter.run(bench.shell(script))
    exit_ = await starter.run(cleaning(bench, script))
    assert told(bench) == f"args a b, mark {bench.mark.partition('=')[2]}\n"
    assert (exit_.code, exit_.signal) == (plain.code, plain.signal)
    assert bool(exit_.strays) == bool(plain.strays)
    assert "unseen" not in bench.text()


async def test_it_runs_when_the_workload_is_stopped_and_after_its_last_process(
    bench: Bench, starter: Spawner
) -> None:
    deaf = "(trap '' TERM; sh -c 'echo $PPID' >> pids; echo ready; while :; do sleep 0.1; done)"
    look = f"for pid in $(cat {bench.directory}/pids); do kill -0 $pid 2>/dev/null && echo alive; done; echo looked"
    process = await starter.start(
        cleaning(bench, f"{deaf} & {deaf}", cleanup=f"({look}) > {bench.directory}/cleaned")
    )
    await tools.until(lambda: bench.text().count("ready") == 2)
    assert (await process.stop(0.2)).stopped
    assert told(bench) == "looked\n"


async def test_it_runs_when_the_workload_cannot_be_started(bench: Bench, starter: Spawner) -> None:
    command = bench.command("/no/such/program", cleanup=("sh", "-c", f"echo x > {bench.directory}/cleaned"))
    exit_ = await starter.run(command)
    assert exit_.error == "No such file or directory: '/no/such/program'"
    assert told(bench) == "x\n"


async def test_it_runs_when_the_daemon_is_killed_and_begins_within_5_seconds(bench: Bench) -> None:
    async def killed() -> float:
        for path in (bench.output, bench.directory / "cleaned"):
            path.unlink(missing_ok=True)
        async with daemon(cleaning(bench, tools.STRAY + HARD)) as (pid, _):
            await bench.until_text("ready")
            os.kill(pid, signal.SIGKILL)
            took = await tools.until(lambda: told(bench))
            await tools.until(lambda: not bench.alive())
        return took

    await tools.at_best(killed, 5)


async def test_one_that_cannot_be_started_changes_nothing(bench: Bench, starter: Spawner) -> None:
    assert (await starter.run(bench.shell("exit 4", cleanup=("/no/such/program",)))).code == 4


async def test_one_that_does_not_end_is_killed_with_what_it_started(bench: Bench, starter: Spawner) -> None:
    endless = cleaning(bench, "exit 2", cleanup=tools.STRAY + "trap '' TERM; sleep 600", cleanup_secs=0.5)
    assert (await starter.run(endless)).code == 2
    assert not bench.alive()


async def test_its_strays_end_with_it(bench: Bench, starter: Spawner) -> None:
    exit_ = await starter.run(cleaning(bench, "exit 2", cleanup=tools.STRAY + "exit 0"))
    assert (exit_.code, exit_.strays) == (2, 0)
    assert not bench.alive()
