"""uv: installs requirement lines into an environment, and tells why it could not."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.executors import builders
from runner.process.base import Command

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from runner.executors.requirements import Requirements
    from runner.process.base import ProcessExit
    from runner.process.spawner import Spawner

log = structlog.get_logger(__name__)

CLEAN_TIMEOUT_SECS = 600.0
#: What uv and the builds of source archives get of the runner's environment. No credentials but the index's own.
PASSED = re.compile(
    r"HOME|PATH|LANG|LC_[A-Z]+|TMPDIR|TZ|USER|LOGNAME|XDG_\w+|(?i:https?|all|no)_PROXY|(?i:https?|all|no)_proxy"
    r"|SSL_CERT_(FILE|DIR)|SSL_CLIENT_CERT|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|GIT_SSL_CAINFO|NETRC"
    r"|CC|CXX|CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS|MAX_JOBS|PKG_CONFIG_PATH|CUDA_HOME|CUDA_PATH|LD_LIBRARY_PATH"
    r"|UV_(?!CACHE_DIR$|PYTHON|PUBLISH|PROJECT|VENV|SYSTEM|BREAK|NO_CACHE)\w+"
)
#: pip's settings of the machine, where uv has none of its own
FROM_PIP = {
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
    "PIP_CERT": "SSL_CERT_FILE",
    "PIP_NO_INDEX": "UV_NO_INDEX",
}
# How uv words that a server could not be reached, or answered 5xx.
_UNREACHABLE = re.compile(
    r"error sending request|dns error|tcp connect error|connection refused|connection reset|timed out|"
    r"Connection closed|network is unreachable|Could not resolve host|Failed to connect to|"
    r"server error \(5\d\d|status code 5\d\d|failed after \d+ retr",
    re.IGNORECASE,
)
_CONFLICT = re.compile(r"No solution found when resolving")
# What it says before anything goes wrong: people are shown the first line.
_PREAMBLE = re.compile(r"^Using Python .* environment at.*\n", re.MULTILINE)


class Uv:
    """The uv program, with a package cache of its own. Safe to use from many tasks and daemons at once."""

    def __init__(self, spawner: Spawner, packages: Path, *, environ: Mapping[str, str]) -> None:
        self._spawner = spawner
        self._env = _environment(environ) | {"UV_CACHE_DIR": str(packages)}
        self.packages = packages

    async def install(
        self, python: Path, wanted: Requirements, *, seeds: Sequence[str], scratch: Path, log_file: Path
    ) -> tuple[str, ...]:
        """Installs `wanted` and `seeds` into the environment of `python`; gives warnings.

        `scratch` is a private directory; what uv prints is appended to `log_file`. Cancelling it ends uv. Raises
        `errors.Unreachable` when the operator's index does not answer, else `errors.EnvironmentFailed`. A server
        that the lines themselves name counts as the latter: a message must not stop the intake of others.
        """
        file = scratch / "requirements.txt"
        texts = [*wanted.options, *(line.text for line in wanted.lines), *seeds]
        await asyncio.to_thread(builders.write_private, file, "\n".join(texts) + "\n")
        options = ["--prerelease=allow"] if wanted.prereleases else []
        argv = ("pip", "install", "--python", str(python), "--requirement", str(file), *options)
        env = dict(self._env)
        if any(option.startswith("--index-url") for option in wanted.options):
            for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"):  # else uv takes them first
                env.pop(name, None)
        if any(option.startswith("--extra-index-url") for option in wanted.options):
            env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # what pip does with such a line
        if wanted.pinned and await self._from_cache(argv, env, scratch, log_file):
            return ()
        ended, said = await self._run(argv, env, scratch, log_file)
        if ended.ok:
            return ()
        if wanted.pinned and _CONFLICT.search(said):
            # A `pip freeze` of an environment whose pins contradict each other, but which did work.
            ended, said = await self._run((*argv, "--no-deps"), env, scratch, log_file)
            if ended.ok:
                return ("the pinned requirements contradict each other; they were installed as they stand",)
        raise _failure(ended, said, wanted)

    async def _from_cache(
        self, argv: Sequence[str], env: Mapping[str, str], scratch: Path, log_file: Path
    ) -> bool:
        """Tries without asking the index again what is the newest: of pins it makes no difference but in time."""
        output = scratch / "offline.log"
        ended, _ = await self._run((*argv, "--offline"), env, scratch, output)
        if ended.ok:
            await asyncio.to_thread(_append, output, log_file)
        return ended.ok

    async def clean(self, scratch: Path) -> None:
        """Empties the package cache. Environments built from it are not touched; the next builds download again."""
        ended, said = await self._run(("cache", "clean"), self._env, scratch, scratch / "uv-cache-clean.log")
        if not ended.ok:
            log.warning("package cache not cleaned", exit=str(ended), output=builders.last_lines(said))

    async def _run(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, output: Path
    ) -> tuple[ProcessExit, str]:
        from uv import find_uv_bin

        command = Command(
            argv=(find_uv_bin(), "--no-progress", "--color", "never", *argv), env=env, cwd=cwd, output=output
        )
        limit = CLEAN_TIMEOUT_SECS if argv[0] == "cache" else builders.INSTALL_SECS
        return await builders.run(self._spawner, command, timeout_secs=limit)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    env = {name: value for name, value in environ.items() if PASSED.fullmatch(name)}
    for ours, theirs in FROM_PIP.items():
        if ours in environ:
            separator = "," if theirs == "UV_FIND_LINKS" else " "  # pip's lists are separated by blanks
            env.setdefault(theirs, separator.join(environ[ours].split()))
    if environ.get("PIP_EXTRA_INDEX_URL"):
        env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    env |= {"UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1", "GIT_TERMINAL_PROMPT": "0"}
    return env


def _failure(ended: ProcessExit, said: str, wanted: Requirements) -> errors.RunnerError:
    tail = builders.last_lines(_PREAMBLE.sub("", said))
    named = sorted(host for host in wanted.hosts if host in said)
    if _UNREACHABLE.search(said) and not named:
        return errors.Unreachable(f"the package index does not answer: {tail}", endpoint="package index")
    how = f"stopped after {builders.INSTALL_SECS:.0f} s" if ended.stopped else str(ended)
    return errors.EnvironmentFailed(f"the Python environment cannot be built (uv: {how}): {tail}")


def _append(source: Path, target: Path) -> None:
    with target.open("ab") as file:
        file.write(source.read_bytes())
