"""The configuration: one frozen value per component, built once from flags and environment. No I/O.

`options.OPTIONS` is the one table behind flags, environment variables, `--help` and docs/configuration.md; `parse` reads
them by it.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from runner import errors
from runner.options import OPTIONS, Option

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

#: The limits (INTEROP.md 8.6) are not looked at more often.
MIN_INTERVAL_SECS = 2.0
#: Accounts are not asked for their queues more often: 0 would ask a broker without a pause.
MIN_REFRESH_SECS = 1.0
_LOGXI_LEVELS = {
    "TRC": "debug",
    "DBG": "debug",
    "INF": "info",
    "WRN": "warning",
    "ERR": "error",
    "FTL": "error",
    "OFF": "error",
}
_LOGXI_FORMATS = {"json": "json", "happy": "console", "text": "console", "fit": "console", "dev": "console"}
_MAX_SHOWN = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paths:
    """Where things lie."""

    working_dir: Path  #: run directories, the lock, the file that tells clients the address; may be lost
    state_dir: Path  #: attempts, finished pairs, dead letters, undelivered results; must survive restarts
    keep_runs: bool = False  #: --debug: run directories stay after the run


@dataclasses.dataclass(frozen=True, kw_only=True)
class RmqLease:
    """How long runs hold their RabbitMQ messages (docs/leases.md)."""

    secs: float = 600.0  #: a dead runner's message returns after so long; renewed three times as often
    hand_over_secs: float = 60.0  #: a message that is held for longer moves to its lease


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queues:
    """Which queues, and how their accounts are opened."""

    match: re.Pattern[str] = re.compile(r"^(rmq|sqs|local|pubsub)_.*$")
    mismatch: re.Pattern[str] | None = None
    refresh_secs: float = 10.0
    amqp_url: str | None = dataclasses.field(default=None, repr=False)
    amqp_management_url: str | None = dataclasses.field(default=None, repr=False)
    rmq_lease: RmqLease | None = RmqLease()  #: None: RabbitMQ messages are held by their channels only
    certs: tuple[
        tuple[Path, str], ...
    ] = ()  #: directories of credentials, and what their accounts' labels begin with
    google_key: Path | None = None  #: GOOGLE_APPLICATION_CREDENTIALS: one service account's key
    pubsub_emulator: str = ""  #: PUBSUB_EMULATOR_HOST: host:port, spoken to instead of Google
    pubsub_timeout_secs: float = 5.0
    aws_ambient: bool = False
    aws_region: str = ""  #: empty: what the chain says
    sqs_timeout_secs: float = 15.0
    root: Path | None = None  #: directory queues below it; None with no other account: `<working-dir>/queue`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What of this machine the runner may give away; 0 is all that there is."""

    max_cores: int = 0
    max_mem_bytes: int = 0
    max_disk_bytes: int = 0
    cpu_only: bool = False
    gpu_cards: Path | None = None  #: slots of cards, over the built-in table (docs/gpus.md)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArtifactCache:
    """The cache of immutable artifacts; without a directory there is none."""

    directory: Path | None = None
    size_bytes: int = 0
    temporary: bool = False  #: --cache-create: made at start, removed at exit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environments:
    """How Python environments are made."""

    cache_dir: Path  #: `<state-dir>/environments`; with --run-as `<working-dir>/environments`
    cache_bytes: int = 20_000_000_000
    fallback: bool = False  #: --python-fallback: take the nearest interpreter when the wanted one is missing
    shared: bool = False  #: other users than the daemon's may read what is in it (--run-as)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Containers:
    """How experiments that bring a Docker image are run."""

    engine: str = (
        "auto"  #: "auto": docker, else podman, of the PATH; "off": none; else a program's name or path
    )
    network: str = ""  #: of the engine's networks; empty: its default
    pull: str = "missing"  #: "missing" | "always" | "never"


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
    #: opens pages and control beyond loopback
    token: str | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Which Singularity images are run, and where those from servers are kept."""

    cache_dir: Path  #: default `<state-dir>/images`
    cache_bytes: int = 20_000_000_000
    allowed: tuple[str, ...] = ()  #: patterns as `--allow-image` has them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logs:
    """What the log shows and how."""

    level: str = "info"  #: debug | info | warning | error
    format: str = "auto"  #: console | json | auto (console on a terminal)
    width: int | None = None  #: of console lines, from LOGXI_FORMAT's maxcol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """How experiments are run."""

    #: --grace: at SIGTERM runs get TERM as well, and KILL after so long; None: they go on until they are done
    grace_secs: float | None = None
    retries: int = 0  #: --retries: how often a workload that fails by itself is tried again
    metadata_schema: str = "1.0"  #: "1.0" (DESIGN.md 5.6) or "0.14"
    metadata_store: str | None = None  #: a storage URI: one manifest per attempt goes there
    allow_env_secrets: bool = True  #: storage credentials may come from `config.env` (INTEROP.md 1.6)
    enforce_limits: bool = True  #: a run that uses more than its `ram` or `hdd` is ended, not only told of
    run_as: str = ""  #: the user (name, or uid, or uid:gid) whom workloads run as; empty: the daemon's own


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
    containers: Containers
    s3: S3
    http: Http
    images: Images
    logs: Logs
    runs: Runs
    limits: Limits


def parse(argv: Sequence[str], environ: Mapping[str, str], cwd: Path = Path()) -> Config:
    """The configuration that these arguments (without the program's name) and this environment ask for.

    `--name value`, `--name=value` and `--flag`, with one dash or two; the last one counts; an argument wins over its
    variable; a variable that is empty is not set; variables of no option are none of ours. Relative paths are taken from
    `cwd`. Raises UsageError with one line that names the option or variable, what is wrong with it, and an example.
    """
    given = dict(_from_environment(environ))
    given.update(_from_arguments(argv))
    return _Builder(given, environ, cwd).build()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Given:
    """One option as it was given, for messages."""

    option: Option
    text: str
    spelling: str  #: --name or NAME

    def parsed(self) -> Any:
        option = self.option
        if not self.text and not option.default:
            return None
        try:
            value = option.kind.parse(self.text)
        except ValueError as exc:
            self.refuse(str(exc))
        if option.missing and value not in map(option.kind.parse, option.accepted):
            can = f"; only {option.accepted[0]} can be had" if option.accepted else ""
            raise errors.UsageError(f"{self.spelling}: {option.missing} is not built yet{can}: leave it out")
        return value

    def expanded(self, environ: Mapping[str, str]) -> _Given:
        """The same with each `${VAR}` replaced."""

        def lookup(match: re.Match[str]) -> str:
            if match[1] not in environ:
                self.refuse(f"the environment has no variable {match[1]}")
            return environ[match[1]]

        return dataclasses.replace(self, text=re.sub(r"\$\{(\w+)\}", lookup, self.text))

    def refuse(self, why: str) -> NoReturn:
        example = self.option.example or self.option.kind.example
        shown = "***" if self.option.secret else _shown(self.text)
        given = f"{self.spelling}={shown}" if self.text else self.spelling
        raise errors.UsageError(f"{given}: {why} (example: {self.spelling}={example})")


class _Builder:
    """Puts parsed options where they belong."""

    def __init__(self, given: dict[str, _Given], environ: Mapping[str, str], cwd: Path) -> None:
        self._given = given
        self._environ = environ
        self._cwd = cwd
        self._values = {option.name: self._value(option) for option in OPTIONS}

    def _value(self, option: Option) -> Any:
        given = self._given.get(option.name)
        if given is not None:
            return (given.expanded(self._environ) if option.expands else given).parsed()
        return option.kind.parse(option.default) if option.default else None

    def _path(self, name: str) -> Path | None:
        return self._cwd / self._values[name] if self._values[name] else None

    def build(self) -> Config:
        value = self._values
        paths = self._paths()
        host, port = value["prom-address"]
        return Config(
            paths=paths,
            queues=self._queues(paths),
            machine=Machine(
                max_cores=value["max-cores"],
                max_mem_bytes=value["max-mem"],
                max_disk_bytes=value["max-disk"],
                cpu_only=value["cpu-only"],
                gpu_cards=self._path("gpu-cards"),
            ),
            cache=self._cache(),
            environments=Environments(
                # The state directory is closed to others; environments are read by whom workloads run as.
                cache_dir=(paths.working_dir if value["run-as"] else paths.state_dir) / "environments",
                cache_bytes=value["env-cache-size"],
                fallback=value["python-fallback"],
                shared=bool(value["run-as"]),
            ),
            containers=Containers(
                engine=self._engine(),
                network=value["container-network"] or "",
                pull=value["container-pull"],
            ),
            s3=self._s3(),
            http=Http(host=host, port=port, token=value["http-token"]),
            images=Images(
                cache_dir=paths.state_dir / "images",
                cache_bytes=value["image-cache-size"],
                allowed=value["allow-image"],
            ),
            logs=self._logs(),
            runs=Runs(
                grace_secs=value["grace"],
                retries=value["retries"],
                metadata_schema=value["metadata-schema"],
                metadata_store=value["metadata-store"],
                allow_env_secrets=value["allow-env-secrets"],
                enforce_limits=value["enforce-limits"],
                run_as=value["run-as"] or "",
            ),
            limits=Limits(
                tasks=value["limit-tasks"],
                idle_secs=value["limit-idle-duration"],
                interval_secs=max(value["limit-interval"], MIN_INTERVAL_SECS),
            ),
        )

    def _paths(self) -> Paths:
        working = self._path("working-dir") or self._cwd / (self._environ.get("TMPDIR") or "/tmp")  # noqa: S108 - as the reference
        of_systemd = self._environ.get("STATE_DIRECTORY", "").partition(":")[0]
        state = self._path("state-dir") or (self._cwd / of_systemd if of_systemd else working / "state")
        return Paths(working_dir=working, state_dir=state, keep_runs=self._values["debug"])

    def _queues(self, paths: Paths) -> Queues:
        amqp_url = self._values["amqp-url"]
        named = {"": "certs-dir", "sqs-certs/": "sqs-certs", "google-certs/": "google-certs"}
        certs = tuple(
            (path, prefix) for prefix, name in named.items() if (path := self._path(name)) is not None
        )
        key = self._environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")
        root = self._path("queue-root")
        if root is None and not (amqp_url or certs or key or self._values["aws-ambient"]):
            root = paths.working_dir / "queue"
        return Queues(
            match=self._values["queue-match"],
            mismatch=self._values["queue-mismatch"],
            refresh_secs=max(self._values["queue-refresh"], MIN_REFRESH_SECS),
            amqp_url=amqp_url,
            amqp_management_url=self._values["amqp-mgt-url"],
            rmq_lease=_rmq_lease(self._values["rmq-lease"]),
            certs=certs,
            google_key=self._cwd / key if key else None,
            pubsub_emulator=self._environ.get("PUBSUB_EMULATOR_HOST", ""),
            pubsub_timeout_secs=self._values["pubsub-timeout"],
            aws_ambient=self._values["aws-ambient"],
            aws_region=self._values["aws-region"] or "",
            sqs_timeout_secs=self._values["sqs-timeout"],
            root=root,
        )

    def _cache(self) -> ArtifactCache:
        directory = self._path("cache-dir")
        size = self._values["cache-size"]
        if directory is None:
            return ArtifactCache()
        if size is None:
            self._given["cache-dir"].refuse(
                "a cache needs a size: give --cache-size=10gb (CACHE_SIZE) as well"
            )
        return ArtifactCache(directory=directory, size_bytes=size, temporary=self._values["cache-create"])

    def _engine(self) -> str:
        """A path is taken from `cwd`, as every other; a name is looked up on the PATH."""
        engine: str = self._values["container-engine"]
        return str(self._cwd / engine) if "/" in engine else engine

    def _s3(self) -> S3:
        cert, key = self._path("s3-cert"), self._path("s3-key")
        if (cert is None) != (key is None):
            lone, other = ("s3-cert", "s3-key") if cert else ("s3-key", "s3-cert")
            self._given[lone].refuse(f"a certificate and its key go together: give --{other} as well")
        return S3(ca=self._path("s3-ca"), cert=cert, key=key)

    def _logs(self) -> Logs:
        level, style = self._values["log-level"], self._values["log-format"]
        width = None
        for word in self._environ.get("LOGXI_FORMAT", "").split(","):
            name, _, number = word.strip().partition("=")
            if name == "maxcol" and number.isdecimal():
                width = int(number[:9]) or None
            elif "log-format" not in self._given:
                style = _LOGXI_FORMATS.get(name.lower(), style)
        if "log-level" not in self._given:
            level = _logxi_level(self._environ.get("LOGXI", "")) or level
        return Logs(level=level, format=style, width=width)


def _rmq_lease(secs: float | None) -> RmqLease | None:
    """0 is off; None is auto: short network cuts are covered too, and no run of a minute pays for it."""
    if secs is None:
        return RmqLease()
    return RmqLease(secs=secs, hand_over_secs=secs / 2) if secs else None


def _logxi_level(spec: str) -> str | None:
    """The level that a specification such as `*=DBG,dat:sqlx=INF` gives to everything; we have no parts to tell apart."""
    for entry in spec.split(","):
        name, equals, level = entry.strip().partition("=")
        if name != "*":
            continue
        if not equals:
            return "debug"
        if level.upper() not in _LOGXI_LEVELS:
            raise errors.UsageError(
                f"LOGXI={_shown(spec)}: no level is called {_shown(level)} (example: LOGXI='*=INF')"
            )
        return _LOGXI_LEVELS[level.upper()]
    return None


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, _Given]]:
    for option in OPTIONS:
        if option.env and (text := environ.get(option.env, "")):
            yield option.name, _Given(option=option, text=text, spelling=option.env)


def _from_arguments(argv: Sequence[str]) -> Iterator[tuple[str, _Given]]:
    """Go's rules: `-name value`, `-name=value`, `--` the same, booleans only with `=`."""
    known = {option.name: option for option in OPTIONS}
    rest = iter(argv)
    for word in rest:
        name, equals, text = word.lstrip("-").partition("=")
        if not word.startswith("-") or not name:
            raise errors.UsageError(
                f"unexpected argument {_shown(word)}: options are written --name=value, also booleans"
            )
        option = known.get(name)
        if option is None:
            import difflib

            near = difflib.get_close_matches(name, known, n=1)
            hint = f": do you mean --{near[0]}?" if near else ": --help lists them"
            raise errors.UsageError(f"unknown option --{_shown(name)}{hint}")
        if not equals:
            text = "true" if option.is_flag else next(rest, "\0")
        given = _Given(option=option, text=text, spelling=f"--{name}")
        if text == "\0":
            dataclasses.replace(given, text="").refuse("a value is missing")
        yield name, given


def _shown(text: str) -> str:
    """A value for a message: one line, not too long, without the user-info of a URL."""
    text = re.sub(r"://[^/\s]*@", "://***@", text)
    text = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
    return text if text and text.isprintable() else repr(text)
