"""The Apptainer or Singularity program of this host: its command lines, and what its complaints mean."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import shutil
from typing import TYPE_CHECKING

from runner import errors
from runner.executors import builders, kernelfiles
from runner.process.base import Command

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from runner.executors.imageref import Reference
    from runner.process.base import ProcessExit
    from runner.process.spawner import Spawner

FETCH_TIMEOUT_SECS = 3600.0
VERSION_TIMEOUT_SECS = 30.0
_NAMES = ("apptainer", "singularity")
#: What a container's starter gets of the runner's environment; it passes none of it on.
_OF_THE_RUN = re.compile(
    r"PATH|HOME|USER|LANG|LC_ALL|XDG_RUNTIME_DIR|DBUS_SESSION_BUS_ADDRESS|"
    r"(APPTAINER|SINGULARITY)_(CONFIGDIR|SECURITY|USERNS|UNSQUASH|NO_MOUNT)"
)
#: A builder's: no container is in reach of it. Credentials for registries (`APPTAINER_DOCKER_PASSWORD`) are among these.
_OF_THE_BUILDER = re.compile(
    _OF_THE_RUN.pattern
    + r"|(?i:(https?|all|no)_proxy)|SSL_CERT_(FILE|DIR)|XDG_\w+|DOCKER_CONFIG|REGISTRY_AUTH_FILE|"
    r"(APPTAINER|SINGULARITY)_(?!BIND|CACHEDIR|TMPDIR|LOCALCACHEDIR|PULLDIR)\w+"
)
# How the engines word it: Go's network errors, servers that say 5xx or "not now", and the hub that is no more.
_UNREACHABLE = re.compile(
    r"dial tcp|no such host|connection (refused|reset)|i/o timeout|timeout exceeded|TLS handshake|network is unreachable|"
    r"unexpected EOF|no response received from|context deadline exceeded|toomanyrequests|too many requests|"
    r"(status|response)[^\n]{0,40}\b(429|5\d\d)\b|\b5\d\d (Internal Server Error|Bad Gateway|Service Unavailable|Gateway)",
    re.IGNORECASE,
)
#: Nothing that a host with programs or rights missing could say as well: such a message is never tried again.
_NO_SUCH_IMAGE = re.compile(
    r"(manifest|name|blob) unknown|repository name not known|manifest[^\n]{0,80}not found|(status|response)[^\n]{0,40}\b404\b|"
    r"image does not exist|image not found|no image satisfies",
    re.IGNORECASE,
)
_SIF_MAGIC = b"SIF_MAGIC\0"
_SQUASHFS_MAGIC = b"hsqs"
_LAUNCHER_BYTES = 31  #: "#!/usr/bin/env run-singularity\n", which Singularity 2 put before a squashfs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """A program that was found on the PATH."""

    path: str

    @property
    def name(self) -> str:
        """Its program: apptainer or singularity."""
        return os.path.basename(self.path)  # noqa: PTH119 - a text

    @classmethod
    def find(cls, environ: Mapping[str, str]) -> Engine | None:
        """The engine of this host: apptainer, else singularity; None when there is neither. Cheap."""
        for name in _NAMES:
            path = shutil.which(name, path=environ.get("PATH", os.defpath))
            if path is not None:
                return cls(path=path)
        return None

    def inside(
        self,
        image: Path,
        program: Sequence[str],
        *,
        run_dir: Path,
        workspace: Path,
        scratch: Path,
        empty: Path,
        hidden: Path,
        gpus: bool,
    ) -> tuple[str, ...]:
        """The command line that runs `program` in `image`, with nothing of this host but the run's directory. Blocks, below 1 ms.

        The image's root cannot be written; its /tmp is in `scratch`, so that the disk counts as the run's. `empty` is an empty
        directory, which stands for what may not be seen: files of the kernel, and `hidden`, in the run's directory.
        Raises errors.UsageError when that directory cannot be said to the engine.
        """
        if re.search(r"[:,\\]", str(run_dir)):
            raise errors.UsageError(
                f"--working-dir: {run_dir}: no ':', ',' or '\\' can be in it where runs are in {self.name} images"
            )
        return (
            *(self.path, "--silent", "exec", "--containall", "--cleanenv", "--no-home", "--no-privs"),
            *(("--nv",) if gpus else ()),
            *kernelfiles.binds(empty),
            *("--workdir", str(scratch), "--bind", f"{run_dir},{empty}:{hidden}:ro", "--pwd", str(workspace)),
            *(str(image), *program),
        )


class Builder:
    """Fetches images with the host's engine."""

    def __init__(self, spawner: Spawner, environ: Mapping[str, str]) -> None:
        self._spawner = spawner
        self._environ = environ

    async def fetch(self, engine: Engine, reference: Reference, target: Path, log_file: Path) -> None:
        """Makes the SIF file `target`; everything that is written on the way lies in its directory. Cancel-safe.

        Raises errors.Unreachable when the server does not answer, errors.UnsupportedRequest when it has no such image, else
        errors.EnvironmentFailed: also where it may not be had, which can be for this host's credentials.
        """
        argv = (engine.path, "pull", "--disable-cache", "--force", str(target), str(reference))
        env = only(self._environ, builder=True) | scratch_variables(target.parent)
        ended, said = await builders.run(
            self._spawner,
            Command(argv=argv, env=env, cwd=target.parent, output=log_file),
            timeout_secs=FETCH_TIMEOUT_SECS,
        )
        if ended.ok and await asyncio.to_thread(is_image, target):
            return
        raise _failure(engine, reference, ended, said)

    async def version(self, engine: Engine, folder: Path) -> str:
        """What the engine says of itself ("apptainer version 1.4.5"); empty when it says nothing."""
        output = folder / "version.txt"
        command = Command(argv=(engine.path, "--version"), env=only(self._environ), cwd=folder, output=output)
        ended, said = await builders.run(self._spawner, command, timeout_secs=VERSION_TIMEOUT_SECS)
        return said.strip()[:200] if ended.ok else ""


def only(environ: Mapping[str, str], *, builder: bool = False) -> dict[str, str]:
    """Of the runner's environment what an engine may see."""
    allowed = _OF_THE_BUILDER if builder else _OF_THE_RUN
    return {name: value for name, value in environ.items() if allowed.fullmatch(name)}


def scratch_variables(folder: Path) -> dict[str, str]:
    """Where an engine puts what it unpacks, under the names of both."""
    names = (f"{prefix}_{name}" for prefix in ("APPTAINER", "SINGULARITY") for name in ("TMPDIR", "CACHEDIR"))
    return dict.fromkeys((*names, "TMPDIR"), str(folder))


def is_image(file: Path) -> bool:
    """Whether that is a SIF or squashfs file; formats that kernels mount less safely are none. Blocks."""
    try:
        with file.open("rb") as image:
            head = image.read(64)
    except FileNotFoundError:
        return False
    return (
        head[32:42] == _SIF_MAGIC
        or head.startswith(_SQUASHFS_MAGIC)
        or (head.startswith(b"#!") and head[_LAUNCHER_BYTES:].startswith(_SQUASHFS_MAGIC))
    )


def _failure(engine: Engine, reference: Reference, ended: ProcessExit, said: str) -> errors.RunnerError:
    how = f"stopped after {FETCH_TIMEOUT_SECS:.0f} s" if ended.stopped else str(ended)
    tail = builders.last_lines(said)
    if _UNREACHABLE.search(said):
        return errors.Unreachable(
            f"the image {reference} cannot be fetched, its server does not answer: {tail}",
            endpoint=reference.endpoint,
        )
    if _NO_SUCH_IMAGE.search(said):
        return errors.UnsupportedRequest(f"there is no image {reference} for this host: {tail}")
    return errors.EnvironmentFailed(f"the image {reference} cannot be made ({engine.name}: {how}): {tail}")
