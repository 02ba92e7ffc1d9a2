from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from runner.queues.absent import FORGET_SECS, Absent
from runner.queues.base import Existence
from runner.queues.file_root import QueueRoot

if TYPE_CHECKING:
    from pathlib import Path


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_a_name_is_forgotten_after_a_day_in_which_no_discovery_has_listed_it(clock):
    absent: Absent[str] = Absent()
    assert absent.over({"a", "b"}, {"a"}) == set()
    clock.now += FORGET_SECS - 1
    assert absent.over({"a", "b"}, {"a"}) == set()
    assert absent.over({"a", "b"}, {"a", "b"}) == set()  # it is back
    clock.now += 2
    assert absent.over({"a", "b"}, {"a"}) == set()
    clock.now += FORGET_SECS
    assert absent.over({"a", "b"}, {"a"}) == {"b"}


def test_what_another_root_had_is_not_forgotten(tmp_path: Path, clock: Clock):
    """A file system that is not mounted for days cancels no run when it is asked for."""
    directory, aside = tmp_path / "root", tmp_path / "aside"
    (directory / "rmq_a").mkdir(parents=True)
    root = QueueRoot(directory)
    assert root.discover() == ["rmq_a"]
    directory.rename(aside)
    directory.mkdir()
    for _ in range(3):
        clock.now += FORGET_SECS
        assert root.discover() == []
    assert root.existence("rmq_a") is Existence.UNKNOWN
    directory.rmdir()
    aside.rename(directory)
    (directory / "rmq_a").rmdir()
    for _ in range(3):
        clock.now += FORGET_SECS
        root.discover()
    assert not root._seen
