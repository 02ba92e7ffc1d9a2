"""What a container leaves of the machine: trees of files as the kernel shows them, of both versions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import pytest

from runner import config, errors
from runner.resources import containers, probe
from runner.resources.containers import Quota
from tests.servers.cgroup_tree import Tree, write

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_without_control_groups_nothing_limits(tmp_path):
    assert containers.quota(tmp_path) == Quota()


def test_a_container_of_version_2_with_a_namespace_of_its_own(tree):
    own = tree.second()
    write(own, cpu__max="250000 100000", memory__max=8 * GIB, memory__high="max", memory__current=3 * GIB)
    write(own, cpuset__cpus__effective="0-7", memory__stat=f"anon 5\nfile 9\ninactive_file {GIB}\nslab 3")
    assert containers.quota(tree.root) == Quota(cores=2, memory_bytes=6 * GIB)


def test_every_group_above_counts(tree):
    own = tree.second("/kubepods/burstable/pod1/container")
    write(own, cpu__max="max 100000", memory__max="max", memory__current=GIB)
    write(own.parent, cpu__max="300000 100000", memory__max=5 * GIB, memory__current=2 * GIB)
    write(own.parents[1], cpu__max="150000 50000", memory__high=4 * GIB, memory__current=2 * GIB)
    write(own.parents[2], cpu__max="max", memory__max=64 * GIB, memory__current=10 * GIB)
    assert containers.quota(tree.root) == Quota(cores=3, memory_bytes=2 * GIB)


def test_a_container_of_version_1(tree):
    cpu = tree.first("cpu,cpuacct", "/docker/abc", mounted="/docker/abc")
    write(cpu, cpu__cfs_quota_us=400000, cpu__cfs_period_us=100000)
    memory = tree.first("memory", "/docker/abc", mounted="/docker/abc")
    write(memory, memory__limit_in_bytes=2 * GIB, memory__usage_in_bytes=GIB)
    write(memory, memory__stat=f"cache 7\ninactive_file 1\ntotal_inactive_file {GIB // 2}")
    cpuset = tree.first("cpuset", "/docker/abc", mounted="/docker/abc")
    write(cpuset, cpuset__cpus="0-2,5")
    assert containers.quota(tree.root) == Quota(cores=4, memory_bytes=GIB + GIB // 2)
    write(cpuset, cpuset__effective_cpus="1,5-6")
    assert containers.quota(tree.root).cores == 3


def test_a_path_outside_of_what_is_mounted_stands_for_the_mount(tree):
    own = tree.first("memory", "/docker/abc", mounted="/elsewhere")
    write(own, memory__limit_in_bytes=GIB)
    assert containers.quota(tree.root).memory_bytes == GIB


def test_both_versions_side_by_side(tree):
    write(tree.second("/unified"), cpu__max="100000 100000")
    write(tree.first("memory"), memory__limit_in_bytes=GIB)
    assert containers.quota(tree.root) == Quota(cores=1, memory_bytes=GIB)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("50000 100000", 1),
        ("1000 100000", 1),
        ("199999 100000", 1),
        ("200000 100000", 2),
        ("300000", 3),
        ("max 100000", None),
        ("-1 100000", None),
        ("0 100000", None),
        ("100000 0", None),
        ("99999999999999999999999 1", None),
        ("1e9 100000", None),
        ("", None),
        ("many words are in here", None),
    ],
)
def test_time_is_counted_in_whole_cores_and_nonsense_is_no_limit(tree, quota, cores):
    write(tree.second(), cpu__max=quota)
    assert containers.quota(tree.root).cores == cores


@pytest.mark.parametrize("limit", ["max", "-1", "0", 9223372036854771712, 18446744073709551615, "1gb", ""])
def test_a_limit_of_memory_that_is_none_or_nonsense(tree, limit):
    write(tree.second(), memory__max=limit)
    write(tree.first("memory"), memory__limit_in_bytes=limit)
    assert containers.quota(tree.root) == Quota()


def test_more_in_use_than_the_limit_leaves_nothing(tree):
    write(tree.second(), memory__max=GIB, memory__current=2 * GIB, memory__stat="inactive_file 12")
    assert containers.quota(tree.root).memory_bytes == 0


@pytest.mark.parametrize("cpus", ["3-1", "0-99999999", "a-b", "", "0--1", "-1"])
def test_a_set_of_cores_that_makes_no_sense(tree, cpus):
    write(tree.second(), cpuset__cpus__effective=cpus)
    assert containers.quota(tree.root).cores is None


def test_bytes_that_are_no_text_harm_nothing(tree):
    own = tree.second()
    for name in ("cpu.max", "memory.max", "memory.stat", "cpuset.cpus.effective"):
        (own / name).write_bytes(b"\xff\xfe\0\x80 \n")
    for name in ("cgroup", "mountinfo"):
        path = tree.root / "proc/self" / name
        path.write_bytes(b"\xff:\xfe\n - \n1 2 3\n" + path.read_bytes())
    assert containers.quota(tree.root) == Quota()


def test_the_machine_is_cut_to_the_container_and_options_cut_further(tree, tmp_path):
    own = tree.second()
    write(own, cpu__max="100000 100000", memory__max=GIB // 4)
    whole = probe.machine(config.Machine(), tmp_path, tree.root)
    assert (whole.cpus, whole.ram_bytes) == (1, GIB // 4)
    less = config.Machine(max_mem_bytes=GIB // 8, max_disk_bytes=GIB)
    cut = probe.machine(less, tmp_path, tree.root)
    assert (cut.ram_bytes, cut.hdd_bytes) == (GIB // 8, min(GIB, whole.hdd_bytes))
    for asked in (config.Machine(max_cores=2), config.Machine(max_mem_bytes=GIB // 4 + 1)):
        with pytest.raises(errors.UsageError, match=r"this machine has .*; ask for at most that"):
            probe.machine(asked, tmp_path, tree.root)


def test_an_option_that_allows_more_than_is_left_now_is_no_mistake(tree, tmp_path):
    """What is left of the runs of a daemon that was killed has the memory until it ends: the next one has to start."""
    own = tree.second()
    write(own, memory__max=GIB // 4, memory__current=GIB // 4 - 1000)
    limits = config.Machine(max_mem_bytes=GIB // 8)
    assert probe.machine(limits, tmp_path, tree.root).ram_bytes == 1000
    write(own, memory__current=1000)
    assert probe.memory_available(limits, tree.root) == GIB // 8
    assert probe.memory_available(config.Machine(), tree.root) == GIB // 4 - 1000


def test_without_a_container_it_is_the_machine(tmp_path):
    bare = probe.machine(config.Machine(), tmp_path, tmp_path / "none")
    assert 0.5 < bare.ram_bytes / psutil.virtual_memory().available < 2
