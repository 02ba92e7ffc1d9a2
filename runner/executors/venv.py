"""Runs Python programs, each in a thin environment of its own over a cached base (DESIGN.md 5.4)."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

from runner.executors import layout, program, requirements
from runner.executors.base import Executor, Prepared
from runner.executors.envcache import EnvironmentCache
from runner.executors.interpreters import Interpreters
from runner.executors.uvtool import Uv

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from runner.config import Environments
    from runner.executors.base import RunSpec
    from runner.process.spawner import Spawner


class VenvExecutor(Executor):
    """Python environments made by uv. One instance per daemon; `spawner` starts every child."""

    def __init__(
        self, config: Environments, spawner: Spawner, *, environ: Mapping[str, str] | None = None
    ) -> None:
        environ = os.environ if environ is None else environ
        self._fallback = config.fallback
        self.interpreters = Interpreters(spawner, config.cache_dir / "interpreters.json", environ=environ)
        self.cache = EnvironmentCache(config, Uv(spawner, config.cache_dir / "packages", environ=environ))

    @contextlib.asynccontextmanager
    async def prepare(self, spec: RunSpec, log: Path) -> AsyncIterator[Prepared]:
        """See `Executor.prepare`. Makes `<run_dir>/env`, which goes with the run's directory."""
        arguments = program.arguments(spec)
        choice = await self.interpreters.choose(spec.python, fallback=self._fallback)
        wanted = await asyncio.to_thread(
            requirements.normalise,
            spec.requirements,
            spec.extra_requirements,
            workspace=spec.workspace,
            gpus=spec.gpus,
        )
        async with self.cache.lease(choice.interpreter, wanted, log) as lease:
            thin = spec.run_dir / "env"
            await asyncio.to_thread(layout.create_thin, thin, lease.base)
            yield Prepared(
                argv=(str(thin / "bin" / "python"), *arguments),
                env=_activated(spec.env, thin),
                facts={
                    "python": str(choice.interpreter),
                    "python_path": str(choice.interpreter.path),
                    "environment": lease.key,
                    "environment_cached": lease.cached,
                    "environment_build_secs": lease.base.build_secs,
                    "warnings": [
                        *([choice.warning] if choice.warning else []),
                        *wanted.warnings,
                        *lease.base.warnings,
                    ],
                },
            )

    async def make_room(self, bytes_needed: int) -> int:
        """See `Executor.make_room`: environments that no run uses."""
        return await self.cache.evict(bytes_needed)


def _activated(env: Mapping[str, str], thin: Path) -> dict[str, str]:
    active = {name: value for name, value in env.items() if name != "PYTHONHOME"}
    path = env.get("PATH") or os.defpath
    return active | {"PATH": f"{thin / 'bin'}{os.pathsep}{path}", "VIRTUAL_ENV": str(thin)}
