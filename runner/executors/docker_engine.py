"""The command line of a container engine, docker or podman: an argument list in, what it said out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import errors
from runner.executors import builders
from runner.process.base import Command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runner.process.base import ProcessExit
    from runner.process.spawner import Spawner

#: How clients end for want of the engine.
ENGINE_FAILED = 125
#: For what an engine does at once unless it is in trouble.
QUICK_SECS = 120.0
#: What the engine's client gets of the runner's environment: where its daemon is, and the operator's registries. Nothing of
#: a message may be in there: the client runs on the host.
_PASSED = re.compile(
    r"HOME|PATH|TMPDIR|USER|XDG_\w+|DOCKER_\w+|CONTAINERS?_\w+|REGISTRY_AUTH_FILE|SSL_CERT_(FILE|DIR)|"
    r"(HTTPS?|NO|ALL)_PROXY|(https?|no|all)_proxy"
)
#: And what `docker info` calls it.
_CAN_LIMIT = {"memory": "MemoryLimit", "swap": "SwapLimit", "cpus": "CpuCfsQuota", "pids": "PidsLimit"}
_AWAY = re.compile(
    r"Cannot connect to the Docker daemon|error during connect|Is the docker daemon running|"
    r"permission denied while trying to connect|Cannot connect to Podman|unable to connect to Podman|"
    r"connect: connection refused.*docker\.sock|failed to connect to the docker API",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a command, and what it said."""

    ended: ProcessExit
    text: str  #: stdout and stderr as they came, the last of them

    @property
    def ok(self) -> bool:
        """It did what it was asked for."""
        return self.ended.ok

    @property
    def last(self) -> str:
        """The last lines, for a person."""
        return builders.last_lines(self.text) or str(self.ended)

    def parsed(self) -> dict[str, Any]:
        """The JSON object it said, among warnings; of a list, which is what podman makes of some, the first. Empty: none."""
        for start in re.finditer(r"^[\[{]", self.text, re.MULTILINE):
            with contextlib.suppress(ValueError):
                value, _ = json.JSONDecoder().raw_decode(self.text, start.start())
                value = value[0] if isinstance(value, list) and value else value
                if isinstance(value, dict):
                    return value
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What differs from engine to engine."""

    #: The flags by which what a container writes belongs to this process's user. In an engine without root, root inside is
    #: the engine's user, and this runner must be that one.
    owner: tuple[str, ...]
    #: Of "memory", "swap", "cpus", "pids": what its kernel does not let it limit. Asked for, it would say so in the output.
    cannot_limit: frozenset[str] = frozenset()


class Engine:
    """One engine's client. Safe to use from many tasks at once."""

    def __init__(self, program: Path, spawner: Spawner, *, environ: Mapping[str, str]) -> None:
        self.program = program
        self.env = {name: value for name, value in environ.items() if _PASSED.fullmatch(name)}
        self._spawner = spawner
        self._traits: Traits | None = None

    @property
    def name(self) -> str:
        """For texts: "docker"."""
        return self.program.name

    @property
    def is_podman(self) -> bool:
        """Its few flags of its own apply."""
        return "podman" in self.program.name

    async def ask(
        self, *arguments: str, timeout_secs: float = QUICK_SECS, output: Path | None = None
    ) -> Answer:
        """One command, to its end; `output` gets what it says as it says it.

        Cancelling it ends it. Raises `errors.Unreachable` when the engine's daemon does not answer, or not in time.
        """
        answer = await self._answer(arguments, timeout_secs, output)
        self._check(answer)
        if answer.ended.stopped:
            raise errors.Unreachable(
                f"{self.name} {arguments[0]} has not ended in {timeout_secs:.0f} s", endpoint=self.name
            )
        return answer

    async def run(
        self, container: str, *arguments: str, timeout_secs: float, output: Path | None = None
    ) -> Answer:
        """A container to its end, or to that of its time (`Answer.ended.stopped`); it ends with this daemon, too.

        Cancelling it ends its client; the container is the caller's to remove. Raises `errors.Unreachable`: the engine is away.
        """
        # What does not end when it is told to outlives its client.
        cleanup = self.argv("kill", container)
        answer = await self._answer(("run", *arguments), timeout_secs, output, cleanup)
        if answer.ended.code == ENGINE_FAILED:  # else it is the program that speaks
            self._check(answer)
        return answer

    async def _answer(
        self,
        arguments: tuple[str, ...],
        timeout_secs: float,
        output: Path | None,
        cleanup: tuple[str, ...] = (),
    ) -> Answer:
        with tempfile.TemporaryDirectory(prefix="studio-runner-engine-") as scratch:
            command = Command(
                argv=self.argv(*arguments),
                env=self.env,
                cwd=Path("/"),
                output=output or Path(scratch, "said"),
                cleanup=cleanup,
            )
            ended, text = await builders.run(self._spawner, command, timeout_secs=timeout_secs)
        return Answer(ended=ended, text=text)

    def _check(self, answer: Answer) -> None:
        if not answer.ok and _AWAY.search(answer.text):
            raise errors.Unreachable(f"{self.name} does not answer: {answer.last}", endpoint=self.name)

    def argv(self, *arguments: str) -> tuple[str, ...]:
        """A command of it."""
        return (str(self.program), *arguments)

    async def traits(self) -> Traits:
        """What kind of engine it is; asked once. Raises as `ask`."""
        if self._traits is None:
            user = f"--user={os.geteuid()}:{os.getegid()}"
            if self.is_podman:
                self._traits = Traits(owner=(user,) if os.geteuid() == 0 else ("--userns=keep-id", user))
            else:
                self._traits = _traits(
                    (await self.ask("info", "--format", "{{json .}}")).parsed() or {}, user
                )
        return self._traits


def _traits(info: dict[str, Any], user: str) -> Traits:
    options = [str(option) for option in info.get("SecurityOptions") or ()]
    owner: tuple[str, ...] = (user,)
    if any("name=rootless" in option for option in options):
        owner = ("--user=0:0",)
    elif any("name=userns" in option for option in options):
        owner = ("--userns=host", user)
    can = {ours: info.get(theirs) is not False for ours, theirs in _CAN_LIMIT.items()}
    return Traits(owner=owner, cannot_limit=frozenset(what for what, does in can.items() if not does))


def find(wanted: str, environ: Mapping[str, str]) -> Path | None:
    """The program that `--container-engine` asks for; None when there is none, or none is wanted."""
    path = environ.get("PATH")
    names = {"auto": ("docker", "podman"), "off": ()}.get(wanted, (wanted,))
    return next((Path(found) for name in names if (found := shutil.which(name, path=path))), None)
