"""Bytes from a queue -> `Request`. Liberal: INTEROP.md section 1, every "REC". Bound to the CPU; no I/O, nothing looked up."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any

from runner import errors
from runner.request import container, credentials, document, envelope, wire
from runner.request.model import Artifact, Endpoint, Request, Resources

if TYPE_CHECKING:
    from runner.request.wire import Notes

_CHECKPOINT_SECS = (10.0, 60.0, 12 * 3600.0)  # least, default, most: INTEROP.md 3.7
_EARLIEST_TIME = 10  # unix seconds; smaller ones are no times (INTEROP.md 7.3)
_MAX_KEY_CHARS = 1024
_MAX_TAG_BYTES = 200  # a file name has 255; room for suffixes
_MAX_ARG_CHARS = 2 << 20  # what the kernel takes as arguments of one program
_MAX_WARNINGS = 50  # a hostile message has one for each of a million members
_RESERVED_TAGS = {".", "..", "_runner"}
_QUOTED_OR_BLANK = re.compile(r"[\s'\"\\]")
_VERSION = re.compile(
    r"(?:(?:python|py|v)[ -]?)?([0-9]+(?:\.[0-9]+){0,2})(?:\.[*x])?", re.IGNORECASE | re.ASCII
)


def decode(body: bytes, *, max_bytes: int = 8 << 20) -> Request:
    """One message as a value: everything coerced, and a sentence in `warnings` for each thing that had to be.

    Raises, and nothing else, whatever the bytes are: errors.MalformedMessage (not JSON, no experiment, no key, too large, a
    broken envelope), errors.UnsupportedRequest (no program; names and texts that no file system or program can be given),
    errors.NoKey (a well-formed envelope: encrypted for a key that is not installed here).
    """
    notes = wire.Notes()
    parsed = document.parse(body, max_bytes=max_bytes)
    top = wire.Message.read(parsed, notes)
    if envelope.find(top.message) is not None:
        raise errors.NoKey("the message is encrypted, and no key to open it is installed on this host")
    if not isinstance(top.experiment, dict):
        raise errors.MalformedMessage(
            f"experiment is {wire.kind_of(top.experiment)}: the message asks for nothing"
        )
    return _request(top, raw=parsed, notes=notes)


def _request(top: wire.Message, *, raw: dict[str, Any], notes: Notes) -> Request:
    experiment = wire.Experiment.read(top.experiment, notes.at("experiment"))
    config = wire.Config.read(top.config, notes.at("config"))
    artifacts = _artifacts(experiment.artifacts, notes.at("experiment.artifacts"))
    image = wire.Container.read(config.container, notes.at("config.container")).image
    _no_nul(image, "config.container.image")
    wanted, artifacts = container.choose(artifacts, image, notes.at("config"))
    _no_nul(experiment.filename, "experiment.filename")
    if not experiment.filename and wanted is None:
        raise errors.UnsupportedRequest(
            "there is nothing to run: experiment.filename is empty, and no container image is named that has a program"
        )
    requirements = _lines(experiment.pythonenv, "experiment.pythonenv")
    return Request(
        key=_key(experiment.key),
        project=experiment.project or None,
        filename=experiment.filename or None,
        args=_args(experiment.args or (), notes.at("experiment")),
        python=_python(experiment.pythonver, notes.at("experiment")),
        requirements=requirements,
        extra_requirements=_lines(config.pip, "config.pip"),
        env=_env(config.env or {}, notes.at("config.env")),
        resources=_resources(experiment, config, notes),
        artifacts=artifacts,
        container=wanted,
        storage=_endpoint(config.storage, notes.at("config.storage")),
        database=_endpoint(config.database, notes.at("config.database")),
        time_added=experiment.time_added if (experiment.time_added or 0) > _EARLIEST_TIME else None,
        sent=experiment.time_last_checkpoint or experiment.time_added,
        lifetime_secs=config.experimentLifetime,
        max_duration_secs=_max_duration(experiment.max_duration, notes.at("experiment")),
        checkpoint_secs=_interval(config.saveWorkspaceFrequency),
        from_completion_service=any(name.lower() == "from_compl_service" for name in top.experiment),
        warnings=tuple(notes.lines[:_MAX_WARNINGS]),
        raw=raw,
    )


def _key(key: str | None) -> str:
    if not key or not key.strip():
        raise errors.MalformedMessage("experiment.key is missing: results would have no name")
    if len(key) > _MAX_KEY_CHARS:
        raise errors.MalformedMessage(
            f"experiment.key has {len(key)} characters; {_MAX_KEY_CHARS} are enough"
        )
    return key


def _args(elements: tuple[str, ...], notes: Notes) -> tuple[str, ...]:
    """The client has quoted each element for a shell; API callers have not. Both come out as argv (INTEROP.md 1.2)."""
    if sum(map(len, elements)) > _MAX_ARG_CHARS:
        raise errors.UnsupportedRequest("experiment.args is longer than what a program can be given")
    argv: list[str] = []
    for element in elements:
        _no_nul(element, "experiment.args")
        if element and not _QUOTED_OR_BLANK.search(element):  # shlex reads a character at a time
            argv.append(element)
            continue
        try:
            argv.extend(shlex.split(element))
        except ValueError:  # an unbalanced quote: not written for a shell
            notes.add("args", "holds an element with unbalanced quotes; passed on as it is")
            argv.append(element)
    return tuple(argv)


def _python(version: Any, notes: Notes) -> str | None:
    """As "3", "3.6" or "3.11.7"; None for any. A YAML file turns an unquoted 3.10 into the number 3.1."""
    if version is None or version == "":
        return None
    if isinstance(version, float) and version == 3.1:  # noqa: PLR2004 - Python 3.1 is older than this format
        notes.add("pythonver", "is the number 3.1; taken as 3.10, which loses its zero unless it is quoted")
        return "3.10"
    if isinstance(version, float) and version.is_integer():
        version = int(version)
    try:
        found = None if isinstance(version, bool) else _VERSION.fullmatch(wire.scalar_text(version).strip())
    except ValueError:
        found = None
    if found is None:
        notes.add("pythonver", "is ignored, any Python will do: it is no version like 3.11")
        return None
    return found[1]


def _lines(lines: tuple[str, ...] | None, member: str) -> tuple[str, ...]:
    """Requirement lines without blanks around them, empty ones and comments left out."""
    kept = [line.strip() for text in lines or () for line in text.splitlines()]
    for line in kept:
        _no_nul(line, member)
    return tuple(line for line in kept if line and not line.startswith("#"))


def _env(members: dict[str, Any], notes: Notes) -> dict[str, str]:
    """Scalars as their JSON text (`true` and not `True`: what the YAML file said), nulls dropped."""
    env: dict[str, str] = {}
    for name, value in members.items():
        if value is None:
            continue
        if not name or "=" in name or "\0" in name:
            notes.lines.append(f"{notes.where} holds a name that no environment variable can have; dropped")
            continue
        try:
            text = wire.scalar_text(value)
        except ValueError:
            notes.add(name, f"is {wire.kind_of(value)}; dropped")
            continue
        if "\0" in text:
            notes.add(name, "holds a NUL character; dropped")
            continue
        env[name] = text
    return env


def _resources(experiment: wire.Experiment, config: wire.Config, notes: Notes) -> Resources:
    """Member by member the experiment's, else the configuration's, else nothing."""
    own = wire.Resources.read(experiment.resources_needed, notes.at("experiment.resources_needed"))
    default = wire.Resources.read(config.resources_needed, notes.at("config.resources_needed"))
    asked = default.model_dump(exclude_none=True) | own.model_dump(exclude_none=True)
    return Resources(
        cpus=asked.get("cpus", 0),
        ram_bytes=asked.get("ram", 0),
        hdd_bytes=asked.get("hdd", 0),
        gpus=asked.get("gpus", 0),
        gpu_mem_bytes=asked.get("gpuMem", 0),
        gpu_count=asked.get("gpuCount", 0),
    )


def _artifacts(members: Any, notes: Notes) -> tuple[Artifact, ...]:
    if members is None:
        return ()
    if not isinstance(members, dict):
        raise errors.MalformedMessage(f"experiment.artifacts is {wire.kind_of(members)}, not an object")
    made = (_artifact(_safe_tag(tag), member, notes.at(tag)) for tag, member in members.items())
    return tuple(artifact for artifact in made if artifact is not None)


def _artifact(tag: str, member: Any, notes: Notes) -> Artifact | None:
    if member is None:
        notes.lines.append(f"{notes.where} is null; there is no such artifact then")
        return None
    if not isinstance(member, dict):
        raise errors.MalformedMessage(f"{notes.where} is {wire.kind_of(member)}, not an object")
    read = wire.Artifact.read(member, notes)
    for name in ("key", "qualified", "url", "bucket"):
        _no_nul(getattr(read, name), f"{notes.where}.{name}")
    pair = credentials.key_pair(read.credentials, notes)
    return Artifact(
        tag=tag,
        key=read.key or None,
        qualified=read.qualified or None,
        url=read.url or None,
        bucket=read.bucket or None,
        mutable=bool(read.mutable),
        unpack=read.unpack,
        credentials=pair,
        region=read.region or (pair.region if pair else None),
        save_frequency_secs=_interval(read.saveFrequency) if read.saveFrequency else None,
    )


def _safe_tag(tag: str) -> str:
    """The tag, which names a directory: one plain component that no tool takes for an option."""
    encoded = tag.encode()
    if (
        not tag
        or tag in _RESERVED_TAGS
        or tag.startswith("-")
        or "/" in tag
        or any(byte < 0x20 or byte == 0x7F for byte in encoded)  # noqa: PLR2004 - control characters
        or len(encoded) > _MAX_TAG_BYTES
    ):
        raise errors.UnsupportedRequest(f"the artifact tag {tag[:80]!r} cannot be the name of a directory")
    return tag


def _endpoint(member: Any, notes: Notes) -> Endpoint | None:
    if member is None:
        return None
    read = wire.Endpoint.read(member, notes)
    pair = credentials.key_pair(read.credentials, notes) or credentials.key_pair_beside(
        {"aws_access_key": read.aws_access_key, "aws_secret_key": read.aws_secret_key}, notes
    )
    return Endpoint(
        type=read.type or None,
        endpoint=read.endpoint or None,
        bucket=read.bucket or None,
        region=read.region or (pair.region if pair else None),
        credentials=pair,
    )


def _max_duration(secs: float | None, notes: Notes) -> float | None:
    """Only a lifetime may be negative (INTEROP.md 7.1); no run can be over before it starts."""
    if secs is not None and secs <= 0:
        notes.add("max_duration", "is ignored: it is not above zero")
        return None
    return secs


def _interval(secs: float | None) -> float:
    least, default, most = _CHECKPOINT_SECS
    return default if secs is None else min(max(secs, least), most)


def _no_nul(text: str | None, member: str) -> None:
    if text and "\0" in text:
        raise errors.UnsupportedRequest(f"{member} holds a NUL character")
