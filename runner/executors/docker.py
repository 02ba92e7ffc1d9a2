"""Runs programs in containers of Docker or Podman (docs/containers.md).

A container bears a name that is known before there is anything of that name. It is made and started by `run`, a client that
stays attached: what the program prints goes through that client into the output, and TERM through it to the program. (Not by
`create` and `start --attach`: since version 28 of Docker's client that one lets go when it gets TERM, and the program's last
words are lost.) How the program ended is asked of the engine. Whatever happens to the client, the container is ended by its name: by the
run's supervisor (`Prepared.cleanup`), at the end of `prepare`, and, when a daemon starts again, by `reap`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import secrets
from typing import TYPE_CHECKING, Any

import structlog

from runner import errors
from runner.executors import builders, docker_args, docker_engine, program
from runner.executors.base import Executor, Prepared
from runner.executors.docker_container import Building
from runner.executors.docker_images import Images, reference
from runner.executors.docker_loaded import Loaded
from runner.resources import probe, usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from runner.config import Containers
    from runner.executors import docker_python
    from runner.executors.base import Image, RunSpec
    from runner.executors.docker_engine import Engine
    from runner.executors.docker_images import EngineImage
    from runner.process.base import ProcessExit
    from runner.process.spawner import Spawner

log = structlog.get_logger(__name__)

#: How long an engine that went away under a run is asked what became of it; one that is restarted is back by then.
VERDICT_SECS = 60.0
_VERDICT_PAUSE_SECS = 1.0
_LAST_LOOKS = 3
#: 128 and KILL, or TERM: nobody of ours has sent them to a run that was not stopped.
_ENDED_BY_SIGNAL = (137, 143)
#: An engine that is away when a daemon starts is asked again so often for what is left, then when the next run needs it.
REAP_TRIES = 10
REAP_PAUSE_SECS = 30.0
#: How clients end when the program is not there.
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
# How engines word that nothing tells them how to give a card: NVIDIA's toolkit, or its list of devices (CDI).
_NO_CARDS = re.compile(
    r"could not select device driver|unresolvable CDI devices|no known GPU vendor", re.IGNORECASE
)


class DockerExecutor(Executor):
    """One instance per daemon. No I/O until it is used."""

    def __init__(
        self,
        config: Containers,
        state_dir: Path,
        spawner: Spawner,
        *,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._config = config
        self._identity = state_dir / "containers"
        self._spawner = spawner
        self._environ = os.environ if environ is None else environ
        self._found: Engine | None = None
        self._live: set[str] = set()  # names of containers that runs of this daemon own
        self._swept = False
        self._sweeping = asyncio.Lock()
        self._loaded = Loaded(state_dir / "container-images")
        self._pythons: dict[tuple[str, str], docker_python.ImagePython] = {}

    # -- what others call

    def check(self, engine: str | None) -> None:  # noqa: ARG002 - there is one kind here
        """See `Executor.check`."""
        self._engine()

    async def vet(self, image: Image) -> None:
        """See `Executor.vet`. Asks the engine."""
        await Images(self._engine(), self._config.pull).vet(image)

    @contextlib.asynccontextmanager
    async def prepare(self, spec: RunSpec, log: Path) -> AsyncIterator[Prepared]:
        """See `Executor.prepare`. What it installs is in `<run_dir>/env`; beside `log` are files for the engine alone."""
        engine = self._engine()
        arguments = spec.args if spec.filename is None else program.arguments(spec)
        if spec.image is not None and spec.image.file is None:
            reference(spec.image.reference)  # refused before anything is asked
        await self._sweep(engine)
        async with contextlib.AsyncExitStack() as held:
            image = await Images(engine, self._config.pull).ready(
                spec, log, lambda name: held.enter_async_context(self._loaded.used(name))
            )
            place = docker_args.Place(
                traits=await engine.traits(),
                is_podman=engine.is_podman,
                network=self._config.network,
                label=await asyncio.to_thread(self._label),
            )
            building = Building(engine, place, spec, image, log, self.named)
            python = None if spec.filename is None else await self._python(building)
            overlay, warnings = await building.overlay(python)
            async with self.named(engine, spec, "run") as name:
                command = await building.command(name, python, arguments, has_overlay=overlay)
                yield Prepared(
                    argv=engine.argv("run", *command),
                    as_daemon=True,
                    env=engine.env,
                    facts=_facts(
                        engine, image, python, (*warnings, *docker_args.unlimited(spec.limits, place))
                    ),
                    # Ended, not removed: how it ended is still to be asked.
                    cleanup=engine.argv("kill", name),
                    verdict=lambda ended: self._verdict(engine, name, command, spec, ended),
                    first=lambda: self._first(engine, name, spec),
                )

    async def tidy(self) -> None:
        """See `Executor.tidy`: of images that came as files. Others are not ours to remove."""
        with contextlib.suppress(errors.NoEngine):
            await self._loaded.tidy(self._engine())

    async def reap(self) -> None:
        """See `Executor.reap`."""
        if not self._identity.exists():  # nothing was ever run in a container
            return
        try:
            engine = self._engine()
        except errors.NoEngine as exc:
            log.warning("containers of an earlier daemon cannot be looked for", why=str(exc))
            return
        for _ in range(REAP_TRIES):
            try:
                await self._sweep(engine)
            except (errors.RunnerError, OSError) as exc:
                log.warning("containers of an earlier daemon cannot be looked for", why=str(exc))
                await asyncio.sleep(REAP_PAUSE_SECS)
            else:
                return

    # -- the engine

    def _engine(self) -> Engine:
        if self._found is None:
            found = docker_engine.find(self._config.engine, self._environ)
            if found is None:
                why = (
                    "containers are off (--container-engine=off)"
                    if self._config.engine == "off"
                    else "there is no docker or podman on the PATH: install one, or name it with --container-engine"
                    if self._config.engine == "auto"
                    else f"--container-engine={self._config.engine} is no program here"
                )
                raise errors.NoEngine(f"it wants a container, and {why}")
            self._found = docker_engine.Engine(found, self._spawner, environ=self._environ)
        return self._found

    def _label(self) -> str:
        """What tells the containers of this state directory from those of other daemons on the same engine. Blocking."""
        try:
            return self._identity.read_text().strip()
        except FileNotFoundError:
            builders.write_private(self._identity, secrets.token_hex(8))
            return self._identity.read_text().strip()

    async def _sweep(self, engine: Engine) -> None:
        """Once: remove containers of this state directory that no run owns. Raises errors.Unreachable, OSError."""
        async with self._sweeping:
            if self._swept:
                return
            label = f"label={docker_args.OWNER_LABEL}={await asyncio.to_thread(self._label)}"
            answer = await engine.ask("ps", "--all", "--filter", label, "--format", "{{.Names}}")
            names = [line.strip() for line in answer.text.splitlines() if line.startswith("studio-runner-")]
            for name in names:
                if name not in self._live:
                    await self._remove(engine, name)
                    log.warning("removed a container that was left behind", container=name)
            self._swept = True

    @contextlib.asynccontextmanager
    async def named(self, engine: Engine, spec: RunSpec, what: str) -> AsyncIterator[str]:
        """A name for a container of that run, which is gone at the end; where that fails, it is when the next run begins."""
        name = f"studio-runner-{spec.run_dir.name}-{what}-{secrets.token_hex(4)}"
        self._live.add(name)
        try:
            yield name
        finally:
            try:
                await self._remove(engine, name)
            except (errors.RunnerError, OSError) as exc:
                log.warning("a container cannot be removed now", container=name, error=str(exc))
                self._swept = False
            except asyncio.CancelledError:
                self._swept = False
                raise
            finally:
                self._live.discard(name)

    async def _remove(self, engine: Engine, name: str) -> None:
        answer = await engine.ask("rm", "--force", "--volumes", name)
        if (
            not answer.ok
            and "no such container" not in answer.text.lower()
            and "no container" not in answer.text
        ):
            log.warning("a container cannot be removed", container=name, error=answer.last)
            self._swept = False

    async def _python(self, building: Building) -> docker_python.ImagePython:
        """The image's interpreter of the version asked for, else whatever it has. Raises errors.UnsupportedRequest."""
        wanted = (building.spec.python or "").partition(".")[0]
        known = building.image.id, wanted
        if known not in self._pythons:
            found = await building.pythons()
            fits = [each for each in found if not wanted or each.version.partition(".")[0] == wanted]
            if not found:
                raise errors.UnsupportedRequest(
                    f"the image {building.image.name} has no Python to run the experiment's program with"
                )
            self._pythons[known] = (fits or found)[0]
        return self._pythons[known]

    # -- where it runs

    async def _first(self, engine: Engine, name: str, spec: RunSpec) -> usage.First | None:
        """See `Prepared.first`."""
        try:
            answer = await engine.ask("container", "inspect", "--format", "{{.State.Pid}}", name)
        except (errors.RunnerError, OSError) as exc:
            log.debug("it is not known where a container runs", container=name, error=str(exc))
            return None
        return await asyncio.to_thread(_first_here, answer.text, spec.env.get("STUDIOML_HOME"))

    # -- how it ended

    async def _verdict(
        self, engine: Engine, name: str, command: tuple[str, ...], spec: RunSpec, ended: ProcessExit
    ) -> ProcessExit:
        """What became of the program, of which `ended` is only the client.

        Raises errors.Unreachable (the engine is gone, and with it the knowledge), errors.ProcessLost (the container is, or
        nobody reads what it prints), errors.EnvironmentFailed (the engine could not start it), errors.NoEngine (it can
        start none with cards).
        """
        if ended.error is not None:
            raise errors.ProcessLost(f"the client of {engine.name} {ended}")
        if engine.is_podman and ended.signal is not None:
            # It has no daemon: its containers are the client's children, and were ended with it.
            raise errors.ProcessLost(f"the client of {engine.name} was {ended}, and the container with it")
        state, was_away = await self._state(engine, name)
        if state is None:
            again = await engine.ask("create", *command)  # it says why, once more
            if again.ok:
                raise errors.ProcessLost("the container of the run is gone")
            raise _not_made(f"{engine.name} cannot make the container: {again.last}")
        code, status, why = (
            int(state.get("ExitCode", 0)),
            str(state.get("Status")),
            str(state.get("Error") or ""),
        )
        if (
            ended.code == docker_engine.ENGINE_FAILED
            and code != docker_engine.ENGINE_FAILED
            and status not in {"created", "configured"}
        ):
            # It began, and its client heard of no end: what killed it, if it is dead, was the engine's own end.
            raise errors.Unreachable(f"{engine.name} went away while the container ran", endpoint=engine.name)
        if status in {"running", "paused", "restarting"}:
            raise errors.ProcessLost(f"{engine.name} has let go of a container that was running")
        if status in {"created", "configured", "initialized"} or (why and not ended.ok):
            if code in {_NOT_FOUND, _NOT_EXECUTABLE}:
                return dataclasses.replace(
                    ended, code=None, signal=None, error=why or "not found in the image"
                )
            why = why or await self._why_not_started(engine, name)
            raise _not_made(f"{engine.name} could not start the container: {why}")
        oom = ""
        if state.get("OOMKilled") and code:
            oom = f"the container was at its limit of {spec.limits.ram_bytes / 1e9:.3g} GB of memory"
        if code in _ENDED_BY_SIGNAL and not oom and (was_away or await self._goes_away(engine)):
            raise errors.Unreachable(
                f"{engine.name} was stopped, and its containers with it", endpoint=engine.name
            )
        # What the client used of the processor and memory says nothing of the program.
        return dataclasses.replace(
            ended, code=code, signal=None, oom=oom, user_secs=0.0, system_secs=0.0, max_rss_bytes=0
        )

    async def _state(self, engine: Engine, name: str) -> tuple[dict[str, Any] | None, bool]:
        """What the engine knows of a container (None: there is none), and whether it had to be waited for.

        Raises errors.Unreachable after a minute.
        """
        loop = asyncio.get_running_loop()
        until, was_away = loop.time() + VERDICT_SECS, False
        while True:
            try:
                answer = await engine.ask("container", "inspect", "--format", "{{json .State}}", name)
            except errors.Unreachable:
                was_away = True
                if loop.time() > until:
                    raise
                await asyncio.sleep(_VERDICT_PAUSE_SECS)
                continue
            return (answer.parsed() or None) if answer.ok else None, was_away

    async def _why_not_started(self, engine: Engine, name: str) -> str:
        """Podman keeps no record of it: it says why, once more. Raises errors.ProcessLost when there is no reason any more."""
        again = await engine.ask("start", name)
        if again.ok:
            raise errors.ProcessLost("the container of the run did not start, and then it did")
        return again.last

    async def _goes_away(self, engine: Engine) -> bool:
        """Whether it is about to end: it ends its containers first, and answers until they have."""
        for _ in range(_LAST_LOOKS):
            await asyncio.sleep(_VERDICT_PAUSE_SECS)
            try:
                await engine.ask("version")
            except errors.Unreachable:
                return True
        return False


def _first_here(said: str, home: str | None) -> usage.First | None:
    """The process of that number, if it is the run's. Blocking.

    Where the engine is on another host, or counts processes otherwise, the number is somebody else's here, or nobody's.
    """
    found = re.search(r"^[1-9][0-9]{0,9}$", said, re.MULTILINE)
    if found is None or home is None:
        return None
    first = usage.first(int(found[0]))
    return first if probe.environment(int(found[0])).get("STUDIOML_HOME") == home else None


def _not_made(text: str) -> errors.RunnerError:
    """Why there was no container. An engine that can give no cards is as good as none: another host may have one that can."""
    return errors.NoEngine(text) if _NO_CARDS.search(text) else errors.EnvironmentFailed(text)


def _facts(
    engine: Engine,
    image: EngineImage,
    python: docker_python.ImagePython | None,
    warnings: tuple[str, ...],
) -> dict[str, object]:
    return {
        "engine": engine.name,
        "image": image.name,
        "image_id": image.id,
        "python": python.version if python else None,
        "warnings": list(warnings),
    }
