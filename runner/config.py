"""The configuration: one frozen value per component, built once from flags and environment. No I/O.

`OPTIONS` is the one table behind flags, environment variables, `--help` and docs/configuration.md.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paths:
    """Where things lie."""

    working_dir: Path  #: run directories, the lock, the file that tells clients the address; may be lost
    state_dir: Path  #: attempts, finished pairs, dead letters, undelivered results; must survive restarts
    keep_runs: bool = False  #: --debug: run directories stay after the run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queues:
    """Which queues, and how their accounts are opened."""

    match: re.Pattern[str] = re.compile(r"^(rmq|sqs|local|pubsub)_.*$")
    mismatch: re.Pattern[str] | None = None
    refresh_secs: float = 10.0
    amqp_url: str | None = dataclasses.field(default=None, repr=False)
    amqp_management_url: str | None = dataclasses.field(default=None, repr=False)
    root: Path | None = None  #: directory queues below it; None with no other account: `<working-dir>/queue`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What of this machine the runner may give away; 0 is all that there is."""

    max_cores: int = 0
    max_mem_bytes: int = 0
    max_disk_bytes: int = 0
    cpu_only: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArtifactCache:
    """The cache of immutable artifacts; without a directory there is none."""

    directory: Path | None = None
    size_bytes: int = 0
    temporary: bool = False  #: --cache-create: made at start, removed at exit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environments:
    """How Python environments are made."""

    cache_dir: Path  #: default `<state-dir>/environments`
    cache_bytes: int = 20_000_000_000
    fallback: bool = False  #: --python-fallback: take the nearest interpreter when the wanted one is missing


@dataclasses.dataclass(frozen=True, kw_only=True)
class S3:
    """TLS material for S3 endpoints, and what may be borrowed for them."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Http:
    """The port that serves metrics and health."""

    host: str = ""  #: empty: all interfaces
    port: int = 9090  #: 0 takes a free one; it is told in the log and in `<working-dir>/studio-runner.json`
    token: str | None = dataclasses.field(default=None, repr=False)  #: opens pages and control beyond loopback


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logs:
    """What the log shows and how."""

    level: str = "info"  #: debug | info | warning | error
    format: str = "auto"  #: console | json | auto (console on a terminal)
    width: int | None = None  #: of console lines, from LOGXI_FORMAT's maxcol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """How experiments are run."""

    grace_secs: float | None = None  #: --grace: how long runs may go on after SIGTERM; None: until they are done
    retries: int = 0  #: --retries: how often a workload that fails by itself is tried again
    metadata_schema: str = "1.0"  #: "1.0" (DESIGN.md 5.6) or "0.14"
    metadata_store: str | None = None  #: a storage URI: one manifest per attempt goes there
    allow_env_secrets: bool = True  #: storage credentials may come from `config.env` (INTEROP.md 1.6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """When the daemon ends by itself (INTEROP.md 8.6)."""

    tasks: int = 0
    idle_secs: float = 0.0
    interval_secs: float = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All of it."""

    paths: Paths
    queues: Queues
    machine: Machine
    cache: ArtifactCache
    environments: Environments
    s3: S3
    http: Http
    logs: Logs
    runs: Runs
    limits: Limits
