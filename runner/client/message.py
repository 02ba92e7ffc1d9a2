"""The message that the real client would publish for an experiment: the same members, in the same order. Pure.

INTEROP.md 1.2-1.6 and 3.1-3.2 have the format; tests hold it against messages that were captured from the real client.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from typing import TYPE_CHECKING, Any

from runner import errors
from runner.request import decode
from runner.storage import address

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from runner.request.model import Request

#: Directories beside the workspace that come back to the experimenter.
MUTABLE_TAGS = ("modeldir", "retval", "output", "tb", "_metrics", "_metadata")
_KEY = re.compile(r"[A-Za-z0-9_~.,:+@=-]{1,200}", re.ASCII)
_URL = re.compile(r"(https?|s3)://", re.IGNORECASE)
_TLS_PORT = 443


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credentials:
    """The experimenter's AWS variables, as far as they are set. Never shows its secrets."""

    access_key: str
    secret_access_key: str = dataclasses.field(repr=False)
    session_token: str | None = dataclasses.field(default=None, repr=False)
    region: str | None = None

    def as_member(self) -> dict[str, Any]:
        """A `credentials` member."""
        return {"aws": {name: value for name, value in dataclasses.asdict(self).items() if value}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """Where the artifacts of an experiment go: a bucket of an S3 server, or a directory."""

    type: str  #: "s3" | "local"
    endpoint: str  #: http[s]://host[:port], or the directory above `bucket`
    bucket: str

    @classmethod
    def parse(cls, text: str, cwd: Path) -> Storage:
        """From `http(s)://host[:port]/bucket`, `s3://host[:port]/bucket`, or the path of a directory.

        Raises errors.UsageError.
        """
        scheme, separator, rest = text.partition("://")
        if not separator or scheme.lower() == "file":
            path = cwd / (rest if separator else text)
            if not text or not path.name or ".." in path.parts:
                raise errors.UsageError(f"--storage={text}: not the path of a directory that can be made")
            return cls(type="local", endpoint=str(path.parent), bucket=path.name)
        host, _, bucket = rest.rstrip("/").partition("/")
        if scheme.lower() not in {"http", "https", "s3"} or "@" in host or not bucket or "/" in bucket:
            raise errors.UsageError(
                "--storage: neither a directory nor a bucket; examples: http://minio.lan:9000/bucket, "
                "s3://s3.amazonaws.com/bucket (credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            )
        try:
            name, port = address.split_host(host)
        except ValueError as exc:
            raise errors.UsageError(f"--storage={text}: {exc}") from exc
        if scheme.lower() == "s3":
            scheme = "https" if address.is_amazon(name) or port in {None, _TLS_PORT} else "http"
        return cls(type="s3", endpoint=f"{scheme.lower()}://{host}", bucket=bucket)

    def qualified(self, key: str) -> str:
        """The full URI of an object."""
        if self.type == "local":
            return f"file://{self.endpoint.rstrip('/')}/{self.bucket}/{key}"
        return f"s3://{self.endpoint.partition('://')[2]}/{self.bucket}/{key}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """One artifact besides those that every experiment has."""

    tag: str
    local: str = ""  #: the path that was packed
    key: str = ""  #: its object; empty for a URL
    url: str = ""  #: an external, read-only source
    mutable: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is asked for. Sizes and durations as the experimenter wrote them, checked before."""

    key: str
    command: Sequence[str]  #: the script (or `-m` and a module) and its arguments
    storage: Storage
    workspace: Artifact
    others: Sequence[Artifact] = ()  #: of --capture and --capture-once
    credentials: Credentials | None = None
    requirements: Sequence[str] = ()
    python: str = ""
    project: str | None = None
    resources: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    image: str = ""  #: of Docker; empty: on the host
    max_duration: str | None = None
    lifetime: str | None = None
    save_frequency: str = "1m"
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    queue: Mapping[str, Any] = dataclasses.field(default_factory=dict)  #: `config.cloud.queue`
    home: str = ""  #: of the experimenter: the client tells where things would lie there
    time_added: float  #: unix seconds
    time_packed: float  #: when the artifacts were ready


def check_key(key: str) -> str:
    """The experiment's key, which becomes part of object names. Raises errors.UsageError."""
    if not _KEY.fullmatch(key) or key.strip(".") == "":
        raise errors.UsageError(
            f"--experiment={key}: a key is made of letters, digits and . _ - ~ , : + @ =, 200 at the most"
        )
    return key


def mutable_key(experiment: str, tag: str) -> str:
    """Where a mutable artifact is stored."""
    return f"experiments/{experiment}/{tag}.tar"


def immutable_key(digest: str) -> str:
    """Where an archive is stored whose bytes have that SHA-256 (hexadecimal)."""
    return f"blobstore/{digest}.tar"


def is_url(source: str) -> bool:
    """Whether what was given to --capture-once is an address, not a path."""
    return _URL.match(source) is not None


def build(asked: Experiment) -> dict[str, Any]:
    """The message, as the real client would have it."""
    credentials = asked.credentials.as_member() if asked.credentials else None
    filename, *args = asked.command
    return {
        "experiment": {
            "key": asked.key,
            "args": [shlex.quote(arg) for arg in args],
            "filename": filename,
            "pythonenv": list(asked.requirements),
            "project": asked.project,
            "pythonver": asked.python,
            "resources_needed": dict(asked.resources),
            "status": "waiting",
            "time_added": asked.time_added,
            "time_started": None,
            "time_last_checkpoint": asked.time_packed,
            "time_finished": None,
            "info": {},
            "git": None,
            "metric": None,
            "max_duration": asked.max_duration,
            "owner": "guest",
            "from_compl_service": False,
            "artifacts": _artifacts(asked, credentials),
        },
        "config": _config(asked, credentials),
    }


def encode(message: Mapping[str, Any]) -> tuple[bytes, Request]:
    """The bytes to publish, and what a runner reads in them: nothing may get lost on the way.

    Raises errors.UsageError for what a runner would refuse, or read differently.
    """
    body = json.dumps(message).encode()
    try:
        request = decode.decode(body)
    except errors.RunnerError as exc:
        raise errors.UsageError(f"a runner would refuse this experiment: {exc}") from exc
    if request.warnings:
        raise errors.UsageError(
            f"a runner would not take this experiment as it is meant: {'; '.join(request.warnings)}"
        )
    return body, request


def _artifacts(asked: Experiment, credentials: dict[str, Any] | None) -> dict[str, Any]:
    home = f"{asked.home}/.studioml/experiments/{asked.key}"
    own = [
        asked.workspace,
        *(
            Artifact(tag=tag, local=f"{home}/{tag}", key=mutable_key(asked.key, tag), mutable=True)
            for tag in MUTABLE_TAGS
        ),
    ]
    return {one.tag: _artifact(one, asked.storage, credentials) for one in [*own, *asked.others]}


def _artifact(one: Artifact, storage: Storage, credentials: dict[str, Any] | None) -> dict[str, Any]:
    if one.url:
        where = "qualified" if one.url.lower().startswith("s3:") else "url"
        return {"unpack": False, "mutable": False, where: one.url}
    member: dict[str, Any] = {
        "unpack": True,
        "mutable": one.mutable,
        "key": one.key,
        "local": one.local,
        "qualified": storage.qualified(one.key),
        "bucket": storage.bucket,
    }
    return member | ({"credentials": credentials} if credentials else {})


def _config(asked: Experiment, credentials: dict[str, Any] | None) -> dict[str, Any]:
    storage = {
        "type": asked.storage.type,
        "endpoint": asked.storage.endpoint,
        "bucket": asked.storage.bucket,
    }
    owned = {"credentials": credentials} if credentials else {}
    return {
        "database": {**storage, "authentication": "none", **owned},
        "storage": {**storage, **owned},
        "cloud": {"queue": dict(asked.queue)},
        "verbose": "info",
        "saveMetricsFrequency": "1m",
        "saveWorkspaceFrequency": asked.save_frequency,
        **({"experimentLifetime": asked.lifetime} if asked.lifetime else {}),
        "sleep_time": 1,
        "worker_timeout": 30,
        "env": dict(asked.env),
        "resources_needed": dict(asked.resources),
        **({"container": {"image": asked.image}} if asked.image else {}),
    }
