"""What becomes of images that came as files, on an engine that does what the test says."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, cast

import pytest

from runner import errors
from runner.executors import docker_loaded
from runner.executors.docker_archive import LOADED
from runner.executors.docker_engine import Answer, Engine
from runner.executors.docker_loaded import KEEP_SECS, Loaded
from runner.process.base import ProcessExit

if TYPE_CHECKING:
    import pathlib

LIMIT_SECS = 60


def image(number: int) -> str:
    return f"{LOADED}:{number:064x}"


class Store:
    """An engine's images."""

    def __init__(self, *images: str) -> None:
        self.images = list(images)
        self.in_use: set[str] = set()
        self.removing = asyncio.Event()
        self.slow = asyncio.Event()
        self.slow.set()

    async def ask(self, *arguments: str) -> Answer:
        if arguments[:2] == ("image", "ls"):
            return said("\n".join(["WARNING: something", *self.images]))
        verb, _, name = *arguments[:2], arguments[2]
        assert (verb, len(arguments)) == ("image", 3)  # not by force
        self.removing.set()
        await self.slow.wait()
        if name in self.in_use:
            return said("conflict: container 1 is using it", code=1)
        self.images.remove(name)
        return said(name)


def said(text: str, code: int = 0) -> Answer:
    return Answer(ended=ProcessExit(code=code), text=text)


@pytest.fixture
def loaded(tmp_path) -> Loaded:
    return Loaded(tmp_path / "records")


async def tidy(loaded: Loaded, store: Store) -> list[str]:
    await loaded.tidy(cast("Engine", store))
    return store.images


def aged(tmp_path: pathlib.Path, number: int, secs: float = KEEP_SECS + 60) -> str:
    name = image(number)
    (tmp_path / "records").mkdir(exist_ok=True)
    record = tmp_path / "records" / name.rpartition(":")[2]
    record.touch()
    os.utime(record, (0, time.time() - secs))
    return name


async def test_what_no_run_has_used_for_a_day_goes_and_nothing_else(loaded, tmp_path):
    old, young = aged(tmp_path, 1), aged(tmp_path, 2, KEEP_SECS - 600)
    gone, other = aged(tmp_path, 3), f"{LOADED}:latest"
    store = Store(old, young, image(4), other)
    assert await tidy(loaded, store) == [young, image(4), other]
    left = {record.name for record in (tmp_path / "records").iterdir()}
    assert left == {
        name.rpartition(":")[2] for name in (young, image(4))
    }  # what is first seen now has its day
    assert gone not in left
    aged(tmp_path, 4)
    assert await tidy(loaded, store) == [young, other]


async def test_one_that_a_run_has_is_kept_and_its_day_begins_when_the_run_ends(loaded, tmp_path):
    store = Store(aged(tmp_path, 1))
    async with loaded.used(image(1)), loaded.used(image(1)):
        aged(tmp_path, 1)  # a run of two days
        async with loaded.used(image(1)):
            pass
        aged(tmp_path, 1)
        assert await tidy(loaded, store) == [image(1)]
    assert await tidy(loaded, store) == [image(1)]
    aged(tmp_path, 1)
    assert await tidy(loaded, store) == []


async def test_a_run_that_wants_what_is_being_removed_waits_and_finds_it_gone(loaded, tmp_path):
    store = Store(aged(tmp_path, 1), image(2))
    store.slow.clear()
    tidying = asyncio.create_task(tidy(loaded, store))
    await store.removing.wait()

    async def uses(name: str) -> list[str]:
        async with loaded.used(name):
            return list(store.images)

    async with asyncio.timeout(LIMIT_SECS):
        assert image(2) in await uses(image(2))  # another one does not wait
        waiting = asyncio.create_task(uses(image(1)))
        await asyncio.sleep(0)
        assert not waiting.done()
        store.slow.set()
        assert await waiting == [image(2)]
    await tidying


async def test_those_that_the_engine_keeps_do_not_stand_in_the_way_of_others(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(docker_loaded, "MOST", 2)
    names = [aged(tmp_path, number, KEEP_SECS + 1000 - number) for number in range(4)]
    store = Store(*names)
    store.in_use = set(names[:2])
    assert await tidy(loaded, store) == names
    assert await tidy(loaded, store) == names[:2]


async def test_an_engine_that_is_away_harms_nothing(loaded, tmp_path):
    store = Store(aged(tmp_path, 1))

    async def away(*_: str) -> Answer:
        raise errors.Unreachable("docker does not answer", endpoint="docker")

    store.ask, ask = away, store.ask  # type: ignore[method-assign]
    assert await tidy(loaded, store) == [image(1)]
    store.ask = ask  # type: ignore[method-assign]
    assert await tidy(loaded, store) == []
