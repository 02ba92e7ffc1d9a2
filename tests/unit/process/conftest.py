from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from runner.process.spawner import Spawner
from tests.unit.process.tools import Bench, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """Whatever a test does, nothing that it has started may outlive it."""
    bench = Bench(tmp_path)
    yield bench
    await until(lambda: not bench.alive())


@pytest.fixture
async def starter(bench: Bench) -> AsyncIterator[Spawner]:
    starter = Spawner()
    await starter.open()
    yield starter
    await starter.aclose()
