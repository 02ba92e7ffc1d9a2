"""The one table behind flags, environment variables, `--help`, docs/configuration.md and `config.parse`. No I/O.

Names and meanings are the reference's where it has the option (INTEROP.md 9.1); DESIGN.md 5.1, 5.9 and 5.10 overrule.
"""

from __future__ import annotations

import dataclasses
import re
import urllib.parse
from typing import TYPE_CHECKING, Any

from runner import units

if TYPE_CHECKING:
    from collections.abc import Callable

MIN_CACHE_BYTES = 100_000_000
MIN_LEASE_SECS = 1.0
MAX_LEASE_SECS = 24 * 3600.0
_MAX_PORT = 65535
_IMAGE_PATTERN = re.compile(r"artifact:|(docker|dockerhub|library|shub)://[A-Za-z0-9._:/@*-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How a value is written. `parse` raises ValueError with the reason, without the value (it may be secret)."""

    metavar: str
    parse: Callable[[str], Any]
    example: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One option of `serve`: `--name=value`, or the environment variable `env`."""

    name: str
    group: str
    kind: Kind
    default: (
        str  #: as it would be written; empty: unset. See `default_text` for those that depend on the machine
    )
    help: str
    default_text: str = ""  #: what the documentation says instead of `default`
    example: str = ""  #: for messages; empty: the kind's
    expands: bool = False  #: `${VAR}` in its value is taken from the environment
    secret: bool = False  #: its value is never shown
    missing: str = ""  #: the capability that is not built yet: given, the option is refused, never ignored
    accepted: tuple[str, ...] = ()  #: values of such an option that ask for what is done anyway
    in_env: bool = True  #: False where the variable's name already means something else to everybody

    @property
    def env(self) -> str | None:
        """Its environment variable."""
        return self.name.upper().replace("-", "_") if self.in_env else None

    @property
    def is_flag(self) -> bool:
        """Whether `--name` alone is `--name=true`."""
        return self.kind is FLAG


def _flag(text: str) -> bool:
    word = text.strip().lower()
    if word in {"1", "t", "true", "yes", "on"}:
        return True
    if word in {"0", "f", "false", "no", "off"}:
        return False
    raise ValueError("neither true nor false")


def _count(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError("not a whole number from 0 on")
    return int(text[:20])


def _size(text: str) -> int:
    try:
        return units.parse_bytes(text)
    except ValueError as exc:
        raise ValueError("not a size (b, kb, mb, gb, tb are decimal; kib, mib, gib, tib binary)") from exc


def _cache_size(text: str) -> int:
    size = _size(text)
    if size < MIN_CACHE_BYTES:
        raise ValueError(f"less than {units.format_bytes(MIN_CACHE_BYTES)}")
    return size


def _duration(text: str) -> float:
    try:
        secs = units.parse_duration(text)
    except ValueError as exc:
        raise ValueError("not a duration (units ms, s, m, h, d)") from exc
    if secs < 0:
        raise ValueError("a negative duration")
    return secs


def _lease(text: str) -> float | None:
    """Seconds; 0 for off, None for auto."""
    word = text.strip().lower()
    if word in {"off", "auto"}:
        return 0.0 if word == "off" else None
    secs = _duration(word)
    if not MIN_LEASE_SECS <= secs <= MAX_LEASE_SECS:
        raise ValueError(f"not from {MIN_LEASE_SECS:g} s to a day")
    return secs


def _regex(text: str) -> re.Pattern[str]:
    if not text:
        raise ValueError("empty; '.*' takes every queue")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as exc:
        raise ValueError(f"not a regular expression: {exc}") from exc


def _url(*schemes: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        text = text.strip()  # a file that became a variable ends with a newline
        try:
            parts = urllib.parse.urlsplit(text)
            host, _ = parts.hostname, parts.port
        except ValueError as exc:  # its text shows parts of the URL, perhaps of a password
            raise ValueError(
                "not a URL; characters such as / @ : % in a password must be percent-encoded"
            ) from exc
        if parts.scheme not in schemes:
            raise ValueError(f"its scheme is not {' or '.join(schemes)}")
        if not host:
            raise ValueError("it names no host")
        return text

    return parse


def _store(text: str) -> str:
    if not re.match(r"[a-z][a-z0-9+.-]*:.", text):
        raise ValueError("not the URI of a storage location")
    return text


def _image_patterns(text: str) -> tuple[str, ...]:
    patterns = tuple(text.replace(",", " ").split())
    if not all(_IMAGE_PATTERN.fullmatch(pattern) for pattern in patterns):
        raise ValueError(
            "a pattern is artifact: or begins with docker://, dockerhub://, library:// or shub://, and '*' is any text"
        )
    return patterns


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if (
        not colon
        or not port.isdecimal()
        or int(port) > _MAX_PORT
        or (":" in host and not host.startswith("["))
    ):
        raise ValueError("not host:port (an IPv6 address in brackets)")
    return host.strip("[]"), int(port)


def _user(text: str) -> str:
    if not re.fullmatch(r"[a-z_][a-z0-9_.-]*\$?|\d{1,10}(:\d{1,10})?", text.strip(), re.IGNORECASE):
        raise ValueError("neither the name of a user nor UID or UID:GID")
    return text.strip()


def _token(text: str) -> str:
    text = text.strip()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("only visible ASCII characters can stand in a header")
    return text


def _choice(*words: str, also: dict[str, str] | None = None) -> Kind:
    def parse(text: str) -> str:
        word = (also or {}).get(text.lower(), text.lower())
        if word not in words:
            raise ValueError(f"none of {', '.join(words)}")
        return word

    return Kind(metavar="|".join(words), parse=parse, example=words[-1])


def _engine(text: str) -> str:
    word = text.strip()
    if not word or word.startswith("-"):
        raise ValueError("not auto, off, or a program")
    return word


def _network(text: str) -> str:
    word = text.strip()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]*", word, re.ASCII):
        raise ValueError("not the name of a network")
    return word


TEXT = Kind(metavar="TEXT", parse=str, example="text")
PATH = Kind(metavar="PATH", parse=str, example="/var/lib/studio-runner")
FLAG = Kind(metavar="BOOL", parse=_flag, example="true")
COUNT = Kind(metavar="N", parse=_count, example="4")
SIZE = Kind(metavar="SIZE", parse=_size, example="512gb")
CACHE_SIZE = Kind(metavar="SIZE", parse=_cache_size, example="10gb")
DURATION = Kind(metavar="DURATION", parse=_duration, example="1h30m")
LEASE = Kind(metavar="off|auto|SECONDS", parse=_lease, example="600")
REGEX = Kind(metavar="REGEX", parse=_regex, example="'^(rmq|local)_.*$'")
AMQP_URL = Kind(metavar="URL", parse=_url("amqp", "amqps"), example="'amqp://${USER}:${PASSWORD}@host:5672/'")
HTTP_URL = Kind(metavar="URL", parse=_url("http", "https"), example="http://host:15672")
IMAGES = Kind(
    metavar="PATTERNS", parse=_image_patterns, example="shub://sentient-singularity/,docker://ghcr.io/us/*"
)
STORE = Kind(metavar="URI", parse=_store, example="s3://host:9000/bucket/prefix")
ADDRESS = Kind(metavar="HOST:PORT", parse=_address, example=":9090")
TOKEN = Kind(metavar="TOKEN", parse=_token, example='"$(openssl rand -hex 16)"')
USER = Kind(metavar="USER", parse=_user, example="nobody")
LEVEL = _choice("debug", "info", "warning", "error", also={"warn": "warning"})
FORMAT = _choice("auto", "console", "json")
SCHEMA = _choice("1.0", "0.14")
ENGINE = Kind(metavar="auto|off|PROGRAM", parse=_engine, example="/usr/bin/podman")
NETWORK = Kind(metavar="NETWORK", parse=_network, example="none")
PULL = _choice("missing", "always", "never")


def _group(group: str, *rows: Option) -> tuple[Option, ...]:
    return tuple(dataclasses.replace(row, group=group) for row in rows)


def _o(name: str, kind: Kind, default: str, text: str, **more: Any) -> Option:
    return Option(name=name, group="", kind=kind, default=default, help=text, **more)


OPTIONS: tuple[Option, ...] = (
    *_group(
        "Queues",
        _o("queue-match", REGEX, r"^(rmq|sqs|local|pubsub)_.*$", "take work from queues whose name matches"),
        _o("queue-mismatch", REGEX, "", "but not from those whose name matches this", example="'_test$'"),
        _o("queue-refresh", DURATION, "10s", "how often to look for new and deleted queues", example="10s"),
        _o(
            "amqp-url",
            AMQP_URL,
            "",
            "the RabbitMQ broker; ${VAR} is taken from the environment",
            expands=True,
            secret=True,
        ),
        _o(
            "amqp-mgt-url",
            HTTP_URL,
            "",
            "its management API, where it is not at the broker's host, port 15672",
            expands=True,
            secret=True,
        ),
        _o(
            "certs-dir",
            PATH,
            "",
            "a directory of credentials, watched: each file or folder in it opens an account",
            example="/etc/studio-runner/certs",
        ),
        _o("sqs-certs", PATH, "", "one more of these; by custom of AWS folders (credentials and config)"),
        _o("google-certs", PATH, "", "one more of these; by custom of Google service accounts' JSON"),
        _o("aws-ambient", FLAG, "false", "SQS by AWS's own chain: environment, home directory, machine"),
        _o(
            "aws-region",
            TEXT,
            "",
            "its region (the variable AWS_REGION is not ours)",
            in_env=False,
            default_text="what the chain says, else us-west-2",
        ),
        _o("sqs-timeout", DURATION, "15s", "limit of an SQS call"),
        _o("pubsub-timeout", DURATION, "5s", "limit of a Pub/Sub call"),
        _o(
            "rmq-lease",
            LEASE,
            "auto",
            "how long the RabbitMQ message of a long run outlives its runner; auto: 10 minutes, from a minute on",
        ),
        _o(
            "queue-root",
            PATH,
            "",
            "queues that are directories below this one",
            default_text="`<working-dir>/queue` if no other queues are configured",
        ),
    ),
    *_group(
        "Directories",
        _o(
            "working-dir",
            PATH,
            "",
            "runs live and die here; may be lost",
            default_text="`$TMPDIR`, else `/tmp`",
        ),
        _o(
            "state-dir",
            PATH,
            "",
            "attempts, dead letters, undelivered results; must survive restarts",
            default_text="`$STATE_DIRECTORY`, else `<working-dir>/state`",
        ),
        _o("debug", FLAG, "false", "keep the directories of runs that ended"),
    ),
    *_group(
        "Machine",
        _o("cpu-only", FLAG, "false", "use no GPU, and do not look for any"),
        _o(
            "gpu-cards",
            PATH,
            "",
            "slots of GPU models (TOML), over the built-in table",
            example="/etc/studio-runner/cards.toml",
        ),
        _o("max-cores", COUNT, "0", "cores to give to experiments; 0: all"),
        _o("max-mem", SIZE, "0gb", "memory to give to experiments; 0: all that is available"),
        _o(
            "max-disk",
            SIZE,
            "0gb",
            "disk below working-dir to give to experiments; 0: what is free, but a reserve",
        ),
    ),
    *_group(
        "Artifacts",
        _o(
            "cache-dir",
            PATH,
            "",
            "cache of immutable artifacts; unset: none",
            example="/var/cache/studio-runner",
        ),
        _o("cache-size", CACHE_SIZE, "", "how large it may grow (from 100 MB); needed with cache-dir"),
        _o("cache-create", FLAG, "false", "make the cache directory at start, remove it at exit"),
        _o("s3-ca", PATH, "", "certificates (PEM) to trust S3 endpoints by", example="/etc/ssl/s3-ca.pem"),
        _o("s3-cert", PATH, "", "client certificate (PEM) for S3 endpoints", example="/etc/ssl/s3.pem"),
        _o("s3-key", PATH, "", "its key (PEM)", example="/etc/ssl/s3.key"),
        _o("allow-env-secrets", FLAG, "true", "storage credentials may come from a message's config.env"),
    ),
    *_group(
        "Experiments",
        _o(
            "env-cache-size",
            SIZE,
            "20gb",
            "how large the cache of Python environments may grow",
            example="20gb",
        ),
        _o(
            "enforce-limits",
            FLAG,
            "true",
            "end runs that use more memory or disk than they have asked for; false: tell of it in the log",
        ),
        _o(
            "run-as",
            USER,
            "",
            "the user whom experiments run as (needs root)",
            default_text="the daemon's own",
            example="nobody",
        ),
        _o("python-fallback", FLAG, "false", "take the nearest interpreter when the wanted one is missing"),
        _o(
            "container-engine",
            ENGINE,
            "auto",
            "what runs experiments that bring a Docker image; auto: docker or podman, if there is one",
        ),
        _o(
            "container-network",
            NETWORK,
            "",
            "network of their containers",
            default_text="the engine's",
        ),
        _o("container-pull", PULL, "missing", "when images are fetched from their registries"),
        _o("retries", COUNT, "0", "how often to repeat a workload that fails by itself", example="2"),
        _o("metadata-schema", SCHEMA, "1.0", "layout of the scraped document", example="0.14"),
        _o("metadata-store", STORE, "", "a storage location that gets a manifest of each attempt"),
        _o(
            "allow-image",
            IMAGES,
            "shub://sentient-singularity/,dockerhub://tensorflow/,artifact:",
            "Singularity images that messages may name, separated by commas; artifact: is image files from storage",
        ),
        _o(
            "image-cache-size",
            SIZE,
            "20gb",
            "how large the cache of Singularity images may grow",
            example="20gb",
        ),
    ),
    *_group(
        "Stopping",
        _o(
            "grace",
            DURATION,
            "",
            "how long runs may go on after SIGTERM",
            default_text="until they are done",
            example="10m",
        ),
        _o("limit-tasks", COUNT, "0", "end after having started so many experiments; 0: never"),
        _o(
            "limit-idle-duration",
            DURATION,
            "0s",
            "end after having had no work for so long; 0: never",
            example="1h",
        ),
        _o("limit-interval", DURATION, "5s", "how often to look at these limits; at least 2s", example="5s"),
    ),
    *_group(
        "Seeing",
        _o(
            "prom-address",
            ADDRESS,
            ":9090",
            "where metrics, health and pages are served; port 0: any free one",
        ),
        _o("http-token", TOKEN, "", "opens pages and control to other machines", secret=True),
        _o(
            "log-level",
            LEVEL,
            "info",
            "what the log shows",
            default_text="`LOGXI`, else `info`",
            example="debug",
        ),
        _o(
            "log-format",
            FORMAT,
            "auto",
            "auto: console on a terminal, else json",
            default_text="`LOGXI_FORMAT`, else `auto`",
        ),
    ),
    *_group(
        "Not built yet (refused, never ignored)",
        _o(
            "clear-text-messages",
            FLAG,
            "true",
            "take messages that are not encrypted",
            missing="encryption",
            accepted=("true",),
        ),
        _o("encrypt-dir", PATH, "", "keys for encrypted messages", missing="encryption"),
        _o("request-signatures-dir", PATH, "", "keys that sign requests", missing="signing"),
        _o(
            "response-signatures-dir",
            PATH,
            "",
            "keys that encrypt reports",
            missing="the encryption of reports",
        ),
        _o(
            "k8s-namespace",
            TEXT,
            "default",
            "namespace of the ConfigMaps",
            missing="the Kubernetes ConfigMap",
        ),
        _o(
            "k8s-configmap",
            TEXT,
            "studioml-go-runner",
            "ConfigMap with the state",
            missing="the Kubernetes ConfigMap",
        ),
        _o(
            "schema-logs",
            FLAG,
            "false",
            "output lines become metadata",
            missing="metadata of output lines",
            accepted=("false",),
        ),
        _o(
            "generate-metadata",
            FLAG,
            "false",
            "metadata lines in the output",
            missing="writing metadata into the output",
            accepted=("false",),
        ),
        _o("cpu-profile", PATH, "", "write a profile", missing="profiling"),
        _o("slack-hook", TEXT, "", "Slack web hook", missing="Slack", secret=True),
        _o("slack-room", TEXT, "", "Slack channel", missing="Slack"),
    ),
)

#: Variables that mean something without being an option's.
VARIABLES: tuple[tuple[str, str], ...] = (
    ("TMPDIR", "default of `working-dir`"),
    ("STATE_DIRECTORY", "default of `state-dir`; systemd sets it (`StateDirectory=`)"),
    ("LOGXI", "default of `log-level`, as the reference takes it: `*=DBG`, `*=INF`, `*=WRN`, `*=ERR`"),
    (
        "LOGXI_FORMAT",
        "default of `log-format`, as the reference takes it: `happy`, `text`, `JSON`; `maxcol=1024` is the width of console lines",
    ),
)
