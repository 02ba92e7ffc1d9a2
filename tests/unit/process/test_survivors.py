"""kill -9 of the daemon, a supervisor, the nursery: nothing of a run outlives it, and no other run suffers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from runner import errors
from runner.process import tree
from tests.unit.process import standin, tools

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from runner.process import base
    from runner.process.spawner import Spawner
    from tests.unit.process.tools import Bench

ROOT = Path(__file__).parents[3]


@contextlib.asynccontextmanager
async def daemon(
    *commands: base.Command, python: str = sys.executable, **popen: Any
) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """A stand-in of the daemon that runs the commands: its process id, and those that it tells."""
    fields = [
        {
            **dataclasses.asdict(dataclasses.replace(command, group=None)),
            "cwd": str(command.cwd),
            "output": str(command.output),
            "group": command.group and [command.group.path, command.group.version],
        }
        for command in commands
    ]
    program = subprocess.Popen(
        [python, standin.__file__, json.dumps(fields)],
        env={"PYTHONPATH": str(ROOT), **popen.pop("env", {})},
        stdout=subprocess.PIPE,
        **popen,
    )
    assert program.stdout is not None
    with program, program.stdout:
        try:
            yield program.pid, json.loads(await asyncio.to_thread(program.stdout.readline))
        finally:
            program.kill()


HARD = "trap '' TERM; echo ready; while :; do sleep 0.1; done"


@pytest.mark.parametrize("with_nursery", [False, True])
async def test_kill_of_the_daemon_ends_everything_within_5_seconds(bench: Bench, with_nursery: bool) -> None:
    commands = [
        bench.shell(tools.STRAY + HARD),
        bench.shell("sleep 600 & (setsid sh -c 'echo ready; exec sleep 600' &); sleep 600"),
    ]

    async def killed() -> float:
        bench.output.unlink(missing_ok=True)
        async with daemon(*commands) as (pid, ids):
            await tools.until(lambda: bench.text().count("ready") == 2)
            assert len(bench.alive()) >= 6
            if with_nursery:
                os.kill(ids["nursery"], signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            ours = {ids["nursery"], *ids["supervisors"], *ids["workloads"]}
            return await tools.until(lambda: not bench.alive() | tools.existing(ours))

    await tools.at_best(killed, 5)


async def test_a_vanished_daemon_leaves_the_workload_its_grace(bench: Bench) -> None:
    saving = bench.shell("trap 'sleep 0.3; echo saved; exit 0' TERM; echo ready; while :; do sleep 0.1; done")
    async with daemon(saving) as (pid, _):
        await bench.until_text("ready")
        os.kill(pid, signal.SIGKILL)
        await tools.until(lambda: not bench.alive())
    assert "saved" in bench.text()


async def test_kill_of_a_supervisor_loses_the_run_and_nothing_of_it_lives_on(
    bench: Bench, starter: Spawner
) -> None:
    process = await starter.start(bench.shell(tools.STRAY * 2 + HARD))
    await bench.until_text("ready")
    other = await starter.start(
        bench.shell("while [ ! -e go ]; do sleep 0.05; done; exit 6", env={"PATH": tools.PATH})
    )
    assert process.supervisor_pid is not None
    os.kill(process.supervisor_pid, signal.SIGKILL)
    for ending in (process.wait(), process.stop(60)):
        with pytest.raises(errors.ProcessLost):
            await ending
        assert not bench.alive()  # already, when it is raised
    (bench.directory / "go").touch()
    assert (await other.wait()).code == 6
    assert (await starter.run(bench.command("true"))).ok


async def test_kill_of_its_parents_parent_ends_the_run_that_does_it_and_no_other(
    bench: Bench, starter: Spawner
) -> None:
    waits = "import os, sys, time\nwhile not os.path.exists('go'): time.sleep(0.05)\nsys.exit(6)"
    other = await starter.start(bench.python(waits))  # one process, whatever moment one looks
    killer = await starter.start(
        bench.shell(tools.STRAY + "read -r _ _ _ above _ < /proc/$PPID/stat; kill -9 $above; exec sleep 600")
    )
    with pytest.raises(errors.ProcessLost):
        await killer.wait()
    assert bench.alive() == {other.pid}  # nothing of the killer
    assert tools.exists(tools.nursery_of(starter))
    assert tools.exists(other.pid or 0)
    (bench.directory / "go").touch()
    assert (await other.wait()).code == 6


async def test_the_workload_dies_with_its_supervisor_also_without_a_nursery(
    bench: Bench, starter: Spawner
) -> None:
    process = await starter.start(bench.shell(HARD))
    await bench.until_text("ready")
    for pid in (tools.nursery_of(starter), process.supervisor_pid or 0):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(errors.ProcessLost):
        await process.wait()
    await tools.until(lambda: not tools.exists(process.pid or 0))


async def test_kill_of_a_supervisor_under_a_run_that_is_cancelled(bench: Bench, starter: Spawner) -> None:
    run = asyncio.create_task(starter.run(bench.shell("echo $PPID; " + HARD), grace_secs=3600))
    await bench.until_text("ready")
    run.cancel()
    await asyncio.sleep(0)
    os.kill(int(bench.text().split()[0]), signal.SIGKILL)
    with pytest.raises(asyncio.CancelledError):
        await run
    assert not bench.alive()


async def test_a_polite_signal_to_everybody_takes_no_supervisor_away(bench: Bench, starter: Spawner) -> None:
    process = await starter.start(bench.shell("while [ ! -e go ]; do sleep 0.05; done; exit 4"))
    for pid in (process.supervisor_pid, tools.nursery_of(starter)):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid or 0, number)
    (bench.directory / "go").touch()
    assert (await process.wait()).code == 4
    assert (await starter.run(bench.command("true"))).ok


async def test_kill_of_the_nursery_harms_no_run_and_the_next_start_has_a_new_one(
    bench: Bench, starter: Spawner
) -> None:
    process = await starter.start(
        bench.shell("while [ ! -e go ]; do sleep 0.05; done; " + tools.STRAY + "exit 4")
    )
    first = tools.nursery_of(starter)
    os.kill(first, signal.SIGKILL)
    assert (await starter.run(bench.command("true"))).ok
    assert tools.nursery_of(starter) != first
    assert not tools.exists(first)
    (bench.directory / "go").touch()
    assert (await process.wait()).code == 4
    assert not bench.alive()


async def test_starts_succeed_while_nurseries_are_killed(bench: Bench, starter: Spawner) -> None:
    for number in range(30):
        start = asyncio.create_task(starter.run(bench.shell(f"exit {number}")))
        await asyncio.sleep(0.0003 * number)
        os.kill(tools.nursery_of(starter), signal.SIGKILL)
        assert (await start).code == number


async def test_kill_of_the_next_supervisor_goes_unnoticed(bench: Bench, starter: Spawner) -> None:
    async def kill(pids: set[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # One that has still to die, as its guard did, could be given the run.
        await tools.until(lambda: not tools.existing(pids))

    for _ in range(5):
        # The last run's supervisor may be among them, and end by itself.
        await kill({entry.pid for entry in tree.descendants(tools.nursery_of(starter))})
        assert (await starter.run(bench.command("true"))).ok


async def test_the_nursery_stays_for_the_orphans_of_its_dead_daemon(bench: Bench) -> None:
    # The supervisor still grants the grace; then it is killed, and only the nursery is left to end the strays.
    async def killed() -> float:
        bench.output.unlink(missing_ok=True)
        async with daemon(bench.shell(tools.STRAY + HARD)) as (pid, ids):
            await bench.until_text("ready")
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.3)  # well within the grace
            assert tools.exists(ids["nursery"]) or not bench.alive()  # this machine may have slept past it
            with contextlib.suppress(ProcessLookupError):
                os.kill(ids["supervisors"][0], signal.SIGKILL)
            return await tools.until(lambda: not bench.alive() | tools.existing([ids["nursery"]]))

    await tools.at_best(killed, 2)


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests have shown it")
async def test_it_works_for_users_who_are_not_root() -> None:
    python = shutil.which("python3", path=tools.PATH)
    nobody = pwd.getpwnam("nobody")
    modules = {
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
        )
    }
    probe = "import sys, structlog, runner.process.spawner; sys.exit(sys.version_info[:2] != (3, 11))"
    if (
        python is None
        or subprocess.run([python, "-c", probe], env=modules, user="nobody", check=False).returncode != 0
    ):
        pytest.skip("no interpreter that nobody may use")
    with tempfile.TemporaryDirectory() as directory:  # pytest's are for its own user only
        os.chown(directory, nobody.pw_uid, nobody.pw_gid)
        theirs = tools.Bench(Path(directory))

        async def killed() -> float:
            theirs.output.unlink(missing_ok=True)
            command = theirs.shell(tools.STRAY + HARD)
            async with daemon(command, python=python or "", env=modules, user="nobody") as (pid, ids):
                await theirs.until_text("ready")
                assert tools.status(ids["workloads"][0], "Uid").split()[0] == str(nobody.pw_uid)
                os.kill(pid, signal.SIGKILL)
                ours = {ids["nursery"], *ids["supervisors"]}
                return await tools.until(lambda: not theirs.alive() | tools.existing(ours))

        await tools.at_best(killed, 5)
