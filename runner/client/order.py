"""What an experimenter asks for, checked before anything is packed or sent. Looks at files, sends nothing."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import config, errors
from runner.client import message
from runner.storage.location import locate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from runner.request.model import Request
    from runner.storage.base import Location

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queue:
    """Where the message goes. Exactly one of `amqp_url` and `root` is set."""

    name: str
    amqp_url: str | None = dataclasses.field(default=None, repr=False)
    root: Path | None = None  #: the directory that holds the queues

    @classmethod
    def named(cls, name: str, *, amqp_url: str | None, root: Path) -> Queue:
        """The name decides the technology (INTEROP.md 2.1). Raises errors.UsageError for what cannot be published to."""
        if name.endswith("_response"):
            raise errors.UsageError(
                f"--queue={name}: queues of that ending hold reports, no runner takes work from them"
            )
        if name.startswith("rmq_"):
            if amqp_url is None:
                raise errors.UsageError(
                    f"--queue={name} is a RabbitMQ queue: give --amqp-url (or AMQP_URL) as well"
                )
            return cls(name=name, amqp_url=amqp_url)
        if name.startswith("local"):
            if "/" in name or not name.isprintable():
                raise errors.UsageError(f"--queue={name!r}: not the name of a directory")
            return cls(name=name, root=root)
        other = "AWS SQS" if name.startswith(("sqs", "ec2")) else "Google Pub/Sub"
        raise errors.UsageError(
            f"--queue={name} would be a queue of {other}, to which only StudioML's own client publishes; "
            "rmq_... is RabbitMQ, local_... a directory"
        )

    def as_member(self, *, persistent: bool) -> dict[str, Any]:
        """`config.cloud.queue` of the message."""
        member: dict[str, Any] = {"rmq": self.amqp_url} if self.amqp_url else {}
        return member | ({"persistent": True} if persistent else {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capture:
    """`SOURCE:tag`: a directory or file that goes along."""

    source: str  #: a path, or an address
    tag: str
    mutable: bool

    @classmethod
    def parse(cls, text: str, *, mutable: bool) -> Capture:
        """Raises errors.UsageError."""
        option = "--capture" if mutable else "--capture-once"
        source, colon, tag = text.rpartition(":")
        if not colon or not source or not _TAG.fullmatch(tag):
            raise errors.UsageError(
                f"{option}={text}: written as PATH:tag, the tag of letters, digits and _ . -"
            )
        if tag == "workspace":
            raise errors.UsageError(f"{option}={text}: the workspace is what is submitted")
        if mutable and message.is_url(source):
            raise errors.UsageError(
                f"{option}={text}: nothing can be stored back at an address; --capture-once reads it"
            )
        return cls(source=source, tag=tag, mutable=mutable)

    @property
    def is_url(self) -> bool:
        """Whether it is an address, which the runner reads itself."""
        return message.is_url(self.source)

    @property
    def path(self) -> Path:
        """What is packed."""
        return Path(self.source).resolve()

    def artifact(self, key: str) -> message.Artifact:
        """The artifact whose archive is stored at `key`."""
        if self.is_url:
            return message.Artifact(tag=self.tag, url=self.source)
        return message.Artifact(tag=self.tag, local=str(self.path), key=key, mutable=self.mutable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be submitted. `check` refuses what cannot be, before anything is packed or sent."""

    directory: Path
    command: Sequence[str]
    queue: Queue
    storage: message.Storage
    key: str = ""
    captures: Sequence[Capture] = ()
    credentials: message.Credentials | None = None
    requirements: Sequence[str] = ()
    python: str = ""
    project: str | None = None
    resources: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    image: str = ""
    max_duration: str | None = None
    lifetime: str | None = None
    save_frequency: str = "1m"
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    persistent: bool = False

    @property
    def workspace(self) -> Capture:
        """The directory, as what is packed first."""
        return Capture(source=str(self.directory), tag="workspace", mutable=False)

    def check(self) -> None:
        """Raises errors.UsageError."""
        if self.image:
            _check_image(self.image)
        if not self.directory.is_dir():
            raise errors.UsageError(f"{self.directory}: not a directory")
        if not self.command or not self.command[0]:
            raise errors.UsageError("nothing to run: end with -- script.py args...")
        script = self.command[0]
        if script == "-m":
            if len(self.command) == 1:
                raise errors.UsageError("-m takes the name of a module")
        elif (
            Path(script).is_absolute()
            or ".." in Path(script).parts
            or not (self.directory / script).is_file()
        ):
            raise errors.UsageError(
                f"{self.directory} holds no {script}: scripts are named as seen from there"
            )
        tags = [capture.tag for capture in self.captures]
        if twice := {tag for tag in tags if tags.count(tag) > 1}:
            raise errors.UsageError(f"more than one artifact is called {', '.join(sorted(twice))}")
        for capture in self.captures:
            if not capture.mutable and not capture.is_url and not capture.path.exists():
                raise errors.UsageError(
                    f"--capture-once={capture.source}:{capture.tag}: there is no such file or directory"
                )
        # The whole message as far as it is known: a runner's own reading finds what is left.
        placeholder = message.Artifact(tag="workspace", key="blobstore/0.tar")
        others = [capture.artifact("blobstore/0.tar") for capture in self.captures]
        self.compose(self.key or "0_0", [placeholder, *others])

    def compose(
        self, key: str, artifacts: Sequence[message.Artifact]
    ) -> tuple[bytes, Request, dict[str, Location]]:
        """The message's bytes, what a runner reads in them, and where it finds each artifact. `artifacts`: the workspace first.

        Raises errors.UsageError.
        """
        now = time.time()
        asked = message.Experiment(
            key=message.check_key(key),
            command=self.command,
            storage=self.storage,
            workspace=artifacts[0],
            others=artifacts[1:],
            credentials=self.credentials,
            requirements=self.requirements,
            python=self.python,
            project=self.project,
            resources=self.resources,
            image=self.image,
            max_duration=self.max_duration,
            lifetime=self.lifetime,
            save_frequency=self.save_frequency,
            env=self.env,
            queue=self.queue.as_member(persistent=self.persistent),
            home=str(Path.home()),
            time_added=now,
            time_packed=now,
        )
        body, request = message.encode(message.build(asked))
        try:
            locations = {
                artifact.tag: locate(artifact, request, config.S3(), allow_env_secrets=False)
                for artifact in request.artifacts
            }
        except errors.RunnerError as exc:
            raise errors.UsageError(f"a runner would refuse this experiment: {exc}") from exc
        return body, request, locations


def _check_image(image: str) -> None:
    from runner.executors.docker_images import reference  # needed by few

    try:
        reference(image)
    except errors.RunnerError as exc:
        raise errors.UsageError(f"--image: {exc}") from exc
