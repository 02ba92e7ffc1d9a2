"""Output of any size and kind costs us no memory: it goes straight to the file (DESIGN.md rule 7)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.unit.process import tools

if TYPE_CHECKING:
    from runner.process.spawner import Spawner
    from tests.unit.process.tools import Bench

MIB = 1 << 20


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("source", "size"),
    [
        pytest.param("head -c {size} /dev/zero", 1 << 30, id="1 GiB of NUL bytes"),
        pytest.param("head -c {size} /dev/zero | tr '\\0' x; echo", 100 * MIB, id="a line of 100 MiB"),
    ],
)
async def test_output_costs_no_memory(bench: Bench, starter: Spawner, source: str, size: int) -> None:
    process = await starter.start(
        bench.shell(f"{source.format(size=size)}; echo end; while [ ! -e go ]; do sleep 0.05; done")
    )
    nursery, supervisor = tools.nursery_of(starter), process.supervisor_pid or 0

    def memory_kib() -> list[int]:
        return [tools.private_kib(pid) for pid in (os.getpid(), nursery, supervisor)]

    before = memory_kib()
    # The disk may be slow, and other tests' as well.
    await tools.until(lambda: bench.output.exists() and bench.output.stat().st_size > size, limit_secs=250)
    with bench.output.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        await tools.until(lambda: (file.seek(-4, os.SEEK_END), file.read())[1] == b"end\n")
    grown = [after - start for after, start in zip(memory_kib(), before, strict=True)]
    assert max(grown) < 4096, grown
    (bench.directory / "go").touch()
    assert (await process.wait()).ok
    assert size < bench.output.stat().st_size <= size + 5
    bench.output.unlink()
