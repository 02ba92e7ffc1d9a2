"""Limits of whole runs: memory by both mechanisms, disk, and what a full volume does to the daemon."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from runner.daemon import diskroom
from runner.experiment import lifecycle
from runner.process import cgroups
from tests.integration.harness import LIMIT_SECS, Daemon, daemon
from tests.servers import cgroup_tree

if TYPE_CHECKING:
    from runner.process.cgroup import Group

HOG = """
import time
print("begun", flush=True)
held = bytearray(b"x") * (300 << 20)
time.sleep(600)
"""
WRITER = """
import time
with open("large", "wb") as file:
    file.write(bytes(30 << 20))
time.sleep(600)
"""
ENDS = """
import os
held = bytearray(b"x") * (200 << 20)
while not os.path.exists("go"):
    pass
"""


def asking(**amounts: str) -> dict[str, Any]:
    return {"resources_needed": {"cpus": 1, "gpus": 0, **amounts}}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no control groups can be made."""

    def find() -> None:
        raise cgroups.Unavailable("none in this test")

    monkeypatch.setattr(cgroups.Groups, "find", find)


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> cgroups.Groups:
    """With real groups that limit memory."""
    place = cgroup_tree.real("memory")
    if place is None:
        pytest.skip("NOT PROVEN HERE: no real memory controller that can be written")
    groups = cgroups.Groups(place, 1)
    monkeypatch.setattr(cgroups.Groups, "find", lambda: groups)
    return groups


async def told(running: Daemon, path: str) -> Any:
    """What the daemon, which is in this loop, answers."""
    place = running.config.paths.working_dir / "studio-runner.json"
    await running.until(place.exists)
    address = "http://" + json.loads(place.read_text())["address"]

    def ask() -> bytes:
        try:
            with urllib.request.urlopen(f"{address}{path}", timeout=LIMIT_SECS) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as refused:  # 503 has a body as well
            return refused.read()

    return json.loads(await asyncio.to_thread(ask))


async def metrics(running: Daemon) -> str:
    return running.service._metrics.render().decode()


@pytest.mark.usefixtures("measured")
async def test_a_run_over_its_memory_is_ended_by_measuring_it(tmp_path: Path) -> None:
    async with daemon(tmp_path) as running:
        await running.submit(HOG, **asking(ram="100mb"))
        await running.settled()
        (document,) = running.documents()
        assert (document["studioml"]["status"], document["studioml"]["reason"]) == ("failed", "oom")
        # It may be seen while it still grows: over 100 MB and 64 MiB.
        said = r"begun\nstudio-runner: out of memory: its 1 processes use (\d{3}(?:\.\d)?) MB, 100 MB were granted\n$"
        told = re.search(said, running.output())
        assert told
        assert 167 <= float(told[1]) < 400
        assert document["runner"]["used"]["memory_bytes"]["peak"] > (100 * 1000 * 1000) + (64 << 20)
        assert 'reason="oom",status="failed"} 1.0' in await metrics(running)
    assert not running.dead()


async def test_a_run_over_its_memory_is_ended_by_its_control_group(
    tmp_path: Path, grouped: cgroups.Groups
) -> None:
    async with daemon(tmp_path) as running:
        await running.submit(HOG, **asking(ram="100mb"))
        await running.settled()
        (document,) = running.documents()
        assert (document["studioml"]["status"], document["studioml"]["reason"]) == ("failed", "oom")
        # 100 MB and 64 MiB are 159 MiB.
        assert (
            "studio-runner: out of memory: the kernel ended 1 of its processes: it may use 159 MiB"
            in running.output()
        )
        assert not list(grouped.base.glob(f"{cgroups._PREFIX}{os.getpid()}.*"))  # others test as well
        # The daemon is none the worse for it.
        await running.submit("print('fine')", key="next")
        await running.settled()
        assert running.documents()[-1]["studioml"]["status"] == "completed"


async def test_a_run_that_is_stopped_while_its_group_is_made_leaves_none(
    tmp_path: Path, grouped: cgroups.Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    making, go, stopped = asyncio.Event(), threading.Event(), asyncio.Event()
    loop, made = asyncio.get_running_loop(), list[str]()
    make, stop = grouped.make, lifecycle.Experiment.stop

    def slowly(name: str, **limits: int) -> Group:
        loop.call_soon_threadsafe(making.set)
        go.wait(LIMIT_SECS)
        group = make(name, **limits)
        made.append(group.path)
        return group

    def stop_and_tell(*args: Any, **more: Any) -> None:
        stop(*args, **more)
        stopped.set()

    monkeypatch.setattr(grouped, "make", slowly)
    monkeypatch.setattr(lifecycle.Experiment, "stop", stop_and_tell)
    async with daemon(tmp_path, runs={"grace_secs": 0.0}) as running:
        await running.submit("print(1)")
        async with asyncio.timeout(LIMIT_SECS):
            await making.wait()
            running.service.stop.drain.set()
            running.service.stop.signalled.set()
            await stopped.wait()
        go.set()
        await running.until(running.task.done)
    (group,) = made
    assert not Path(group).exists()


@pytest.mark.usefixtures("measured")
async def test_what_a_run_used_is_told(tmp_path: Path) -> None:
    async with daemon(tmp_path, runs={"enforce_limits": False}) as running:
        await running.submit(ENDS, **asking(ram="10mb", hdd="100kb"))
        use = running.service._metrics.registry.get_sample_value
        for resource, least in (("memory_bytes", 200 << 20), ("cpu_cores", 0), ("disk_bytes", 0)):
            # It goes on until all were sampled.
            await running.until(lambda: (use("runner_experiments_used", {"resource": resource}) or 0) > least)  # noqa: B023
        (run,) = running.runs
        (run / "experiments" / run.name / "workspace" / "go").touch()
        await running.settled()
        (document,) = running.documents()
        used = document["runner"]["used"]
        shown = await metrics(running)
    assert document["studioml"]["status"] == "completed"  # limits were not to be enforced
    assert used["samples"] >= 1
    assert 0 < used["cpu_cores"]["mean"] <= used["cpu_cores"]["peak"] < 3
    assert 0 < used["memory_bytes"]["mean"] <= used["memory_bytes"]["peak"]
    assert 200 << 20 < used["memory_bytes"]["peak"] < 300 << 20
    assert 0 < used["disk_bytes"]["mean"] <= used["disk_bytes"]["peak"] < 2 << 20
    for name in ("cpu_cores", "memory_peak_bytes", "disk_peak_bytes"):
        assert f"runner_experiment_{name}_count 1.0" in shown
    assert re.search(r"runner_sampling_cpu_seconds_total 0\.[0-9]*[1-9]", shown)


@pytest.mark.usefixtures("measured")
async def test_a_short_run_is_told_of_by_its_end(tmp_path: Path) -> None:
    async with daemon(tmp_path) as running:
        await running.submit("print(1)")
        await running.settled()
        (document,) = running.documents()
    used = document["runner"]["used"]
    assert used["memory_bytes"]["peak"] > 1 << 20
    assert 0 < used["disk_bytes"]["peak"] < 2 << 20
    assert used["cpu_cores"]["peak"] > 0


async def test_a_run_over_its_disk_is_ended(tmp_path: Path) -> None:
    async with daemon(tmp_path) as running:
        await running.submit(WRITER, **asking(hdd="20mb"))
        await running.settled()
        (document,) = running.documents()
        assert (document["studioml"]["status"], document["studioml"]["reason"]) == ("failed", "disk")
        said = running.output()
        told = re.search(
            r"studio-runner: out of disk: its directory takes (\d\d(?:\.\d+)?) MB, 20 MB were granted", said
        )
        assert told
        assert 20 <= float(told[1]) < 40  # it may be seen while it still writes
        assert document["runner"]["used"]["disk_bytes"]["peak"] > 20 * 1000 * 1000
    assert not running.dead()


async def test_a_full_volume_stops_taking_work_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = diskroom.DiskRoom.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "every_secs", 0.05)
    monkeypatch.setattr(diskroom, "LOW_BYTES", 1 << 62)
    monkeypatch.setattr(diskroom, "LOW_SHARE", 1.0)
    async with daemon(tmp_path) as running:
        await running.submit("print('fine')")
        async with asyncio.timeout(LIMIT_SECS):
            while not (queues := (await told(running, "/api/queues"))["queues"]):
                await asyncio.sleep(0.05)
        assert queues[0]["closed_because"].startswith("the disk is nearly full: ")
        ready = await told(running, "/readyz")
        assert not ready["ready"]
        assert ready["accounts"]["disk"].startswith("the disk is nearly full: ")
        assert running.queue.depth("rmq_a") == 1
        monkeypatch.setattr(diskroom, "LOW_SHARE", 0.0)
        await running.settled()
        (document,) = running.documents()
        assert document["studioml"]["status"] == "completed"
        assert (await told(running, "/readyz"))["ready"]
