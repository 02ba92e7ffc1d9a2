"""The choice among executors: by what the run is to run in, and by what this host has."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING

from runner import errors
from runner.executors.base import Executor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from runner.executors.base import Image, Prepared, RunSpec

#: What an operator has to do to get what is not there.
_TO_DO = {
    "docker": "install docker or podman, or name one with --container-engine",
    "singularity": "install apptainer",
}


class Later(Executor):
    """An executor that is made, and its modules imported, when a run wants it: most daemons never do."""

    def __init__(self, make: Callable[[], Executor], trace: Path) -> None:
        """`trace` is there when it has been used here before: then something of earlier runs may be left or kept."""
        self._make = make
        self._trace = trace

    @functools.cached_property
    def _made(self) -> Executor:
        return self._make()

    @contextlib.asynccontextmanager
    async def prepare(self, spec: RunSpec, log: Path) -> AsyncIterator[Prepared]:
        """See `Executor.prepare`."""
        async with self._made.prepare(spec, log) as prepared:
            yield prepared

    def check(self, engine: str | None) -> None:
        """See `Executor.check`."""
        self._made.check(engine)

    async def vet(self, image: Image) -> None:
        """See `Executor.vet`."""
        await self._made.vet(image)

    async def reap(self) -> None:
        """See `Executor.reap`."""
        if self._trace.exists():
            await self._made.reap()

    async def tidy(self) -> None:
        """See `Executor.tidy`."""
        if self._trace.exists():
            await self._made.tidy()

    async def make_room(self, bytes_needed: int) -> int:
        """See `Executor.make_room`."""
        return await self._made.make_room(bytes_needed) if self._trace.exists() else 0


class Executors(Executor):
    """Hands each run to the executor of its image's engine; None stands for one that this host does not have."""

    def __init__(self, *, venv: Executor, docker: Executor | None, singularity: Executor | None) -> None:
        self._venv = venv
        self._containers = {"docker": docker, "singularity": singularity}

    @contextlib.asynccontextmanager
    async def prepare(self, spec: RunSpec, log: Path) -> AsyncIterator[Prepared]:
        """See `Executor.prepare`."""
        executor = self._executor(spec.image.engine if spec.image is not None else None)
        async with executor.prepare(spec, log) as prepared:
            yield prepared

    def check(self, engine: str | None) -> None:
        """See `Executor.check`."""
        self._executor(engine).check(engine)

    async def vet(self, image: Image) -> None:
        """See `Executor.vet`."""
        await self._executor(image.engine).vet(image)

    async def reap(self) -> None:
        """See `Executor.reap`."""
        await asyncio.gather(*(executor.reap() for executor in self._present))

    async def tidy(self) -> None:
        """See `Executor.tidy`."""
        await asyncio.gather(*(executor.tidy() for executor in self._present))

    async def make_room(self, bytes_needed: int) -> int:
        """See `Executor.make_room`: one after the other, until it is enough."""
        freed = 0
        for executor in self._present:
            if freed < bytes_needed:
                freed += await executor.make_room(bytes_needed - freed)
        return freed

    @property
    def _present(self) -> list[Executor]:
        return [executor for executor in (self._venv, *self._containers.values()) if executor is not None]

    def _executor(self, engine: str | None) -> Executor:
        if engine is None:
            return self._venv
        executor = self._containers.get(engine)
        if executor is None:
            raise errors.NoEngine(
                f"it wants a {engine} image, and no such engine is enabled on this host: {_TO_DO[engine]}"
            )
        return executor
