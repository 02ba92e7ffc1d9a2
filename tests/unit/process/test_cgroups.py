"""Control groups: what is written, on a tree of files; and that it works, on the kernel's own where one can be made.

Which of the two it was is in the reason of each skip, and in the first lines of the test run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runner.process import cgroups, spawner
from runner.process.cgroup import Group
from tests.servers import cgroup_tree
from tests.unit.process import tools
from tests.unit.process.test_survivors import HARD, daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runner.process.spawner import Spawner
    from tests.unit.process.tools import Bench

ROOT = Path(__file__).parents[3]
GIB = 1 << 30


def nobody_else(pids: object) -> set[int]:
    del pids
    return set()


@pytest.fixture
def tree(tmp_path: Path) -> cgroup_tree.Tree:
    return cgroup_tree.Tree(tmp_path)


def delegated(tree: cgroup_tree.Tree, path: str = "/system.slice/studio-runner.service") -> Path:
    """A service's group, which systemd has delegated. A file does not add up what is written to it: the last stays."""
    own = tree.second(path)
    cgroup_tree.write(
        own, cgroup__controllers="cpu memory pids", cgroup__procs="", cgroup__subtree_control=""
    )
    return own


# -- what is written


def test_a_run_gets_its_limits(tree):
    own = delegated(tree)
    (own / "cgroup.subtree_control").write_text("memory")
    groups = cgroups.Groups(own, 2)
    group = groups.make("abc.0", cpus=3, ram_bytes=GIB)
    told = {path.name: path.read_text() for path in Path(group.path).iterdir()}
    assert told == {
        "memory.max": str(GIB),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "cpu.weight": "300",
        "pids.max": str(cgroups.MAX_PIDS),
    }
    assert Path(group.path).parent == own


def test_a_run_that_asks_for_no_memory_has_no_limit(tree):
    own = delegated(tree)
    group = cgroups.Groups(own, 2).make("abc.0", cpus=0, ram_bytes=0)
    assert (Path(group.path) / "memory.max").read_text() == "max"
    assert (Path(group.path) / "cpu.weight").read_text() == "100"
    huge = cgroups.Groups(own, 2).make("abc.1", cpus=500, ram_bytes=0)
    assert (Path(huge.path) / "cpu.weight").read_text() == "10000"


def behave(monkeypatch: pytest.MonkeyPatch, own: Path) -> list[tuple[str, str]]:
    """Let files do what the kernel's do: processes leave the group that they were in, controllers add up. What was written."""
    written: list[tuple[str, str]] = []
    write_text = Path.write_text

    def write(path: Path, text: str) -> int:
        written.append((str(path.relative_to(own)), text))
        if path.name == "cgroup.procs":
            write_text(own / "cgroup.procs", "")
        if path.name == "cgroup.subtree_control":
            text = path.read_text() + " " + text.removeprefix("+")
        return write_text(path, text)

    monkeypatch.setattr(Path, "write_text", write)
    return written


def test_controllers_are_handed_on_one_by_one_and_the_daemon_moves_into_a_leaf(tree, monkeypatch):
    own = delegated(tree)
    (own / "cgroup.procs").write_text(f"{os.getpid()}\n")
    written = behave(monkeypatch, own)
    groups = cgroups.Groups.find(tree.root)
    assert str(groups) == f"cgroup v2 at {own}"
    assert written == [
        (f"{cgroups.LEAF}/cgroup.procs", str(os.getpid())),
        ("cgroup.subtree_control", "+memory"),
        ("cgroup.subtree_control", "+cpu"),
        ("cgroup.subtree_control", "+pids"),
    ]


def test_a_daemon_that_starts_in_the_leaf_uses_the_group_above_it(tree, monkeypatch):
    own = delegated(tree)
    again = cgroup_tree.Tree(tree.root)
    again.second(f"/system.slice/studio-runner.service/{cgroups.LEAF}")
    behave(monkeypatch, own)
    assert cgroups.Groups.find(tree.root, strangers=nobody_else).base == own


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda own: (own / "cgroup.controllers").write_text("cpu pids"), "no memory controller"),
        (lambda own: (own / "cgroup.procs").write_text("1 4711"), "not the daemon's alone"),
    ],
)
def test_where_none_can_be_made_the_reason_is_told_and_nothing_is_touched(tree, change, why):
    own = delegated(tree)
    change(own)
    before = sorted(path.name for path in own.iterdir())
    with pytest.raises(cgroups.Unavailable, match=why):
        cgroups.Groups.find(tree.root, strangers=lambda pids: {pid for pid in pids if pid > 1})
    assert sorted(path.name for path in own.iterdir()) == before


def test_without_any_control_groups(tmp_path):
    with pytest.raises(cgroups.Unavailable, match="not mounted"):
        cgroups.Groups.find(tmp_path)


def test_strangers_are_neither_we_nor_our_children_nor_process_1():
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert cgroups.strangers([1, os.getpid(), child.pid, 2**22 + 1]) == set()
        assert cgroups.strangers([os.getppid()]) == {os.getppid()} - {1}
    finally:
        child.kill()
        child.wait()


def test_version_1_limits_memory_only(tree):
    own = tree.first("memory", "/docker/abc", mounted="/docker/abc")
    cgroup_tree.write(own, memory__limit_in_bytes=1 << 62)
    groups = cgroups.Groups.find(tree.root)
    assert str(groups) == f"cgroup v1, memory only, at {own}"
    group = groups.make("abc.0", cpus=3, ram_bytes=GIB)
    assert {path.name: path.read_text() for path in Path(group.path).iterdir()} == {
        "memory.limit_in_bytes": str(GIB),
        "memory.memsw.limit_in_bytes": str(GIB),
    }


def test_groups_of_daemons_that_are_gone_are_removed(tree):
    own = delegated(tree)
    mine = own / f"studio-runner.{os.getpid()}.a.0"
    dead = own / f"studio-runner.{2**22 + 1}.b.0"
    other = own / "user-thing"
    for directory in (mine, dead, other):
        directory.mkdir()
    cgroups.Groups(own, 2).sweep()
    assert (mine.exists(), dead.exists(), other.exists()) == (True, False, True)


def test_figures_are_read_and_what_is_missing_is_none(tmp_path):
    cgroup_tree.write(tmp_path, memory__events="low 0\noom 4\noom_kill 3", memory__peak=77, memory__max=99)
    group = Group(str(tmp_path), 2)
    assert (group.oom_kills(), group.peak_bytes(), group.limit_bytes()) == (3, 77, 99)
    (tmp_path / "memory.max").write_text("max\n")
    assert group.limit_bytes() == 0
    none = Group(str(tmp_path / "none"), 1)
    assert (none.oom_kills(), none.peak_bytes(), none.limit_bytes()) == (0, 0, 0)


# -- on the kernel


@pytest.fixture
def real_second() -> Iterator[Path]:
    """A new group of the real version 2 hierarchy."""
    place = cgroup_tree.real()
    if place is None:
        pytest.skip("NOT PROVEN HERE: no real cgroup v2 that can be written")
    directory = place / f"test-{uuid.uuid4().hex[:8]}"
    directory.mkdir()
    yield directory
    for below in sorted(directory.rglob("*/"), reverse=True):
        below.rmdir()
    directory.rmdir()


async def test_a_workload_runs_in_its_group_which_is_gone_when_it_has_ended(
    bench: Bench, starter: Spawner, real_second: Path
) -> None:
    run = real_second / "run"
    run.mkdir()
    script = "cat /proc/self/cgroup; " + tools.STRAY
    exit_ = await starter.run(bench.shell(script, group=Group(str(run), 2)))
    assert f"/{real_second.name}/run\n" in bench.text()
    assert (exit_.code, exit_.oom) == (0, "")
    assert not run.exists()


BIRTH = """
import os, sys
from runner.process import kernel
from runner.process.cgroup import Group
if "old" in sys.argv:
    def kernel_fork_into(fd):
        raise OSError(38, "Function not implemented")
    kernel.fork_into = kernel_fork_into
parent = os.getpid()
pid = kernel.fork_into(os.open(sys.argv[1], 0)) if "alone" in sys.argv else Group(sys.argv[1], 2).fork()
if pid == 0:
    print(open("/proc/self/cgroup").read().splitlines()[-1], os.getppid() == parent, flush=True)
    os.execvp("sh", ["sh", "-c", "exit 7"])
print(os.getpid() == parent, os.waitpid(pid, 0)[1] >> 8)
"""


def born(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", BIRTH, *map(str, arguments)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "how", ["alone", "new", "old"]
)  # an old kernel, and some sandboxes, cannot do it at birth
def test_a_process_is_born_in_its_group(real_second: Path, how: str) -> None:
    assert born(real_second, how).stdout.endswith(f"/{real_second.name} True\nTrue 7\n")


def test_a_process_cannot_be_born_where_there_is_no_group(tmp_path: Path) -> None:
    assert born(tmp_path, "alone").stderr.endswith("OSError: [Errno 9] Bad file descriptor\n")
    assert born(tmp_path / "gone").stdout.endswith("True\nTrue 7\n")  # and where one was: beside its parent


async def test_groups_that_a_workload_has_made_in_its_own_go_with_it(
    bench: Bench, starter: Spawner, limited: cgroups.Groups
) -> None:
    group = limited.make(f"deep-{uuid.uuid4().hex[:8]}", cpus=1, ram_bytes=1 << 30)
    await starter.run(bench.shell(f"mkdir -p {group.path}/a/b {group.path}/c && echo made", group=group))
    assert "made" in bench.text()
    assert not Path(group.path).exists()


async def test_a_group_is_killed_as_a_whole(bench: Bench, starter: Spawner, real_second: Path) -> None:
    run = real_second / "run"
    run.mkdir()
    if not (run / "cgroup.kill").exists():
        pytest.skip("NOT PROVEN HERE: this kernel has no cgroup.kill (5.14)")
    process = await starter.start(
        bench.shell(
            tools.STRAY * 3 + "trap '' TERM; echo ready; while :; do sleep 0.1; done",
            group=Group(str(run), 2),
        )
    )
    await bench.until_text("ready")
    Group(str(run), 2).kill()
    assert (await process.wait()).signal == 9
    assert not bench.alive()
    assert not run.exists()


async def test_a_group_that_is_gone_stops_no_workload(bench: Bench, starter: Spawner) -> None:
    assert (await starter.run(bench.shell("exit 3", group=Group("/no/such/group", 2)))).code == 3


PREPARE = """
import json, os, pathlib, subprocess, sys
own = pathlib.Path(sys.argv[1])
(own / "cgroup.procs").write_text(str(os.getpid()))
child = subprocess.Popen(["sleep", "600"])
from runner.process import cgroups, spawner
cgroups.CONTROLLERS = tuple(sys.argv[2:])
groups = cgroups.Groups.find()
again = cgroups.Groups.find()
run = groups.base / "run"
run.mkdir()
print(json.dumps({
    "base": str(groups.base), "again": str(again.base), "version": groups.version,
    "inside": sorted(map(int, (own / cgroups.LEAF / "cgroup.procs").read_text().split())) == sorted([os.getpid(), child.pid]),
    "handed_on": (own / "cgroup.subtree_control").read_text().split(),
    "controllers_of_a_run": (run / "cgroup.controllers").read_text().split(),
}))
child.kill()
child.wait()
run.rmdir()
"""


@pytest.fixture
def offered(real_second: Path) -> Iterator[list[str]]:
    """Controllers that a real group of version 2 has: at the top any that is not with version 1 is handed on for the test."""
    control = real_second.parent / "cgroup.subtree_control"
    handed_on = control.read_text().split()
    spare = [
        name
        for name in (real_second.parent / "cgroup.controllers").read_text().split()
        if name not in handed_on
    ]
    with contextlib.suppress(OSError):
        control.write_text(" ".join(f"+{name}" for name in spare))
    yield (real_second / "cgroup.controllers").read_text().split()
    with contextlib.suppress(OSError):
        control.write_text(" ".join(f"-{name}" for name in spare))


def test_the_real_tree_is_prepared(real_second: Path, offered: list[str]) -> None:
    """Also where memory is with version 1: the rules are the same for any controller that version 2 has."""
    wanted = [name for name in cgroups.CONTROLLERS if name in offered] or offered[:1]
    if not wanted:
        pytest.skip("NOT PROVEN HERE: the real cgroup v2 has no controllers to hand on")
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(real_second), *wanted],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == {
        "base": str(real_second),
        "again": str(real_second),
        "version": 2,
        "inside": True,
        "handed_on": told["handed_on"],
        "controllers_of_a_run": told["handed_on"],
    }
    assert set(wanted) <= set(told["handed_on"])


@pytest.fixture
def limited() -> cgroups.Groups:
    """Groups whose memory can be limited, whichever version has that controller."""
    place = cgroup_tree.real()
    if place is not None and "memory" in (place / "cgroup.subtree_control").read_text():
        return cgroups.Groups(place, 2)
    place = cgroup_tree.real("memory")
    if place is not None:
        return cgroups.Groups(place, 1)
    pytest.skip("NOT PROVEN HERE: no real memory controller that can be written")


async def test_out_of_memory_is_told_with_the_figures_and_only_of_the_run(
    bench: Bench, starter: Spawner, limited: cgroups.Groups
) -> None:
    mib = 1 << 20
    group = limited.make(f"oom-{uuid.uuid4().hex[:8]}", cpus=1, ram_bytes=64 * mib)
    exit_ = await starter.run(bench.python("x = bytearray(200 << 20)", group=group))
    assert exit_.signal == 9
    # Of its last page the group's peak knows, or not.
    assert re.fullmatch(
        r"the kernel ended 1 of its processes: it may use 64 MiB of memory, and had used 6[34] MiB of memory",
        exit_.oom,
    )
    assert not exit_.stopped
    assert not Path(group.path).exists()
    other = limited.make(f"fine-{uuid.uuid4().hex[:8]}", cpus=1, ram_bytes=64 * mib)
    assert (await starter.run(bench.python("x = bytearray(20 << 20)", group=other))).ok


async def test_a_child_that_is_killed_for_memory_fails_the_run_only_when_the_run_fails(
    bench: Bench, starter: Spawner, limited: cgroups.Groups
) -> None:
    if limited.version == 2:
        pytest.skip("a group of version 2 ends as a whole")
    hungry = f"{sys.executable} -I -S -c 'x = bytearray(200 << 20)'"
    for script, said in ((f"{hungry}; exit 1", True), (f"{hungry}; exit 0", False)):
        group = limited.make(f"child-{uuid.uuid4().hex[:8]}", cpus=1, ram_bytes=64 << 20)
        exit_ = await starter.run(bench.shell(script, group=group))
        assert bool(exit_.oom) == said


async def test_the_group_of_a_run_goes_when_its_daemon_is_killed(
    bench: Bench, limited: cgroups.Groups
) -> None:
    group = limited.make(f"gone-{uuid.uuid4().hex[:8]}", cpus=1, ram_bytes=1 << 30)
    async with daemon(bench.shell(tools.STRAY + HARD, group=group)) as (pid, _):
        await bench.until_text("ready")
        os.kill(pid, signal.SIGKILL)
        await tools.until(group.gone)
    assert not bench.alive()


async def test_memory_that_ran_out_around_the_daemon_is_told_by_the_kernels_count(
    bench: Bench, starter: Spawner, limited: cgroups.Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the daemon's own container is full, or the machine: the run has no group that would tell."""
    around = limited.make(f"whole-{uuid.uuid4().hex[:8]}", cpus=1, ram_bytes=64 << 20)
    counter = Path(around.path) / ("memory.oom_control" if limited.version == 1 else "memory.events")
    monkeypatch.setattr(spawner, "_oom_counter", lambda: counter)
    hungry = f"exec {sys.executable} -I -S -c 'x = bytearray(200 << 20)'"
    exit_ = await starter.run(bench.shell(f"echo $$ > {around.path}/cgroup.procs; {hungry}"))
    assert exit_.signal == 9
    assert re.fullmatch(
        r"it was killed while the machine ran out of memory; its largest process had \d+ MiB of memory",
        exit_.oom,
    )
    # What happened before a run is none of its concern.
    assert (await starter.run(bench.shell("kill -KILL $$"))).oom == ""
    around.remove()


def test_where_the_kernel_counts(tree):
    assert cgroups.oom_counter(tree.root) == tree.root / "proc/vmstat"
    own = delegated(tree)
    assert cgroups.oom_counter(tree.root) == tree.root / "proc/vmstat"  # without a memory controller
    (own / "memory.events").touch()
    assert cgroups.oom_counter(tree.root) == own / "memory.events"
    (own / "memory.events.local").touch()  # not what happens in the groups of runs
    assert cgroups.oom_counter(tree.root) == own / "memory.events.local"
    first = tree.first("memory", "/x")
    (first / "memory.oom_control").touch()
    assert cgroups.oom_counter(tree.root) == first / "memory.oom_control"


async def test_a_kill_without_the_kernels_word_is_no_lack_of_memory(bench: Bench, starter: Spawner) -> None:
    exit_ = await starter.run(bench.shell("kill -KILL $$"))
    assert (exit_.signal, exit_.oom) == (9, "")


async def test_a_workload_is_taken_before_the_daemon_and_writes_no_core(
    bench: Bench, starter: Spawner
) -> None:
    await starter.run(bench.shell("cat /proc/self/oom_score_adj; ulimit -c; ulimit -n"))
    score, core, files = bench.text().split()
    assert int(score) >= 500 > int(Path("/proc/self/oom_score_adj").read_text())
    assert core == "0"
    assert int(files) >= 1024
