"""The pip of an image: the file that tells it what to install, and what its complaints mean. For all engines."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from runner import errors
from runner.executors import builders

if TYPE_CHECKING:
    from pathlib import Path

    from runner.executors.requirements import Requirements
    from runner.process.base import ProcessExit

#: For the document, where `--no-deps` had to be given.
CONTRADICTION = "the pinned requirements contradict each other; they were installed as they stand"
_CONFLICT = re.compile(r"ResolutionImpossible|conflicting dependencies")
# How pip words that its index could not be reached, or answered 5xx.
_UNREACHABLE = re.compile(
    r"NewConnectionError|Failed to establish a new connection|Max retries exceeded|Connection (refused|reset|broken)|"
    r"ConnectTimeout|ReadTimeoutError|Read timed out|Temporary failure in name resolution|Network is unreachable|ProxyError|"
    r"HTTP error 5\d\d|\b5\d\d Server Error|too many 5\d\d error responses"
)


def write(file: Path, wanted: Requirements) -> None:
    """Write the lines down, for this user alone: options of them may hold credentials. Blocking; raises OSError."""
    # pip reads option lines as a shell would.
    options = (option.split(" ", 1) for option in wanted.options)
    lines = [f"{name} {shlex.quote(value)}" for name, value in options]
    builders.write_private(file, "\n".join((*lines, *(line.text for line in wanted.lines))) + "\n")


def contradicts_itself(wanted: Requirements, said: str) -> bool:
    """A `pip freeze` of packages that contradict each other, and yet did work together: taken as it stands."""
    return wanted.pinned and _CONFLICT.search(said) is not None


def missing() -> errors.UnsupportedRequest:
    """There is none."""
    return errors.UnsupportedRequest(
        "the image has no pip, and the message wants packages: put them into the image, or send no pythonenv"
    )


def failure(
    ended: ProcessExit, said: str, wanted: Requirements, *, has_network: bool = True
) -> errors.RunnerError:
    """Why they could not be installed. A server that the message names is its own fault, and no network the operator's will."""
    tail = builders.last_lines(said)
    named = any(host in said for host in wanted.hosts)
    if _UNREACHABLE.search(said) and not named and has_network:
        return errors.Unreachable(f"the package index does not answer: {tail}", endpoint="package index")
    how = f"stopped after {builders.INSTALL_SECS:.0f} s" if ended.stopped else str(ended)
    return errors.EnvironmentFailed(f"the packages cannot be installed in the container (pip: {how}): {tail}")
