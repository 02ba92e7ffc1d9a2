"""Python environments: a hit of the cache, and a build with warm packages beside uv alone doing the same."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

from bench.figures import Bar, Figure, median
from runner.config import Environments
from runner.executors.base import RunSpec
from runner.executors.uvtool import PASSED
from runner.executors.venv import VenvExecutor
from runner.process.spawner import Spawner

if TYPE_CHECKING:
    from pathlib import Path

    from bench.lab import Lab

#: What a small training run asks for: about 60 MB on disk.
LINES = ("numpy==1.26.4", "requests==2.32.3", "pyyaml==6.0.2", "tqdm==4.67.1", "packaging==24.2")
#: What the runner adds, for workloads that install at run time.
SEEDS = ("pip", "setuptools<81")
FEW = ("packaging==24.2",)


def measure(lab: Lab) -> list[Figure]:
    """Medians of both."""
    return asyncio.run(
        _measure(lab.directory / "environment", FEW if lab.quick else LINES, 3 if lab.quick else 9)
    )


async def _measure(directory: Path, lines: tuple[str, ...], rounds: int) -> list[Figure]:
    directory.mkdir()
    spawner = Spawner()
    await spawner.open()
    cache = directory / "cache"
    executor = VenvExecutor(Environments(cache_dir=cache), spawner)

    async def prepare(name: str) -> tuple[float, str]:
        run = directory / name
        (run / "workspace").mkdir(parents=True)
        spec = RunSpec(
            run_dir=run, workspace=run / "workspace", filename="main.py", python="3.11", requirements=lines
        )
        began = time.perf_counter()
        async with executor.prepare(spec, run / "log") as prepared:
            took = time.perf_counter() - began
        shutil.rmtree(run)
        return took, str(prepared.facts["python_path"])

    try:
        _, python = await prepare("first")  # fills uv's package cache
        hits = [(await prepare(f"hit{number}"))[0] for number in range(rounds * 3)]
        builds, alone = [], []
        for number in range(rounds):
            # Each right after a removal of the same size: that alone makes a file system slower for a while.
            shutil.rmtree(cache / "entries", ignore_errors=True)
            builds.append((await prepare(f"build{number}"))[0])
            shutil.rmtree(cache / "entries")
            alone.append(
                await asyncio.to_thread(
                    _uv_alone, directory / f"alone{number}", cache / "packages", python, lines
                )
            )
    finally:
        await spawner.aclose()
    return [
        Figure(name="environment, hit", value=median(hits) * 1000, unit="ms", bar=Bar(limit=100)),
        Figure(
            name="environment, warm build",
            value=median(builds) * 1000,
            unit="ms",
            baseline=median(alone) * 1000,
            bar=Bar(limit=1.2),
            note=f"{len(lines)} requirements; beside `uv venv` and `uv pip install` of the same",
        ),
    ]


def _uv_alone(prefix: Path, packages: Path, python: str, lines: tuple[str, ...]) -> float:
    from uv import find_uv_bin

    env = {name: value for name, value in os.environ.items() if PASSED.fullmatch(name)}
    env |= {"UV_CACHE_DIR": str(packages), "UV_PYTHON_DOWNLOADS": "never", "VIRTUAL_ENV": str(prefix)}
    began = time.perf_counter()
    for arguments in (("venv", "--python", python, str(prefix)), ("pip", "install", *lines, *SEEDS)):
        subprocess.run([find_uv_bin(), "--quiet", "--offline", *arguments], env=env, check=True)
    took = time.perf_counter() - began
    shutil.rmtree(prefix)
    return took
