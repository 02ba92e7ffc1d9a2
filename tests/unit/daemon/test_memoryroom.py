from __future__ import annotations

import asyncio
import itertools

import pytest

from runner import errors
from runner.daemon import memoryroom
from runner.request.model import Resources
from runner.resources.allocator import Allocator

GIB = 1 << 30
LIMIT_SECS = 60


async def test_memory_that_comes_back_is_given_to_whom_it_fits_and_none_is_taken_away():
    machine = Allocator(Resources(cpus=4, ram_bytes=2 * GIB, hdd_bytes=GIB), lambda: GIB)
    running = machine.allocate(Resources(ram_bytes=GIB))
    with pytest.raises(errors.NeverFits):
        machine.allocate(Resources(ram_bytes=3 * GIB))
    waiting = asyncio.create_task(
        machine.acquire(Resources(ram_bytes=2 * GIB), rank=lambda: 0, timeout_secs=LIMIT_SECS)
    )
    asked = itertools.count()

    def available() -> int:
        number = next(asked)
        if number == 1:
            raise OSError("no more files")
        return 4 * GIB if number == 2 else GIB

    following = asyncio.create_task(memoryroom.follow(machine, available, every_secs=0.001))
    granted = await waiting
    async with asyncio.timeout(LIMIT_SECS):
        while next(asked) < 10:
            await asyncio.sleep(0.001)
    assert machine.total == Resources(cpus=4, ram_bytes=4 * GIB, hdd_bytes=GIB)
    assert machine.free.ram_bytes == GIB
    granted.release()
    machine.allocate(Resources(ram_bytes=3 * GIB))
    running.release()
    assert not following.done()
    following.cancel()
