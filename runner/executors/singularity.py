"""Runs programs in Singularity images, with Apptainer or Singularity (INTEROP.md 3.8)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.executors import builders, engines, imagepip, imageref, program, requirements
from runner.executors.base import Executor, Prepared
from runner.executors.engines import Builder, Engine
from runner.executors.imagecache import ImageCache
from runner.executors.inside import NO_PIP, NO_PYTHON, RUNSCRIPT, Inside
from runner.process.base import Command

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from pathlib import Path

    from runner.config import Images
    from runner.executors.base import Image, RunSpec
    from runner.executors.imagecache import Lease
    from runner.process.base import ProcessExit
    from runner.process.spawner import Spawner

log = structlog.get_logger(__name__)


class SingularityExecutor(Executor):
    """Images of `_singularity` artifacts. One instance per daemon; `spawner` starts every child."""

    def __init__(self, config: Images, spawner: Spawner, *, environ: Mapping[str, str] | None = None) -> None:
        self._environ = os.environ if environ is None else environ
        self._allowed = imageref.AllowList(config.allowed)
        self._spawner = spawner
        self._builder = Builder(spawner, self._environ)
        self._versions: dict[str, str] = {}
        self.cache = ImageCache(config.cache_dir, config.cache_bytes, self._fetch)

    @contextlib.asynccontextmanager
    async def prepare(self, spec: RunSpec, log: Path) -> AsyncIterator[Prepared]:
        """See `Executor.prepare`. Makes `<run_dir>/container` and `<run_dir>/env`, which go with the run's directory."""
        assert spec.image is not None
        command = (
            (RUNSCRIPT, *_plain(spec.args)) if spec.filename is None else ("python", *program.arguments(spec))
        )
        engine = self._engine()
        async with self._image(spec.image, log) as image:
            container = _Container(engine, image.path, spec, hidden=log.parent)
            await asyncio.to_thread(container.create)
            env = engines.only(self._environ) | engines.scratch_variables(container.folder)
            warnings = await self._install(container, env, log)
            yield Prepared(
                argv=container.argv(("/bin/sh", str(container.inside.program), *command)),
                env=env,
                as_daemon=True,
                facts={
                    "image": spec.image.reference or image.path.name,
                    "image_cached": image.cached,
                    "engine": await self._version(engine, container.folder),
                    "warnings": [
                        *([image.warning] if image.warning else []),
                        *warnings,
                        *(
                            f"the variable {name!r} cannot be set in a container"
                            for name in container.inside.left_out
                        ),
                    ],
                },
                verdict=_verdict(engine, container.inside),
            )

    def check(self, engine: str | None) -> None:  # noqa: ARG002 - there is only one kind of it here
        """Raises errors.NoEngine when this host has no engine. Cheap."""
        self._engine()

    async def vet(self, image: Image) -> None:
        """See `Executor.vet`. No I/O."""
        self._engine()
        self._trusted(image)

    async def make_room(self, bytes_needed: int) -> int:
        """See `Executor.make_room`: images that no run uses."""
        return await self.cache.evict(bytes_needed)

    async def reap(self) -> None:
        """Remove what daemons that are gone left half fetched; to be called once, at the start. Never raises but for cancellation."""
        try:
            await self.cache.sweep()
        except OSError as exc:
            log.warning("what was fetched half is not removed", error=str(exc))

    def _engine(self) -> Engine:
        engine = Engine.find(self._environ)
        if engine is None:
            raise errors.NoEngine(
                "the message wants a Singularity image, and this host has no apptainer or singularity"
            )
        return engine

    @contextlib.asynccontextmanager
    async def _image(self, image: Image, log: Path) -> AsyncIterator[_Image]:
        reference = self._trusted(image)
        if reference is not None:
            async with self.cache.lease(reference, log) as lease:
                yield _Image.of(lease)
            return
        assert image.file is not None
        if not await asyncio.to_thread(engines.is_image, image.file):
            raise errors.UnsupportedRequest(f"{image.file.name} is no SIF or squashfs image")
        yield _Image(path=image.file, cached=False)

    def _trusted(self, image: Image) -> imageref.Reference | None:
        """What it refers to; None: it is a file. Raises errors.UnsupportedRequest unless the operator allows it."""
        if image.file is not None:
            self._allowed.check_file(image.file.name)
            return None
        reference = imageref.parse(image.reference)
        self._allowed.check(reference)
        return reference

    async def _fetch(self, reference: imageref.Reference, target: Path, log_file: Path) -> None:
        await self._builder.fetch(self._engine(), reference, target, log_file)

    async def _version(self, engine: Engine, folder: Path) -> str:
        if engine.path not in self._versions:
            self._versions[engine.path] = await self._builder.version(engine, folder)
        return self._versions[engine.path]

    async def _install(self, container: _Container, env: Mapping[str, str], log: Path) -> tuple[str, ...]:
        """Installs the run's packages with the image's own pip into the run's own directory; gives warnings."""
        spec = container.spec
        if spec.filename is None or not (spec.requirements or spec.extra_requirements):
            return ()
        wanted = await asyncio.to_thread(
            requirements.normalise,
            spec.requirements,
            spec.extra_requirements,
            workspace=spec.workspace,
            gpus=bool(spec.gpus or spec.limits.gpus),
        )
        if not wanted.lines:
            return wanted.warnings
        await asyncio.to_thread(imagepip.write, container.requirements, wanted)
        options = ("--pre",) if wanted.prereleases else ()
        ended, said = await self._pip(container, options, env, log)
        warnings = wanted.warnings
        if not ended.ok and imagepip.contradicts_itself(wanted, said):
            ended, said = await self._pip(container, (*options, "--no-deps"), env, log)
            warnings = (*warnings, imagepip.CONTRADICTION)
        if ended.code == NO_PYTHON:
            raise errors.UnsupportedRequest(
                "the image has no Python on its PATH, and the message wants packages"
            )
        if ended.code == NO_PIP:
            raise imagepip.missing()
        if not ended.ok:
            raise imagepip.failure(ended, said, wanted)
        return warnings

    async def _pip(
        self, container: _Container, options: tuple[str, ...], env: Mapping[str, str], log: Path
    ) -> tuple[ProcessExit, str]:
        words = (
            "python",
            "-m",
            "pip",
            "install",
            "--no-cache-dir",
            *options,
            "-r",
            str(container.requirements),
        )
        command = Command(
            argv=container.argv(("/bin/sh", str(container.inside.installer), *words)),
            env=env,
            cwd=container.spec.workspace,
            output=log,
        )
        return await builders.run(self._spawner, command, timeout_secs=builders.INSTALL_SECS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Image:
    path: Path
    cached: bool
    warning: str = ""

    @classmethod
    def of(cls, lease: Lease) -> _Image:
        return cls(path=lease.path, cached=lease.cached, warning=lease.warning)


class _Container:
    """What one run needs around its image."""

    def __init__(self, engine: Engine, image: Path, spec: RunSpec, *, hidden: Path) -> None:
        """`hidden`: the runner's own directory of the run, with the message in it."""
        self.spec = spec
        self.folder = spec.run_dir / "container"
        self.requirements = self.folder / "requirements.txt"
        self.overlay = spec.run_dir / "env"
        self.inside = Inside(self.folder, self.overlay, spec.env)
        self._engine = engine
        self._image = image
        self._hidden = hidden

    def create(self) -> None:
        """Makes its directories and scripts. Blocks."""
        self.folder.mkdir(mode=0o700)
        self.overlay.mkdir(mode=0o700, exist_ok=True)
        for name in ("work", "empty"):
            (self.folder / name).mkdir(mode=0o700)
        self.inside.write()

    def argv(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """The engine's command line for `words` in the image."""
        return self._engine.inside(
            self._image,
            words,
            run_dir=self.spec.run_dir,
            workspace=self.spec.workspace,
            scratch=self.folder / "work",
            empty=self.folder / "empty",
            hidden=self._hidden,
            gpus=bool(self.spec.gpus or self.spec.limits.gpus),
        )


def _plain(args: tuple[str, ...]) -> tuple[str, ...]:
    if any("\0" in word for word in args):
        raise errors.UnsupportedRequest("the command line of the experiment holds a NUL character")
    return args


def _verdict(engine: Engine, inside: Inside) -> Callable[[ProcessExit], Awaitable[ProcessExit]]:
    async def verdict(ended: ProcessExit) -> ProcessExit:
        """Tells the engine's failures from the program's, and the program's signals, which come as exit codes."""
        if ended.code is None or ended.ok:
            return ended
        if not inside.started.exists():
            if ended.code == NO_PYTHON:
                raise errors.UnsupportedRequest("the image has no Python on its PATH")
            raise errors.EnvironmentFailed(
                f"{engine.name} could not start the container ({ended}); the end of the output says why"
            )
        number = ended.code - 128
        if number in signal.valid_signals():
            return dataclasses.replace(ended, code=None, signal=number)
        return ended

    return verdict
