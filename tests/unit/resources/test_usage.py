"""What runs use, sampled: real processes below real supervisors, and trees of files where figures are to be exact."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import TYPE_CHECKING

import pytest

from runner.process import base
from runner.process.spawner import Spawner
from runner.resources import usage
from runner.resources.usage import Cards, Sampler, Use

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

MIB = 1 << 20
KIB = 1 << 10


def process(
    proc: Path,
    pid: int,
    parent: int,
    *,
    ticks: int = 0,
    ended: int = 0,
    started: int = 0,
    name: str = "x",
    **kib: int,
) -> None:
    """A process in a tree of files."""
    place = proc / str(pid)
    place.mkdir(parents=True)
    fields = [str(parent), *["0"] * 9, str(ticks), "0", str(ended), "0", "20", "0", "1", "0", str(started)]
    fields += ["0"] * 25
    (place / "stat").write_bytes(f"{pid} ({name}) S {' '.join(fields)}\n".encode())
    lines = [f"{key}:\t{value} kB\n" for key, value in kib.items()]
    (place / "status").write_text(
        "Name:\tx\n" + "".join(line for line in lines if not line.startswith(("Pss", "Swap")))
    )
    if any(key.startswith("Pss") for key in kib):
        (place / "smaps_rollup").write_text(
            "0-1 ---p [rollup]\n" + "".join(line for line in lines if "Pss" in line)
        )


def test_everything_below_a_supervisor_counts_and_nothing_else(tmp_path):
    ticks = usage._TICKS
    process(tmp_path, 10, 1, ticks=1000 * ticks, ended=3 * ticks, RssAnon=999_999)
    process(tmp_path, 11, 10, ticks=5 * ticks, name="a) S 1 (b", RssAnon=100, RssShmem=50, VmSwap=7)
    process(tmp_path, 12, 11, ticks=ticks, ended=2 * ticks, RssAnon=10, RssShmem=50)
    process(tmp_path, 13, 12, RssAnon=1)
    process(tmp_path, 20, 1, ticks=77 * ticks, RssAnon=5)
    (tmp_path / "meminfo").write_text("")
    (run, none) = usage.look([(10, 0), (4711, 0)], str(tmp_path))
    assert run == usage.Sample(
        11, (100 + 7 + 10 + 1 + 50) * KIB, (11, 12, 13), (100 + 7 + 10 + 1 + 50 + 50) * KIB
    )
    assert none.pids == ()


def test_elsewhere_the_first_process_counts_too_and_not_another_that_has_got_its_number(tmp_path):
    ticks = usage._TICKS
    process(tmp_path, 10, 1, started=77, ticks=ticks, ended=2 * ticks, RssAnon=1)
    process(tmp_path, 11, 10, started=78, ticks=4 * ticks, RssAnon=10)
    run, later, gone = usage.look(
        [(usage.First(10, 77), 0), (usage.First(10, 76), 0), (usage.First(9, 77), 0)], str(tmp_path)
    )
    assert run == usage.Sample(7, 11 * KIB, (10, 11), 11 * KIB)
    assert later == gone == usage.Sample(0, 0, (), 0)


def test_above_its_limit_pages_that_forks_share_count_once(tmp_path):
    process(tmp_path, 10, 1)
    for pid in (11, 12, 13, 14):
        process(
            tmp_path, pid, 10, RssAnon=1000, RssShmem=400, Pss=900, Pss_Anon=250, Pss_Shmem=100, SwapPss=1
        )
    below, above = 4 * 1000 + 4 * 400, 4 * 1000 + 4 * 400 - 1
    assert usage.look([(10, below * KIB)], str(tmp_path))[0].memory_bytes == (4 * 1000 + 400) * KIB
    assert usage.look([(10, above * KIB)], str(tmp_path))[0].memory_bytes == 4 * 351 * KIB


def test_a_process_that_lets_nobody_look_into_it_hides_no_memory(tmp_path):
    process(tmp_path, 10, 1)
    process(tmp_path, 11, 10, RssAnon=100, Pss_Anon=50)
    process(tmp_path, 12, 10, RssAnon=1000, VmSwap=1)
    assert usage.look([(10, KIB)], str(tmp_path))[0].memory_bytes == 1051 * KIB


def test_a_kernel_that_does_not_tell_what_is_shared(tmp_path):
    process(tmp_path, 10, 1)
    process(tmp_path, 11, 10, RssAnon=1000)
    process(tmp_path, 12, 10, RssAnon=1000)
    assert usage.look([(10, KIB)], str(tmp_path))[0].memory_bytes == 2000 * KIB
    (tmp_path / "11" / "stat").write_bytes(b"11 (half")
    assert usage.look([(10, 0)], str(tmp_path))[0].pids == (12,)


def test_peak_and_mean_are_told_and_of_a_short_run_what_its_end_says():
    use = Use()
    ended = base.ProcessExit(code=0, elapsed_secs=2, user_secs=2, system_secs=1, max_rss_bytes=77)
    assert use.told() == {"samples": 0}
    assert use.told(ended) == {
        "samples": 0,
        "cpu_cores": {"peak": 1.5, "mean": 1.5},
        "memory_bytes": {"peak": 77, "mean": 77},
    }
    for value in (1, 4, 1):
        use.cores.add(value)
        use.memory.add(value)
        use.card_utilization.add(value / 10)
    told = use.told(ended)
    assert told["cpu_cores"] == {"peak": 4, "mean": 1.5}
    assert told["memory_bytes"] == {"peak": 4, "mean": 2}
    assert told["gpu_utilization"] == {"peak": 0.4, "mean": 0.2}
    assert use.told(base.ProcessExit(code=None))["samples"] == 3


@pytest.fixture
async def spawner() -> AsyncIterator[Spawner]:
    spawner = Spawner()
    await spawner.open()
    yield spawner
    await spawner.aclose()


@contextlib.asynccontextmanager
async def sampling(sampler: Sampler) -> AsyncIterator[None]:
    task = asyncio.create_task(sampler.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()


async def test_a_run_is_sampled_while_it_runs(tmp_path: Path, spawner: Spawner) -> None:
    script = """
import os, time
held = bytearray(b"x") * (60 << 20)
if os.fork() == 0:
    os.setsid()
    held[:] = b"y" * len(held)
open("file", "wb").write(bytes(3 << 20))
while True:
    pass
"""
    directory = tmp_path / "run"
    directory.mkdir()
    command = base.Command(
        argv=(sys.executable, "-I", "-S", "-c", script), env={}, cwd=directory, output=tmp_path / "output"
    )
    costs: list[float] = []
    asked: list[tuple[str, ...]] = []
    hold: set[int] = set()
    enough = asyncio.Event()

    def told(use: Use) -> None:
        if (
            use.cores.peak > 0.1
            and use.memory.peak > 120 * MIB
            and use.disk.peak > 3 * MIB
            and use.card_memory.count
            and len(hold) == 2
        ):
            enough.set()

    async def cards(uuids: Sequence[str], pids: Sequence[int]) -> Cards:
        asked.append(tuple(uuids))
        hold.update(pids)
        return Cards(memory_bytes=5, utilization=0.5)

    sampler = Sampler(every_secs=0.05, cards=cards, cost=costs.append)
    process = await spawner.start(command)
    assert process.supervisor_pid is not None
    async with sampling(sampler), asyncio.timeout(60):
        with sampler.watch(process.supervisor_pid, directory, cards=("GPU-1",), told=told) as use:
            await enough.wait()
            assert sampler.now[1] > 120 * MIB
        assert sampler.now == (0, 0, 0)
    await process.stop(0)
    assert use.memory.peak < 250 * MIB
    assert use.processes == 2
    assert use.disk.peak < 4 * MIB
    assert asked[0] == ("GPU-1",)
    assert sum(costs) > 0


async def test_of_a_run_elsewhere_only_its_directory_and_cards_are_measured(tmp_path: Path) -> None:
    """Of a container the supervisor knows only a client, whose figures would be taken for the run's."""
    (tmp_path / "file").write_bytes(bytes(MIB))

    async def cards(uuids: Sequence[str], pids: Sequence[int]) -> Cards:
        del uuids, pids
        return Cards(memory_bytes=0, utilization=0.5)

    enough = asyncio.Event()
    sampler = Sampler(every_secs=0.01, cards=cards)
    async with sampling(sampler), asyncio.timeout(60):
        with sampler.watch(None, tmp_path, cards=("GPU-1",), told=lambda _: enough.set()) as use:
            await enough.wait()
            while not use.card_utilization.count:
                await asyncio.sleep(0.01)
    ended = base.ProcessExit(code=0, elapsed_secs=2, user_secs=0, system_secs=0, max_rss_bytes=0)
    assert use.told(ended).keys() == {"samples", "disk_bytes", "gpu_utilization"}


async def test_a_run_elsewhere_is_sampled_once_it_is_found(tmp_path: Path) -> None:
    script = "held = b'x' * (60 << 20)\nwhile True: pass"
    process = await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", "-c", script)
    asked = 0
    hold: set[int] = set()
    enough = asyncio.Event()

    async def search() -> usage.First | None:
        nonlocal asked
        asked += 1
        return None if asked < 3 else usage.first(process.pid)

    async def cards(uuids: Sequence[str], pids: Sequence[int]) -> Cards:
        del uuids
        hold.update(pids)
        return Cards(memory_bytes=5, utilization=0.5)

    def told(use: Use) -> None:
        if use.memory.peak > 60 * MIB and use.cores.peak > 0.1 and use.card_memory.count:
            enough.set()

    sampler = Sampler(every_secs=0.02, cards=cards)
    try:
        async with sampling(sampler), asyncio.timeout(60):
            with sampler.watch(None, tmp_path, cards=("GPU-1",), search=search, told=told) as use:
                await enough.wait()
    finally:
        process.kill()
        await process.wait()
    assert asked == 3
    assert (use.processes, hold) == (1, {process.pid})


async def test_a_run_that_is_nowhere_is_searched_for_a_few_times_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "SEARCHES", 2)
    asked: list[str] = []

    async def search(who: str) -> None:
        asked.append(who)

    sampler = Sampler(every_secs=0.01)
    async with sampling(sampler), asyncio.timeout(60):
        with sampler.watch(None, tmp_path, search=lambda: search("first"), told=lambda _: None):
            while len(asked) < 2:
                await asyncio.sleep(0.01)
            # In the turn in which this one is asked for the second time, the other's third would be due.
            with sampler.watch(None, tmp_path, search=lambda: search("second"), told=lambda _: None):
                while asked.count("second") < 2:
                    await asyncio.sleep(0.01)
    assert asked.count("first") == 2


async def test_a_look_that_fails_does_not_end_the_sampling(
    tmp_path: Path, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = usage.look
    failures = [OSError(24, "Too many open files")] * 2

    def fail_first(runs: Sequence[tuple[int, int]]) -> list[usage.Sample]:
        if failures:
            raise failures.pop()
        return look(runs)

    monkeypatch.setattr(usage, "look", fail_first)
    command = base.Command(argv=("sleep", "600"), env={}, cwd=tmp_path, output=tmp_path / "output")
    process = await spawner.start(command)
    async with sampling(sampler := Sampler(every_secs=0.01)), asyncio.timeout(60):
        with sampler.watch(process.supervisor_pid, tmp_path, told=lambda _: None) as use:
            while not use.memory.count:
                await asyncio.sleep(0.01)
    await process.stop(0)
    assert not failures


async def test_a_busy_loop_does_not_make_a_core_look_like_several(tmp_path: Path, monkeypatch) -> None:
    """What a look saw counts from when it looked, not from when the loop has come to hear of it."""
    loop, looks = asyncio.get_running_loop(), 0

    def look(_: object) -> list[usage.Sample]:
        nonlocal looks
        if (looks := looks + 1) == 1:
            loop.call_soon_threadsafe(time.sleep, 3.0)
        return [usage.Sample(time.monotonic() - began, MIB, (1,), MIB)]  # one core, always

    monkeypatch.setattr(usage, "look", look)
    sampler = Sampler(every_secs=0.6)
    seen = asyncio.Event()
    began = time.monotonic()
    with sampler.watch(1, tmp_path, told=lambda use: seen.set() if use.cores.count >= 3 else None) as use:
        task = asyncio.create_task(sampler.run())
        await asyncio.wait_for(seen.wait(), 60)
        task.cancel()
    assert use.cores.peak < 2


async def test_a_run_that_forks_with_much_memory_is_not_taken_for_one_that_uses_it(
    tmp_path: Path, spawner: Spawner
) -> None:
    script = """
import os, time
held = bytearray(b"x") * (100 << 20)
for _ in range(4):
    if os.fork() == 0:
        time.sleep(600)
time.sleep(600)
"""
    command = base.Command(
        argv=(sys.executable, "-I", "-S", "-c", script), env={}, cwd=tmp_path, output=tmp_path / "output"
    )
    process = await spawner.start(command)
    assert process.supervisor_pid is not None
    async with asyncio.timeout(60):
        while len((sample := usage.look([(process.supervisor_pid, 300 * MIB)])[0]).pids) < 5:
            await asyncio.sleep(0.02)
    naive = usage.look([(process.supervisor_pid, 0)])[0].memory_bytes
    await process.stop(0)
    assert naive > 500 * MIB
    assert 100 * MIB < sample.memory_bytes < 200 * MIB


def test_a_run_whose_pages_are_costly_to_tell_apart_is_looked_at_as_often_as_others_all_the_same(tmp_path):
    watched = usage._Watched(
        supervisor=1,
        directory=tmp_path,
        ram_bytes=1000,
        hdd_bytes=0,
        cards=(),
        told=print,
        context=None,  # type: ignore[arg-type]
    )

    def seen(counted: int, now: float, exact: int = 0, secs: float = 0.0, pids: int = 2) -> int:
        sample = usage.Sample(0.0, exact or counted, tuple(range(pids)), counted, secs)
        return usage._memory(watched, sample, now)

    assert usage._is_exact(watched, 100.0)
    assert seen(5000, 100.0, exact=900, secs=2.0) == 900
    assert not usage._is_exact(watched, 140.0)
    assert seen(5050, 140.0) == 950
    assert not usage._is_exact(watched, 141.0)
    assert seen(5200, 142.0) == 1000  # more than it may use, perhaps: nobody is ended for that
    assert usage._is_exact(watched, 142.0)
    assert seen(5200, 142.0, exact=1100, secs=2.0) == 1100
    assert seen(900, 150.0) == 900
    assert seen(1200, 150.0, pids=1) == 1200  # nothing is shared
    assert not usage._is_exact(watched, 150.0)
    assert usage._is_exact(watched, 142.0 + 2.0 * usage.SHARE)


async def test_a_directory_near_its_limit_is_measured_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = usage._Watched(
        supervisor=1,
        directory=tmp_path,
        ram_bytes=0,
        hdd_bytes=100 * MIB,
        cards=(),
        told=print,
        context=None,  # type: ignore[arg-type]
    )
    monkeypatch.setattr(usage, "DISK_SECS", 3600.0)
    watched.disk_at = time.monotonic()
    watched.disk_free = 500 * MIB
    watched.use.disk.add(50 * MIB)
    for free, due in ((500 * MIB, False), (480 * MIB, False), (469 * MIB, True), (600 * MIB, False)):
        monkeypatch.setattr(usage, "_free", lambda _, free=free: free)
        assert usage._is_due(watched) == due
    watched.disk_cost_secs = 1000.0  # a large one, only now and then
    monkeypatch.setattr(usage, "_free", lambda _: 0)
    assert not usage._is_due(watched)
