"""What a run may use, and what is done when it uses more."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from runner import errors
from runner.experiment import limits
from runner.experiment.limits import Bounds, memory_ceiling
from runner.experiment.outcome import Outcome, Status
from runner.process.base import ProcessExit
from runner.request.model import Resources
from runner.resources.usage import Use

GB = 1_000_000_000
GRANTED = Resources(cpus=1, ram_bytes=2 * GB, hdd_bytes=10 * GB)


def used(memory: float = 0, disk: float = 0) -> Use:
    use = Use(processes=3)
    use.memory.add(memory)
    use.disk.add(disk)
    return use


def bounds(
    granted: Resources = GRANTED, *, enforced: bool = True
) -> tuple[Bounds, list[tuple[errors.Reason, str]]]:
    stops: list[tuple[errors.Reason, str]] = []
    return Bounds(granted, enforced=enforced, stop=lambda *why: stops.append(why)), stops


def test_a_tenth_more_memory_than_asked_for_is_tolerated():
    assert memory_ceiling(Resources(ram_bytes=0)) == 0
    assert memory_ceiling(Resources(ram_bytes=100)) == 100 + limits.MIN_TOLERANCE_BYTES
    assert memory_ceiling(GRANTED) == 2.2 * GB


def test_more_memory_ends_the_run_with_the_figures():
    check, stops = bounds()
    check(used(memory=2.2 * GB))
    assert not stops
    check(used(memory=2.5 * GB))
    assert stops == [(errors.Reason.OOM, "out of memory: its 3 processes use 2.5 GB, 2 GB were granted")]


def test_disk_is_warned_of_and_then_ends_the_run():
    check, stops = bounds()
    with capture_logs() as said:
        check(used(disk=8.9 * GB))
        assert not said
        check(used(disk=9.1 * GB))
        check(used(disk=9.2 * GB))
        check(used(disk=10 * GB))
    assert [(each["event"], each["used_bytes"], each["granted_bytes"]) for each in said] == [
        ("a run has nearly used up its disk", 9_100_000_000, 10 * GB)
    ]
    assert not stops
    check(used(disk=10.5 * GB))
    assert stops == [(errors.Reason.DISK, "out of disk: its directory takes 10.5 GB, 10 GB were granted")]


def test_who_asks_for_nothing_is_not_limited():
    check, stops = bounds(Resources(cpus=1))
    with capture_logs() as said:
        check(used(memory=10**15, disk=10**15))
    assert not stops
    assert not said


def test_limits_that_are_not_enforced_are_told_once():
    check, stops = bounds(enforced=False)
    with capture_logs() as said:
        for _ in range(3):
            check(used(memory=3 * GB))
    assert [each["why"] for each in said] == ["out of memory: its 3 processes use 3 GB, 2 GB were granted"]
    assert not stops


@pytest.mark.parametrize(("code", "signal", "exit_code"), [(None, 9, 137), (1, None, 1)])
def test_what_the_kernel_ended_for_want_of_memory_is_final(code, signal, exit_code):
    outcome = Outcome.of_exit(
        ProcessExit(code=code, signal=signal, oom="the kernel ended 1 of its processes")
    )
    assert (outcome.status, outcome.reason, outcome.fate) == (
        Status.FAILED,
        errors.Reason.OOM,
        errors.Fate.ACK,
    )
    assert outcome.text == "out of memory: the kernel ended 1 of its processes"
    assert outcome.exit_code == exit_code
    assert outcome.by_runner


def test_a_run_that_got_over_the_loss_of_a_process_has_completed():
    assert Outcome.of_exit(ProcessExit(code=0, oom="the kernel ended 1")).status is Status.COMPLETED
