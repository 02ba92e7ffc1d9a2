"""Commands in, exits out: on real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from runner import errors
from runner.process import tree
from tests.unit.process import tools

if TYPE_CHECKING:
    from runner.process.spawner import Spawner
    from tests.unit.process.tools import Bench


async def test_output_goes_to_the_file_and_the_exit_is_told(bench: Bench, starter: Spawner) -> None:
    bench.output.write_text("before\n")
    exit_ = await starter.run(bench.shell("echo out; echo err >&2; exit 7"))
    assert bench.text() == "before\nout\nerr\n"
    assert (exit_.code, exit_.signal, exit_.error, exit_.stopped, exit_.strays) == (7, None, None, False, 0)
    assert not exit_.ok


async def test_a_new_output_file_is_private(bench: Bench, starter: Spawner) -> None:
    await starter.run(bench.shell("true"))
    assert stat.S_IMODE(bench.output.stat().st_mode) == 0o600


async def test_what_it_used_is_told(bench: Bench, starter: Spawner) -> None:
    script = "x = bytearray(80 << 20)\nimport time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    exit_ = await starter.run(bench.python(script))
    assert exit_.ok
    assert exit_.user_secs + exit_.system_secs >= 0.3
    assert exit_.elapsed_secs >= 0.3
    assert exit_.max_rss_bytes >= 80 << 20


async def test_death_by_a_signal_is_told(bench: Bench, starter: Spawner) -> None:
    exit_ = await starter.run(bench.shell("kill -SEGV $$"))
    assert (exit_.code, exit_.signal, exit_.stopped) == (None, 11, False)


async def test_the_environment_is_exactly_the_given_one(
    bench: Bench, starter: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_DAEMON", "x")
    env = {"A": "1", "EMPTY": "", "LINES": "a\nb", "UNICODE": "é", "BYTES": os.fsdecode(b"\xff\xfe")}
    assert (await starter.run(bench.command("/usr/bin/env", "-0", env=env))).ok
    given = {f"{name}={value}".encode("utf-8", "surrogateescape") for name, value in env.items()}
    assert set(bench.output.read_bytes().split(b"\0")) - {b""} == given


async def test_it_starts_as_a_program_expects(bench: Bench, starter: Spawner) -> None:
    script = """
import json, os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "ignored": int(status["SigIgn"], 16) & 0x7FFFFFFF, "blocked": int(status["SigBlk"], 16), "cwd": os.getcwd(),
    "fds": sorted(os.listdir("/proc/self/fd"))[:-1], "stdin": os.readlink("/proc/self/fd/0"),
    "session": os.getsid(0) == os.getpid() == os.getpgrp(),
}))
"""
    await starter.run(bench.python(script))
    told = json.loads(bench.text())
    # Up to signal 31: the C library keeps the first real-time ones for itself, and does not let anybody reset them.
    python_ignores = (1 << 12) | (1 << 24)  # SIGPIPE and SIGXFSZ, by the interpreter that tells
    assert told == {
        "ignored": python_ignores,
        "blocked": 0,
        "cwd": str(bench.directory),
        "fds": ["0", "1", "2"],
        "stdin": "/dev/null",
        "session": True,
    }


async def test_a_program_without_a_slash_is_found_on_the_path_of_its_environment(
    bench: Bench, starter: Spawner
) -> None:
    for name in ("first", "second"):
        program = bench.directory / name / "prog"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\necho {name} $1\n")
        program.chmod(0o755)
    (bench.directory / "first" / "prog").chmod(0o644)
    env = {"PATH": f"{bench.directory}/none:{bench.directory}/first:{bench.directory}/second"}
    assert (await starter.run(bench.command("prog", "arg", env=env))).ok
    assert bench.text() == "second arg\n"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"argv": ("no-such-program",)}, "No such file or directory: 'no-such-program'"),
        ({"argv": ("/no/such/program",)}, "No such file or directory: '/no/such/program'"),
        ({"argv": ("/etc/passwd",)}, "Permission denied: '/etc/passwd'"),
        ({"cwd": Path("/no/such/directory")}, "No such file or directory: '/no/such/directory'"),
        ({"cwd": Path("/etc/passwd")}, "Not a directory: '/etc/passwd'"),
        ({"argv": ("/bin/echo", "x" * 200_000)}, "Argument list too long: '/bin/echo'"),
        ({"argv": ("/bin/echo", "\0")}, "embedded null byte: '/bin/echo'"),
    ],
)
async def test_what_cannot_be_started_is_an_exit_with_the_reason(
    bench: Bench, starter: Spawner, fields: dict[str, Any], error: str
) -> None:
    process = await starter.start(
        bench.command("true", **fields) if "argv" not in fields else bench.command(**fields)
    )
    exit_ = await process.wait()
    assert (exit_.code, exit_.signal, exit_.error) == (None, None, error)


async def test_an_output_that_cannot_be_opened_raises(bench: Bench, starter: Spawner) -> None:
    with pytest.raises(FileNotFoundError):
        await starter.run(bench.command("true", output=bench.directory / "none" / "output"))


@pytest.mark.parametrize("link", ["output", ""])
async def test_output_goes_through_no_link(bench: Bench, starter: Spawner, link: str) -> None:
    """What prepared a run may have left one there: the daemon may write where it may not."""
    elsewhere, place = bench.directory / "elsewhere", bench.directory / "place"
    elsewhere.mkdir()
    (elsewhere / "output").touch()
    if link:
        place.mkdir()
    (place / link).symlink_to(elsewhere / link)
    with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
        await starter.run(bench.command("echo", "printed", output=place / "output"))
    assert not (elsewhere / "output").read_text()


async def test_a_pipe_in_the_place_of_the_output_holds_up_nobody(bench: Bench, starter: Spawner) -> None:
    os.mkfifo(bench.output)
    reading = threading.Timer(20, bench.output.read_bytes)  # without what it is for this test ends as well
    reading.start()
    with pytest.raises(OSError, match="No such device or address"):
        await starter.run(bench.command("echo", "printed"))
    reading.cancel()
    bench.output.unlink()
    await starter.run(bench.python("import os; print(os.get_blocking(1))"))
    assert bench.text() == "True\n"


async def test_a_large_environment_arrives(bench: Bench, starter: Spawner) -> None:
    env = {f"NAME_{number}": "x" * 10_000 for number in range(120)}
    assert (await starter.run(bench.command("/usr/bin/env", env=env))).ok
    assert len(bench.text().splitlines()) == 120


async def test_term_then_kill_for_one_that_ignores_term(bench: Bench, starter: Spawner) -> None:
    process = await starter.start(bench.shell("trap '' TERM; echo ready; while :; do sleep 0.1; done"))
    await bench.until_text("ready")
    began = time.monotonic()
    exit_ = await process.stop(0.5)
    assert time.monotonic() - began >= 0.5
    assert (exit_.code, exit_.signal, exit_.stopped) == (None, 9, True)
    assert not bench.alive()


async def test_one_that_handles_term_has_its_grace(bench: Bench, starter: Spawner) -> None:
    process = await starter.start(
        bench.shell("trap 'sleep 0.5; echo saved; exit 0' TERM; echo ready; while :; do sleep 0.1; done")
    )
    await bench.until_text("ready")
    exit_ = await process.stop(60)
    assert (exit_.code, exit_.signal, exit_.stopped) == (0, None, True)
    assert "saved" in bench.text()


async def test_term_reaches_every_process_once(bench: Bench, starter: Spawner) -> None:
    (bench.directory / "child").write_text(
        "trap 'echo term' TERM; echo ready; while [ ! -e enough ]; do sleep 0.05; done"
    )
    process = await starter.start(bench.shell("(setsid sh child &); sh child & . ./child; wait"))
    await tools.until(lambda: bench.text().count("ready") == 3)
    stopping = asyncio.create_task(process.stop(60))
    await tools.until(lambda: bench.text().count("term") >= 3)
    await asyncio.sleep(0.5)  # for more of them, if there were any
    (bench.directory / "enough").touch()
    await stopping
    assert bench.text().count("term") == 3


async def test_a_stopped_workload_hears_term(bench: Bench, starter: Spawner) -> None:
    process = await starter.start(
        bench.shell("trap 'exit 5' TERM; echo ready; kill -STOP $$; sleep 60 & wait")
    )
    await bench.until_text("ready")
    assert process.pid is not None
    await tools.until(lambda: tools.status(process.pid or 0, "State").startswith("T"))
    assert (await process.stop(60)).code == 5


async def test_a_later_stop_shortens_the_grace_and_never_lengthens_it(bench: Bench, starter: Spawner) -> None:
    process = await starter.start(bench.shell("trap '' TERM; echo ready; while :; do sleep 0.1; done"))
    await bench.until_text("ready")
    long = asyncio.create_task(process.stop(3600))
    await asyncio.sleep(0)
    short = asyncio.create_task(process.stop(0.1))
    await asyncio.sleep(0)
    exits = await asyncio.gather(process.stop(3600), long, short, process.wait())
    assert len(set(exits)) == 1
    assert exits[0].signal == 9
    assert await process.stop(1) == exits[0]


async def test_cancelling_a_wait_stops_nothing(bench: Bench, starter: Spawner) -> None:
    process = await starter.start(bench.shell("while [ ! -e go ]; do sleep 0.05; done; exit 4"))
    waits = [asyncio.create_task(process.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waits[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits[0]
    (bench.directory / "go").touch()
    assert [exit_.code for exit_ in await asyncio.gather(*waits[1:])] == [4, 4]


async def test_the_end_of_its_time_stops_it(bench: Bench, starter: Spawner) -> None:
    exit_ = await starter.run(bench.shell(tools.STRAY + "sleep 600"), timeout_secs=0.5, grace_secs=30)
    assert (exit_.signal, exit_.stopped) == (15, True)
    assert not bench.alive()


async def test_cancelling_a_run_stops_it_first(bench: Bench, starter: Spawner) -> None:
    run = asyncio.create_task(
        starter.run(bench.shell("trap 'echo bye; exit 0' TERM; echo ready; sleep 600 & wait"), grace_secs=30)
    )
    await bench.until_text("ready")
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert not bench.alive()
    assert "bye" in bench.text()


async def test_cancelling_a_run_again_kills_it(bench: Bench, starter: Spawner) -> None:
    script = "trap 'echo no' TERM; echo ready; while :; do sleep 0.1; done"
    run = asyncio.create_task(starter.run(bench.shell(script), grace_secs=3600))
    await bench.until_text("ready")
    run.cancel()
    await bench.until_text("no")
    assert not run.done()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert not bench.alive()


async def test_cancelling_a_start_at_any_moment_leaves_nothing(bench: Bench, starter: Spawner) -> None:
    for turns in range(25):
        run = asyncio.create_task(starter.run(bench.shell("sleep 600"), grace_secs=1))
        for _ in range(turns):
            await asyncio.sleep(0.0005)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        await tools.until(lambda: not bench.alive())


async def test_strays_that_hold_the_output_open_do_not_delay_the_end(bench: Bench, starter: Spawner) -> None:
    exit_ = await starter.run(bench.shell("sleep 600 & (setsid sleep 600 &) ; echo done; exit 3"))
    assert (exit_.code, exit_.strays, exit_.stopped) == (3, 2, False)
    assert not bench.alive()
    assert exit_.elapsed_secs < 100


async def test_strays_deaf_to_term_are_killed(bench: Bench, starter: Spawner) -> None:
    process = await starter.start(
        bench.shell(tools.STRAY * 3 + "while [ ! -e go ]; do sleep 0.05; done; exit 0")
    )
    await tools.until(lambda: [tools.name(pid) for pid in bench.alive()].count("sh") == 7)  # two each
    (bench.directory / "go").touch()
    exit_ = await process.wait()
    assert exit_.code == 0
    assert exit_.strays >= 6
    assert not bench.alive()


async def test_helpers_that_follow_their_parent_are_not_strays(bench: Bench, starter: Spawner) -> None:
    # Ends when its parent does, as a pool's workers or multiprocessing's resource tracker do. It has a twentieth of a
    # second for it, which a busy machine may not give it.
    script = "rm -f pipe; mkfifo pipe; (cat < pipe; echo end >&2) & exec 3> pipe; exit 0"
    exits = [await starter.run(bench.shell(script))]
    while exits[-1].strays and len(exits) < 10:
        exits.append(await starter.run(bench.shell(script)))
    assert {exit_.code for exit_ in exits} == {0}
    assert exits[-1].strays == 0
    assert "end" in bench.text()


async def test_orphans_that_end_during_a_run_are_reaped(bench: Bench, starter: Spawner) -> None:
    script = "for i in 1 2 3 4 5 6; do (sh -c 'sleep 0.05' &); done; echo ready; while [ ! -e go ]; do sleep 0.05; done"
    process = await starter.start(bench.shell(script))
    await bench.until_text("ready")
    supervisor = process.supervisor_pid or 0
    await tools.until(
        lambda: {entry.parent for entry in tree.descendants(supervisor)} <= {supervisor, process.pid}
    )
    await tools.until(
        lambda: (
            [entry.pid for entry in tree.descendants(supervisor) if entry.parent == supervisor]
            == [process.pid]
        )
    )
    (bench.directory / "go").touch()
    assert (await process.wait()).strays == 0


HOPPER = """
import os, sys, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        break
if sys.argv[2] == "setsid":
    while True:  # a new process, in a new session, all the time
        if os.fork():
            os._exit(0)
        os.setsid()
while True:
    if os.fork():
        os._exit(0)
"""


@pytest.mark.parametrize("kind", ["group", "setsid"])
async def test_a_storm_of_forks_is_ended(bench: Bench, starter: Spawner, kind: str) -> None:
    process = await starter.start(bench.python(HOPPER, "4", kind))
    exit_ = await asyncio.wait_for(process.stop(0.2), 60)
    assert exit_.stopped
    assert not bench.alive()


async def test_many_at_once(bench: Bench, starter: Spawner) -> None:
    commands = [bench.shell(f"echo {n}; exit {n}", output=bench.directory / f"output-{n}") for n in range(20)]
    exits = await asyncio.gather(*map(starter.run, commands))
    assert [exit_.code for exit_ in exits] == list(range(20))
    assert [command.output.read_text() for command in commands] == [f"{n}\n" for n in range(20)]


async def test_two_hundred_in_a_row_leave_nothing(bench: Bench, starter: Spawner) -> None:
    nursery = tools.nursery_of(starter)

    def held() -> tuple[int, int, int]:
        """Our descriptors, the nursery's, and what is below it (living or not): the next supervisor and its guard."""
        return tools.descriptors(os.getpid()), tools.descriptors(nursery), len(tree.descendants(nursery))

    await tools.until(lambda: held()[2] == 2)  # the guard may not have forked yet
    before, memory_kib = held(), tools.private_kib(nursery)
    for number in range(200):
        assert (await starter.run(bench.command("true"))).ok, number
    # Until the next supervisor is there, no memory is shared with one.
    await tools.until(lambda: held() == before and tools.private_kib(nursery) - memory_kib < 4096)


async def test_no_threads_and_no_secrets_in_the_nursery(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.process.spawner import Spawner

    monkeypatch.setenv("SECRET_OF_THE_DAEMON", "canary")
    threads = tools.status(os.getpid(), "Threads")
    starter = Spawner()
    process = await starter.start(bench.shell("sleep 600"))
    nursery = tools.nursery_of(starter)
    for pid in (nursery, process.supervisor_pid or 0):
        assert tools.status(pid, "Threads") == "1"
        assert b"canary" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert int(tools.status(os.getpid(), "Threads")) <= int(threads)  # those of other tests may end
    assert os.getsid(nursery) == nursery
    await starter.aclose()


async def test_closing_ends_what_still_runs(bench: Bench) -> None:
    from runner.process.spawner import Spawner

    starter = Spawner()
    process = await starter.start(bench.shell("sleep 600"))
    nursery = tools.nursery_of(starter)
    await starter.aclose()
    assert (await process.wait()).stopped
    assert not bench.alive()
    assert tree.look(nursery) is None
    await starter.aclose()


async def test_closing_has_a_limit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.process import spawner

    monkeypatch.setattr(spawner, "_CLOSE_GRACE_SECS", 0.1)
    monkeypatch.setattr(spawner, "_CLOSE_SECS", 0.2)
    starter = spawner.Spawner()
    process = await starter.start(bench.shell("sleep 600"))
    os.kill(
        process.supervisor_pid or 0, signal.SIGSTOP
    )  # it cannot end anything, as if the workload were unkillable
    await asyncio.wait_for(starter.aclose(), 30)
    with pytest.raises(errors.ProcessLost):
        await process.wait()
    os.kill(process.supervisor_pid or 0, signal.SIGCONT)
    await tools.until(lambda: not bench.alive())
