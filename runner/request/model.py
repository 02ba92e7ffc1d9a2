"""What a request says, as values. Made by `decode`; INTEROP.md section 1 has the wire format."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What one experiment asks for (INTEROP.md 1.3), or what a machine has."""

    cpus: int = 0  #: logical cores
    ram_bytes: int = 0
    hdd_bytes: int = 0
    gpus: int = 0  #: slots (INTEROP.md 8.1), not cards; 0 is none, whatever the two below say
    gpu_mem_bytes: int = 0  #: free memory wanted on each card
    gpu_count: int = 0  #: exactly that many cards; 0 leaves it to the allocator


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyPair:
    """Storage credentials as a message carries them (INTEROP.md 1.6). Never shows its secrets."""

    access_key: str
    secret_key: str = dataclasses.field(repr=False)
    session_token: str | None = dataclasses.field(default=None, repr=False)
    region: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """One entry of `experiment.artifacts` (INTEROP.md 1.4)."""

    tag: str  #: its label; safe as the name of a directory (`decode` refuses others)
    key: str | None = None
    qualified: str | None = None  #: the full URI, when the client gave one
    url: str | None = None  #: http(s) source of an external read-only input
    bucket: str | None = None
    mutable: bool = False
    unpack: bool | None = None  #: None: decide by content
    credentials: KeyPair | None = (
        None  #: None: look further (`Request.storage_credentials`, then env, then anonymous)
    )
    region: str | None = None
    save_frequency_secs: float | None = None  #: its own checkpoint interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """`config.storage` or `config.database`: where the experimenter's objects live."""

    type: str | None = None  #: "s3", "local", "gcloud", "http", ...
    endpoint: str | None = None
    bucket: str | None = None
    region: str | None = None
    credentials: KeyPair | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Container:
    """The container image that the program wants to run in (INTEROP.md 3.8)."""

    engine: Literal["docker", "singularity"]
    reference: str = (
        ""  #: for the engine to fetch, as the message has it; empty: the file of the artifact `tag`
    )
    tag: str = ""  #: the artifact that names it; empty: `config.container.image`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One experiment, as asked for. Everything coerced, nothing looked up."""

    key: str  #: opaque identity given by the experimenter; unique only within a project; never used in a path as it is
    project: str | None = None
    filename: str | None = None  #: None: a container's own entry point
    args: tuple[str, ...] = ()  #: argv elements, quoting already undone (INTEROP.md 1.2)
    python: str | None = None  #: "3", "3.11", "3.11.7"; None: any
    requirements: tuple[str, ...] = ()  #: `pythonenv`
    extra_requirements: tuple[str, ...] = ()  #: `config.pip`
    env: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  #: `config.env`, scalars as text, nulls dropped
    resources: Resources = dataclasses.field(default_factory=Resources)
    artifacts: tuple[Artifact, ...] = ()
    container: Container | None = None  #: None: on the host
    storage: Endpoint | None = None
    database: Endpoint | None = None
    time_added: float | None = None  #: unix seconds
    sent: float | None = None  #: unix seconds: the last that the client wrote down before it published
    lifetime_secs: float | None = None  #: `config.experimentLifetime`; may be negative (already expired)
    max_duration_secs: float | None = None
    checkpoint_secs: float = 60.0  #: `saveWorkspaceFrequency`, clamped to 10 s .. 12 h (INTEROP.md 3.7)
    from_completion_service: bool = (
        False  #: `from_compl_service` is present, whatever its value (DESIGN.md 5.5)
    )
    warnings: tuple[str, ...] = ()  #: what was coerced or ignored, one sentence each, for the log; no secrets
    raw: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, repr=False
    )  #: the message as it came, secrets included

    def artifact(self, tag: str) -> Artifact | None:
        """The artifact of that label, if there is one."""
        return next((artifact for artifact in self.artifacts if artifact.tag == tag), None)
