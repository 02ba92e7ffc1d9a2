"""A run as arguments of `docker run` or `podman run`, and as files that they read. Pure, but for writing those files."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from typing import TYPE_CHECKING

from runner import errors
from runner.executors import builders

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from runner.executors.base import Limits, RunSpec
    from runner.executors.docker_engine import Traits

OWNER_LABEL, RUN_LABEL = "studio-runner.owner", "studio-runner.run"
#: Many for a machine-learning program with its loaders and threads; few for a fork bomb.
PIDS = 8192
#: Of /dev/shm, without a limit on memory; with one, half of that: loaders of data hand their batches over in it.
SHM_BYTES = 1 << 30
_TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108 - the container's
_LEAST_MEMORY_BYTES = 6 << 20  # engines take no less
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of images that say nothing
_MAX_LINE_BYTES = 60_000  # of an environment file
_PLAIN_NAME = re.compile(r"[^\s#=\ufeff][^\s=]*")

#: Sets variables that no environment file can hold, and becomes the program. For any Python.
_BOOT = "import json, os, sys; os.environ.update(json.load(open(sys.argv[1]))); os.execvp(sys.argv[2], sys.argv[2:])"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """What all containers of one engine have in common."""

    traits: Traits
    is_podman: bool
    network: str  #: empty: the engine's default
    label: str  #: the identity of this daemon's state


def flags(place: Place, spec: RunSpec, *, name: str, env_file: Path, private: Path) -> tuple[str, ...]:
    """The flags of a container of that run; the image and its arguments come behind them.

    The run's directory is there under its own path, and its `tmp` is the container's. Nothing else of the host is, and
    of the run's directory `private` is not: it holds the message.
    """
    directories = dict.fromkeys((spec.run_dir, spec.run_dir.resolve()))
    temporary = spec.run_dir / "tmp"
    return (
        f"--name={name}",
        f"--label={OWNER_LABEL}={place.label}",
        f"--label={RUN_LABEL}={spec.run_dir.name}",
        *place.traits.owner,
        "--init",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--no-healthcheck",
        "--log-driver=none",  # the output is in its file, and nowhere else
        "--oom-score-adj=500",  # rather than the daemon
        *([f"--network={place.network}"] if place.network else []),
        *_limits(spec.limits, place),
        *(_bind(directory, directory) for directory in directories),
        *(_hidden(each / private.name, place) for each in directories),
        *(_bind(temporary, target) for target in _TEMPORARY),
        f"--workdir={spec.workspace}",
        f"--env-file={env_file}",
    )


def mount_points(run_dir: Path) -> list[Path]:
    """Directories that have to be there before a container is made. An engine would make them as root, and nobody could remove them.

    `<run_dir>/tmp`; and where runs are below /tmp, which that becomes inside, the run's own path in it.
    """
    temporary = run_dir / "tmp"
    seen = [
        each.relative_to(outer)
        for each in (run_dir, run_dir.resolve())
        for outer in _TEMPORARY
        if each.is_relative_to(outer)
    ]
    return [temporary, *(temporary / inside for inside in seen)]


def _limits(limits: Limits, place: Place) -> list[str]:
    cannot = place.traits.cannot_limit
    flags = [f"--shm-size={limits.ram_bytes // 2 or SHM_BYTES}"]
    if "pids" not in cannot:
        flags.append(f"--pids-limit={PIDS}")
    if limits.cpus and "cpus" not in cannot:
        flags.append(f"--cpus={limits.cpus}")
    if limits.ram_bytes and "memory" not in cannot:
        memory = max(limits.ram_bytes, _LEAST_MEMORY_BYTES)
        swap = -1 if "swap" in cannot else memory  # the same: no swap beside it
        flags += [f"--memory={memory}", f"--memory-swap={swap}"]
    if limits.gpus and place.is_podman:
        flags += [f"--device=nvidia.com/gpu={card}" for card in limits.gpus]
    elif limits.gpus:
        flags.append(
            f'--gpus="device={",".join(limits.gpus)}"'
        )  # it reads a line of CSV: the quotes are its own
    return flags


def _bind(source: Path, target: Path | str) -> str:
    return _mount("type=bind", f"source={source}", f"target={target}")


def _hidden(directory: Path, place: Place) -> str:
    """An empty one in its place. Podman copies into it what is there, unless it is told not to."""
    own = ["notmpcopyup"] if place.is_podman else []
    return _mount("type=tmpfs", f"target={directory}", "tmpfs-size=4096", *own)


def _mount(*fields: str) -> str:
    """Engines read it as a line of CSV, so that a path may hold what it likes."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return f"--mount={line.getvalue()}"


def unlimited(limits: Limits, place: Place) -> tuple[str, ...]:
    """A sentence for each limit that the engine cannot set, for the document."""
    asked = {"memory": limits.ram_bytes, "cpus": limits.cpus, "pids": PIDS}
    missing = (what for what, amount in asked.items() if amount and what in place.traits.cannot_limit)
    return tuple(f"the engine cannot limit {what} on this kernel" for what in missing)


def environment(spec: RunSpec, overlay: Path, image_path: str, *, has_overlay: bool) -> dict[str, str]:
    """The workload's variables, as they are right inside of the container."""
    env = dict(spec.env)
    if not spec.limits.gpus:
        env["NVIDIA_VISIBLE_DEVICES"] = "void"  # NVIDIA's runtime takes "-1" for the name of a card
    if has_overlay:
        env["PYTHONUSERBASE"] = str(overlay)
        env["PYTHONPATH"] = ":".join(filter(None, (str(overlay / "site"), env.get("PYTHONPATH"))))
        env["PATH"] = f"{overlay / 'bin'}:{env.get('PATH') or image_path or _PATH}"
    return env


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variables:
    """Where the variables are for whom."""

    env_file: Path  #: for the engine
    boot: tuple[str, ...]  #: goes before `python ...`: variables that the former cannot hold; mostly empty


def write_variables(env: Mapping[str, str], private: Path, inside: Path, python: str | None) -> Variables:
    """Write them down, readable for this user alone: never on a command line, never in the environment of the client.

    An environment file has one line a variable. Those with line breaks and other oddities are set inside, by `python`; an
    image's own program cannot be given them: raises errors.UnsupportedRequest. Blocking; raises OSError.
    """
    plain = {name: value for name, value in env.items() if _is_plain(name, value)}
    odd = {name: value for name, value in env.items() if name not in plain}
    if odd and python is None:
        raise errors.UnsupportedRequest(
            f"the variable {min(odd)!r} of config.env has a line break or is too long for an image's own program"
        )
    file = private / "container.env"
    builders.write_private(file, "".join(f"{name}={value}\n" for name, value in plain.items()))
    if not odd:
        return Variables(env_file=file, boot=())
    rest = inside / "environment.json"
    builders.write_private(rest, json.dumps(odd))
    return Variables(env_file=file, boot=(str(python), "-c", _BOOT, str(rest)))


def _is_plain(name: str, value: str) -> bool:
    try:
        line = f"{name}={value}".encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return (
        _PLAIN_NAME.fullmatch(name) is not None
        and not {"\n", "\r"} & set(value)
        and len(line) < _MAX_LINE_BYTES
    )
