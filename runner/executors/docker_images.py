"""Images: from what a message says to one that the engine has."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from runner import errors
from runner.executors import docker_archive

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from runner.executors.base import Image, RunSpec
    from runner.executors.docker_engine import Answer, Engine

log = structlog.get_logger(__name__)

#: For a large image over a slow line.
FETCH_SECS = 3600.0
_MAX_CHARS = 400
_SCHEME = re.compile(r"(?:docker|dockerhub)://", re.IGNORECASE)
# The grammar of the distribution project: [host[:port]/]path[:tag][@digest]. Nothing that begins with "-" is in it.
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*(?::[0-9]{1,5})?)"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:{_HOST}/)?{_COMPONENT}(?:/{_COMPONENT})*(?::\w[\w.-]{{0,127}})?(?:@[A-Za-z][A-Za-z0-9]*:[0-9a-fA-F]{{32,128}})?",
    re.ASCII,
)
# How engines word that a registry cannot be reached, is too busy, or fails.
_UNREACHABLE = re.compile(
    r"dial tcp|i/o timeout|no such host|connection refused|connection reset|TLS handshake timeout|"
    r"Client\.Timeout|context deadline exceeded|request canceled|network is unreachable|name resolution|"
    r"toomanyrequests|too many requests|received unexpected HTTP status: 5\d\d|status code 5\d\d|unexpected EOF|: EOF",
    re.IGNORECASE,
)
_NO_SUCH_IMAGE = re.compile(
    r"manifest unknown|manifest for .* not found|not found|name unknown|repository does not exist|access denied|"
    r"access to the resource is denied|unauthorized|authentication required|no matching manifest|"
    r"no image found in .* for architecture|invalid reference|denied:",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineImage:
    """An image that the engine has."""

    name: str  #: as the message has it, without a scheme; where Podman has fetched it, with its server
    id: str  #: the one that was looked at: a name may be given to another one at any time
    path: str  #: its PATH; empty: it says nothing
    has_program: bool  #: an entry point or a command of its own


def reference(text: str) -> str:
    """What is behind the scheme, if it is the name of an image. Raises errors.UnsupportedRequest."""
    name = _SCHEME.sub("", text, count=1) if _SCHEME.match(text) else text
    shown = f"{name[:80]!r}"
    if len(name) > _MAX_CHARS or not _REFERENCE.fullmatch(name):
        is_upper = len(name) <= _MAX_CHARS and _REFERENCE.fullmatch(name.lower())
        why = "; they are written in lower case" if is_upper else ""
        raise errors.UnsupportedRequest(f"{shown} is not the name of a container image{why}")
    if name.startswith(docker_archive.LOADED):
        raise errors.UnsupportedRequest(f"the container image {shown} is another experiment's")
    return name


class Images:
    """Finds, fetches and loads images. `pull`: missing, always or never."""

    def __init__(self, engine: Engine, pull: str) -> None:
        self._engine = engine
        self._pull = pull

    async def ready(self, spec: RunSpec, output: Path, hold: Callable[[str], Awaitable[None]]) -> EngineImage:
        """The image of that run; fetched if need be, in an hour at the most. What the engine says goes to `output`.

        `hold` is given the name of one that comes as a file before it is looked for: nobody may remove it any more.
        Raises errors.UnsupportedRequest (there is no such image), errors.ArchiveRefused, errors.NoEngine (it may not be
        fetched), errors.Unreachable (engine or registry), errors.EnvironmentFailed (anything else).
        """
        assert spec.image is not None
        if spec.image.file is not None:
            name = await asyncio.to_thread(docker_archive.name_of, spec.image.file)
            await hold(name)
            return await self._loaded(spec.image.file, name, spec, output)
        name = reference(spec.image.reference)
        found = None if self._pull == "always" else await self._inspect(name)
        if found is not None:
            return found
        self._may_fetch(name)
        if self._engine.is_podman:
            name = _with_server(name)
        log.info("fetching a container image", image=name)
        answer = await self._engine.ask("pull", name, timeout_secs=FETCH_SECS, output=output)
        if not answer.ok:
            raise _pull_failure(name, answer)
        return await self._inspected(name)

    async def vet(self, image: Image) -> None:
        """Raises what `ready` would without fetching anything: errors.UnsupportedRequest, errors.NoEngine, errors.Unreachable."""
        if image.file is not None:
            await self._engine.ask("version", "--format", "{{.Server.Version}}")  # whether it is there
            return
        name = reference(image.reference)
        if await self._inspect(name) is None:
            self._may_fetch(name)

    def _may_fetch(self, name: str) -> None:
        if self._pull == "never":
            raise errors.NoEngine(
                f"the image {name} is not on this host, and --container-pull=never: fetch it by hand"
            )

    async def _loaded(self, file: Path, name: str, spec: RunSpec, output: Path) -> EngineImage:
        if (found := await self._inspect(name)) is not None:
            return found
        with tempfile.TemporaryDirectory(dir=output.parent, prefix="image-") as scratch:
            copy = Path(scratch, "image.tar")
            limit = spec.limits.hdd_bytes or sys.maxsize
            await asyncio.to_thread(docker_archive.rename, file, copy, name, max_bytes=limit)
            log.info("loading a container image", image=name)
            answer = await self._engine.ask(
                "load", "--input", str(copy), timeout_secs=FETCH_SECS, output=output
            )
        if not answer.ok:
            raise errors.EnvironmentFailed(f"the container image cannot be loaded: {answer.last}")
        return await self._inspected(name)

    async def _inspected(self, name: str) -> EngineImage:
        found = await self._inspect(name)
        if found is None:
            raise errors.EnvironmentFailed(f"the container image {name} was fetched, and is gone")
        return found

    async def _inspect(self, name: str) -> EngineImage | None:
        answer = await self._engine.ask("image", "inspect", "--format", "{{json .}}", name)
        said = answer.parsed() if answer.ok else {}
        if "Id" not in said:
            return None
        config: dict[str, Any] = said.get("Config") or {}
        variables = dict(str(each).partition("=")[::2] for each in config.get("Env") or ())
        return EngineImage(
            name=name,
            id=str(said["Id"]),
            path=variables.get("PATH", ""),
            has_program=bool(config.get("Entrypoint") or config.get("Cmd")),
        )


def _with_server(name: str) -> str:
    """What Docker makes of a name: Podman asks the servers of its own list for one that has none, or nobody."""
    first, slash, _ = name.partition("/")
    if slash and (first == "localhost" or {".", ":"} & set(first)):
        return name
    return f"docker.io/{name}" if slash else f"docker.io/library/{name}"


def _pull_failure(name: str, answer: Answer) -> errors.RunnerError:
    if _UNREACHABLE.search(answer.text):
        registry = name.partition("/")[0] if re.match(r"[^/]*[.:][^/]*/|localhost/", name) else "docker.io"
        return errors.Unreachable(
            f"the registry of the image {name} does not answer: {answer.last}", endpoint=registry
        )
    if _NO_SUCH_IMAGE.search(answer.text):
        return errors.UnsupportedRequest(f"the container image {name} cannot be had: {answer.last}")
    return errors.EnvironmentFailed(f"the container image {name} cannot be fetched: {answer.last}")
