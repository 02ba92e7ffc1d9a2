"""What every executor does: turn what a request wants to run into a command, with everything that command needs in place."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from runner.process.base import ProcessExit
    from runner.resources.usage import First


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image:
    """The container image that a run asks for: a reference, or a file that was staged as an artifact."""

    engine: Literal["docker", "singularity"]
    reference: str = (
        ""  #: as the message has it: "python:3.11", "docker://python:3.11", "dockerhub://tensorflow/..."
    )
    file: Path | None = (
        None  #: the image itself (SIF, simg, an archive that `docker load` takes); then no reference
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What of the machine the run may use; 0 is no limit."""

    cpus: int = 0
    ram_bytes: int = 0
    hdd_bytes: int = 0
    gpus: tuple[str, ...] = ()  #: UUIDs of the cards granted


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything an executor may know of a run. Made by `experiment.lifecycle`; executors never see a Request."""

    run_dir: (
        Path  #: this run's own directory, private, removed after the run; executors may use `<run_dir>/env`
    )
    workspace: Path  #: the working directory of the program; staged before `prepare` is called
    #: The script, relative to the workspace; "-m" runs the module named by the first argument; None: the image's own program.
    filename: str | None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)  #: the workload's complete environment
    python: str | None = None  #: "3", "3.11", "3.11.7" or None: any
    requirements: tuple[str, ...] = ()  #: `pythonenv` lines, as the message has them
    extra_requirements: tuple[str, ...] = ()  #: `config.pip` lines, installed after the former
    gpus: bool = False  #: whether cards were granted (tensorflow becomes tensorflow-gpu, INTEROP.md 3.10)
    image: Image | None = None  #: None: on the host
    limits: Limits = Limits()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is ready to start."""

    argv: tuple[str, ...]
    env: Mapping[str, str]  #: `RunSpec.env` with what the executor adds (PATH, VIRTUAL_ENV)
    facts: Mapping[str, object] = dataclasses.field(
        default_factory=dict
    )  #: for the metadata document: interpreter, cache hit, ...
    #: Run by the run's supervisor when the program has ended, also when the daemon is gone: it ends what the program has
    #: started outside of its own processes (a container). An argument list; empty: there is nothing of that kind.
    cleanup: tuple[str, ...] = ()
    #: The program is the client of an engine, which confines what it runs: it needs the daemon's user, also with --run-as.
    as_daemon: bool = False
    #: Where the program is only a client of what really ran: what became of that, asked once, when the program has ended.
    verdict: Callable[[ProcessExit], Awaitable[ProcessExit]] | None = None
    #: ... and where it really runs: its first process, if that is one of this host; None: not yet, or elsewhere. To be asked
    #: while the program runs, seldom: it costs a process. Limited in time; never raises but for cancellation.
    first: Callable[[], Awaitable[First | None]] | None = None


class Executor(abc.ABC):
    """One way to run workloads."""

    @abc.abstractmethod
    def prepare(self, spec: RunSpec, log: Path) -> AbstractAsyncContextManager[Prepared]:
        """Make ready, for as long as the context is open; on exit what was held for the run is released.

        What a builder prints is appended to `log`. Cancelling it ends what it has started. Raises
        `errors.UnsupportedRequest` (no such interpreter), `errors.EnvironmentFailed` (cannot be built),
        `errors.Unreachable` (the package index does not answer), `errors.NoEngine` (as `check`).
        """

    def check(self, engine: str | None) -> None:  # noqa: B027 - an executor of one kind has nothing to choose
        """Raises `errors.NoEngine` when this host runs nothing in images of that engine (`Image.engine`). Cheap; None: on the host."""

    async def vet(self, image: Image) -> None:  # noqa: B027 - an executor of one kind has no images
        """Refuse an image that `prepare` would refuse, as far as that can be told before inputs are fetched.

        Of `image.file`, which need not be there yet, only the name counts. Raises `errors.UnsupportedRequest` (not trusted, or
        no image's name), `errors.NoEngine` (not here), `errors.Unreachable` (the engine is away); else as `prepare` would.
        """

    async def reap(self) -> None:  # noqa: B027 - most leave nothing
        """Remove what runs of an earlier daemon left outside of their processes. Called once, beside the first runs.

        Limited in time; never raises but for cancellation: what cannot be removed is told in the log.
        """

    async def tidy(self) -> None:  # noqa: B027 - most keep within a quota of their own
        """Remove what is kept for later runs and none has used for long. Called now and then, beside runs; delays none.

        Limited in time; never raises but for cancellation.
        """

    async def make_room(self, bytes_needed: int) -> int:
        """The disk is low: remove so many bytes of what is kept for later runs and nobody uses; how many were."""
        del bytes_needed
        return 0
