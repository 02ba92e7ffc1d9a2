"""Executors that are made when a run wants them."""

from __future__ import annotations

import contextlib

import pytest

from runner.executors.base import Executor, Prepared
from runner.executors.registry import Executors, Later


class Counted(Executor):
    made = reaped = tidied = 0

    def __init__(self) -> None:
        Counted.made += 1

    @contextlib.asynccontextmanager
    async def prepare(self, spec, log):
        yield Prepared(argv=("true",), env={})

    async def reap(self) -> None:
        Counted.reaped += 1

    async def tidy(self) -> None:
        Counted.tidied += 1

    async def make_room(self, bytes_needed: int) -> int:
        return bytes_needed


@pytest.fixture(autouse=True)
def none_made():
    Counted.made = Counted.reaped = Counted.tidied = 0


async def test_what_nobody_uses_is_not_made(tmp_path):
    executors = Executors(venv=Counted(), docker=Later(Counted, tmp_path / "trace"), singularity=None)
    await executors.reap()
    await executors.tidy()
    assert await executors.make_room(7) == 7
    assert Counted.made == 1
    executors.check("docker")
    executors.check("docker")
    assert Counted.made == 2


async def test_what_an_earlier_daemon_used_is_made_to_see_to_what_it_left(tmp_path):
    (tmp_path / "trace").mkdir()
    later = Later(Counted, tmp_path / "trace")
    await later.reap()
    await later.tidy()
    assert (Counted.reaped, Counted.tidied) == (1, 1)
    assert await later.make_room(7) == 7
    assert Counted.made == 1
