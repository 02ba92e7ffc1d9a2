"""The containers of one run: those that make it ready, and its own."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

from runner import errors
from runner.executors import builders, docker_args, docker_python, imagepip

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from runner.executors.base import RunSpec
    from runner.executors.docker_engine import Answer, Engine
    from runner.executors.docker_images import EngineImage

#: For the interpreter of an image to start, from a slow disk.
PYTHON_SECS = 120.0


@dataclasses.dataclass(frozen=True)
class Building:
    """One run on its way to its container. Every container that it has made bears a name of `named`, and goes with it."""

    engine: Engine
    place: docker_args.Place
    spec: RunSpec
    image: EngineImage
    log: Path  #: what builders print; the directory that it is in is the runner's own
    named: Callable[[Engine, RunSpec, str], AbstractAsyncContextManager[str]]

    @property
    def directory(self) -> Path:
        """The run's own packages, and files for the inside."""
        return self.spec.run_dir / "env"

    async def pythons(self) -> list[docker_python.ImagePython]:
        """What the image has of them. Raises errors.EnvironmentFailed when one does not answer, errors.Unreachable."""
        found = []
        for candidate in docker_python.CANDIDATES:
            answer = await self._run(
                "python", candidate, docker_python.VERSION, has_overlay=False, timeout_secs=PYTHON_SECS
            )
            if answer.ended.stopped:
                raise errors.EnvironmentFailed(
                    f"{candidate} of the image {self.image.name} has not told its version in {PYTHON_SECS:.0f} s"
                )
            if (version := docker_python.version_of(answer)) is not None:
                found.append(docker_python.ImagePython(program=candidate, version=version))
        return found

    async def overlay(self, python: docker_python.ImagePython | None) -> tuple[bool, tuple[str, ...]]:
        """Install the requirement lines beside the image's own packages: whether there were any, and warnings.

        Raises errors.UnsupportedRequest, errors.EnvironmentFailed, errors.Unreachable.
        """
        overlay = await docker_python.Overlay.of(self.spec)
        if not overlay:
            return False, overlay.wanted.warnings
        if python is None:
            return False, ("requirement lines are not installed: the image's own program is run",)
        await asyncio.to_thread(self.directory.mkdir, mode=0o700, exist_ok=True)
        await asyncio.to_thread(overlay.write)
        answer = await self._pip(python, overlay.arguments())
        warnings = overlay.wanted.warnings
        if overlay.contradicts_itself(answer):
            answer = await self._pip(python, overlay.arguments(with_dependencies=False))
            warnings = (*warnings, imagepip.CONTRADICTION)
        if not answer.ok:
            raise overlay.failure(answer, network=self.place.network)
        return True, warnings

    async def _pip(self, python: docker_python.ImagePython, arguments: tuple[str, ...]) -> Answer:
        return await self._run(
            "pip",
            python.program,
            arguments,
            has_overlay=True,
            timeout_secs=builders.INSTALL_SECS,
            output=self.log,
        )

    async def command(
        self,
        name: str,
        python: docker_python.ImagePython | None,
        arguments: tuple[str, ...],
        *,
        has_overlay: bool,
    ) -> tuple[str, ...]:
        """What follows `run` or `create` for the container of the run. Raises errors.UnsupportedRequest, OSError."""
        program = python.program if python else None
        if program is None and not (self.image.has_program or arguments):
            raise errors.UnsupportedRequest(
                f"there is nothing to run: experiment.filename is empty, and the image {self.image.name} has no program of its own"
            )
        flags, boot = await self._flags(name, program, has_overlay=has_overlay)
        if program is None:
            return (*flags, self.image.id, *arguments)
        return (*flags, *self._program(*boot, program, *arguments))

    async def _run(
        self,
        what: str,
        python: str,
        arguments: tuple[str, ...],
        *,
        has_overlay: bool,
        timeout_secs: float,
        output: Path | None = None,
    ) -> Answer:
        """A short life in the same surroundings as the run's; one that is too long is ended, and no fault of the engine's."""
        async with self.named(self.engine, self.spec, what) as name:
            flags, boot = await self._flags(name, python, has_overlay=has_overlay)
            command = self._program(*boot, python, *arguments)
            return await self.engine.run(name, *flags, *command, timeout_secs=timeout_secs, output=output)

    def _program(self, program: str, *arguments: str) -> tuple[str, ...]:
        """A program of the image in place of the image's own."""
        return (f"--entrypoint={program}", self.image.id, *arguments)

    async def _flags(
        self, name: str, python: str | None, *, has_overlay: bool
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Those of `create`, and what goes before `python ...`."""
        env = docker_args.environment(self.spec, self.directory, self.image.path, has_overlay=has_overlay)
        private = self.log.parent
        for directory in (self.directory, *docker_args.mount_points(self.spec.run_dir)):
            await asyncio.to_thread(directory.mkdir, mode=0o700, parents=True, exist_ok=True)
        variables = await asyncio.to_thread(docker_args.write_variables, env, private, self.directory, python)
        flags = docker_args.flags(
            self.place, self.spec, name=name, env_file=variables.env_file, private=private
        )
        return flags, variables.boot
