"""The Python of an image, and requirement lines installed beside it: into the run's own directory, by the image's own pip."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from typing import TYPE_CHECKING

from runner.executors import imagepip, requirements

if TYPE_CHECKING:
    from pathlib import Path

    from runner import errors
    from runner.executors.base import RunSpec
    from runner.executors.docker_engine import Answer

CANDIDATES = ("python", "python3")
#: What each is asked.
VERSION = ("-c", "import sys; print('Python=%d.%d.%d' % sys.version_info[:3])")
_SAID = re.compile(r"^Python=(\d+\.\d+\.\d+)\s*$", re.MULTILINE)
# In a virtual environment pip installs for no user; there the packages go to a directory of their own.
_INSTALL = (
    "import os, sys; own = getattr(sys, 'base_prefix', sys.prefix) == sys.prefix; "
    "os.execv(sys.executable, [sys.executable, '-m', 'pip', 'install'] + "
    "(['--user'] if own else ['--target', sys.argv[1]]) + sys.argv[2:])"
)
_NO_PIP = re.compile(r"No module named '?pip'?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePython:
    """An interpreter of an image."""

    program: str  #: as it is called there
    version: str  #: "3.11.7"


def version_of(answer: Answer) -> str | None:
    """What a candidate said to `VERSION`; None: it is no Python."""
    found = _SAID.search(answer.text) if answer.ok else None
    return found[1] if found else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlay:
    """What is to be installed beside an image's packages, for one run."""

    wanted: requirements.Requirements
    directory: Path  #: in the run's own

    @classmethod
    async def of(cls, spec: RunSpec) -> Overlay:
        """From the lines of a run. Raises errors.UnsupportedRequest for a line that nobody can make sense of."""
        wanted = await asyncio.to_thread(
            requirements.normalise,
            spec.requirements,
            spec.extra_requirements,
            workspace=spec.workspace,
            gpus=spec.gpus,
        )
        return cls(wanted=wanted, directory=spec.run_dir / "env")

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.wanted.lines)

    def arguments(self, *, with_dependencies: bool = True) -> tuple[str, ...]:
        """What follows `python`, inside."""
        return (
            "-c",
            _INSTALL,
            str(self.directory / "site"),
            "--disable-pip-version-check",
            "--no-input",
            "--no-cache-dir",
            "--progress-bar=off",
            *(["--pre"] if self.wanted.prereleases else []),
            *([] if with_dependencies else ["--no-deps"]),
            "--requirement",
            str(self.directory / "requirements.txt"),
        )

    def write(self) -> None:
        """Write the lines down, for pip. Blocking; raises OSError."""
        imagepip.write(self.directory / "requirements.txt", self.wanted)

    def contradicts_itself(self, answer: Answer) -> bool:
        """It failed, and does not with the lines as they stand."""
        return not answer.ok and imagepip.contradicts_itself(self.wanted, answer.text)

    def failure(self, answer: Answer, *, network: str) -> errors.RunnerError:
        """Why it could not be installed."""
        if _NO_PIP.search(answer.text):
            return imagepip.missing()
        return imagepip.failure(answer.ended, answer.text, self.wanted, has_network=network != "none")
