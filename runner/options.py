"""The one table behind flags, environment variables, `--help`, docs/configuration.md and `config.parse`. No I/O.

Names and meanings are the reference's where it has the option (INTEROP.md 9.1); DESIGN.md 5.1, 5.9 and 5.10 overrule.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from runner import kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One option of `serve`: `--name=value`, or the environment variable `env`."""

    name: str
    group: str
    kind: kinds.Kind
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
        return self.kind is kinds.FLAG


def _group(group: str, *rows: Option) -> tuple[Option, ...]:
    return tuple(dataclasses.replace(row, group=group) for row in rows)


def _o(name: str, kind: kinds.Kind, default: str, text: str, **more: Any) -> Option:
    return Option(name=name, group="", kind=kind, default=default, help=text, **more)


OPTIONS: tuple[Option, ...] = (
    *_group(
        "Queues",
        _o(
            "queue-match",
            kinds.REGEX,
            r"^(rmq|sqs|local|pubsub)_.*$",
            "take work from queues whose name matches",
        ),
        _o(
            "queue-mismatch",
            kinds.REGEX,
            "",
            "but not from those whose name matches this",
            example="'_test$'",
        ),
        _o(
            "queue-refresh",
            kinds.DURATION,
            "10s",
            "how often to look for new and deleted queues; at least 1s",
            example="10s",
        ),
        _o(
            "amqp-url",
            kinds.AMQP_URL,
            "",
            "the RabbitMQ broker; ${VAR} is taken from the environment",
            expands=True,
            secret=True,
        ),
        _o(
            "amqp-mgt-url",
            kinds.HTTP_URL,
            "",
            "its management API, where it is not at the broker's host, port 15672",
            expands=True,
            secret=True,
        ),
        _o(
            "certs-dir",
            kinds.PATH,
            "",
            "a directory of credentials, watched: each file or folder in it opens an account",
            example="/etc/studio-runner/certs",
        ),
        _o(
            "sqs-certs",
            kinds.PATH,
            "",
            "one more of these; by custom of AWS folders (credentials and config)",
        ),
        _o("google-certs", kinds.PATH, "", "one more of these; by custom of Google service accounts' JSON"),
        _o(
            "aws-ambient", kinds.FLAG, "false", "SQS by AWS's own chain: environment, home directory, machine"
        ),
        _o(
            "aws-region",
            kinds.TEXT,
            "",
            "its region (the variable AWS_REGION is not ours)",
            in_env=False,
            default_text="what the chain says, else us-west-2",
        ),
        _o("sqs-timeout", kinds.DURATION, "15s", "limit of an SQS call"),
        _o("pubsub-timeout", kinds.DURATION, "5s", "limit of a Pub/Sub call"),
        _o(
            "rmq-lease",
            kinds.LEASE,
            "auto",
            "how long the RabbitMQ message of a long run outlives its runner; auto: 10 minutes, from a minute on",
        ),
        _o(
            "queue-root",
            kinds.PATH,
            "",
            "queues that are directories below this one",
            default_text="`<working-dir>/queue` if no other queues are configured",
        ),
    ),
    *_group(
        "Directories",
        _o(
            "working-dir",
            kinds.PATH,
            "",
            "runs live and die here; may be lost",
            default_text="`$TMPDIR`, else `/tmp`",
        ),
        _o(
            "state-dir",
            kinds.PATH,
            "",
            "attempts, dead letters, undelivered results; must survive restarts",
            default_text="`$STATE_DIRECTORY`, else `<working-dir>/state`",
        ),
        _o(
            "debug",
            kinds.FLAG,
            "false",
            "keep the directories of runs that ended; the next start without it removes them",
        ),
    ),
    *_group(
        "Machine",
        _o("cpu-only", kinds.FLAG, "false", "use no GPU, and do not look for any"),
        _o(
            "gpu-cards",
            kinds.PATH,
            "",
            "slots of GPU models (TOML), over the built-in table",
            example="/etc/studio-runner/cards.toml",
        ),
        _o("max-cores", kinds.COUNT, "0", "cores to give to experiments; 0: all"),
        _o("max-mem", kinds.SIZE, "0gb", "memory to give to experiments; 0: all that is available"),
        _o(
            "max-disk",
            kinds.SIZE,
            "0gb",
            "disk below working-dir to give to experiments; 0: what is free, but a reserve",
        ),
    ),
    *_group(
        "Artifacts",
        _o(
            "cache-dir",
            kinds.PATH,
            "",
            "cache of immutable artifacts; unset: none",
            example="/var/cache/studio-runner",
        ),
        _o("cache-size", kinds.CACHE_SIZE, "", "how large it may grow (from 100 MB); needed with cache-dir"),
        _o("cache-create", kinds.FLAG, "false", "make the cache directory at start, remove it at exit"),
        _o(
            "s3-ca",
            kinds.PATH,
            "",
            "certificates (PEM) to trust S3 endpoints by",
            example="/etc/ssl/s3-ca.pem",
        ),
        _o("s3-cert", kinds.PATH, "", "client certificate (PEM) for S3 endpoints", example="/etc/ssl/s3.pem"),
        _o("s3-key", kinds.PATH, "", "its key (PEM)", example="/etc/ssl/s3.key"),
        _o(
            "allow-env-secrets",
            kinds.FLAG,
            "true",
            "storage credentials may come from a message's config.env",
        ),
    ),
    *_group(
        "Experiments",
        _o(
            "env-cache-size",
            kinds.SIZE,
            "20gb",
            "how large the cache of Python environments may grow",
            example="20gb",
        ),
        _o(
            "enforce-limits",
            kinds.FLAG,
            "true",
            "end runs that use more memory or disk than they have asked for; false: tell of it in the log",
        ),
        _o(
            "run-as",
            kinds.USER,
            "",
            "the user whom experiments run as (needs root)",
            default_text="the daemon's own",
            example="nobody",
        ),
        _o(
            "python-fallback",
            kinds.FLAG,
            "false",
            "take the nearest interpreter when the wanted one is missing",
        ),
        _o(
            "container-engine",
            kinds.ENGINE,
            "auto",
            "what runs experiments that bring a Docker image; auto: docker or podman, if there is one",
        ),
        _o(
            "container-network",
            kinds.NETWORK,
            "",
            "network of their containers",
            default_text="the engine's",
        ),
        _o("container-pull", kinds.PULL, "missing", "when images are fetched from their registries"),
        _o("retries", kinds.COUNT, "0", "how often to repeat a workload that fails by itself", example="2"),
        _o("metadata-schema", kinds.SCHEMA, "1.0", "layout of the scraped document", example="0.14"),
        _o("metadata-store", kinds.STORE, "", "a storage location that gets a manifest of each attempt"),
        _o(
            "allow-image",
            kinds.IMAGES,
            "shub://sentient-singularity/,dockerhub://tensorflow/,artifact:",
            "Singularity images that messages may name, separated by commas; artifact: is image files from storage",
        ),
        _o(
            "image-cache-size",
            kinds.SIZE,
            "20gb",
            "how large the cache of Singularity images may grow",
            example="20gb",
        ),
    ),
    *_group(
        "Stopping",
        _o(
            "grace",
            kinds.DURATION,
            "",
            "at SIGTERM, end the runs as well: TERM at once, and KILL after so long",
            default_text="they go on until they are done",
            example="10m",
        ),
        _o("limit-tasks", kinds.COUNT, "0", "end after having started so many experiments; 0: never"),
        _o(
            "limit-idle-duration",
            kinds.DURATION,
            "0s",
            "end after having had no work for so long; 0: never",
            example="1h",
        ),
        _o(
            "limit-interval",
            kinds.DURATION,
            "5s",
            "how often to look at these limits; at least 2s",
            example="5s",
        ),
    ),
    *_group(
        "Seeing",
        _o(
            "prom-address",
            kinds.ADDRESS,
            ":9090",
            "where metrics, health and pages are served; port 0: any free one",
        ),
        _o("http-token", kinds.TOKEN, "", "opens pages and control to other machines", secret=True),
        _o(
            "log-level",
            kinds.LEVEL,
            "info",
            "what the log shows",
            default_text="`LOGXI`, else `info`",
            example="debug",
        ),
        _o(
            "log-format",
            kinds.FORMAT,
            "auto",
            "auto: console on a terminal, else json",
            default_text="`LOGXI_FORMAT`, else `auto`",
        ),
    ),
    *_group(
        "Not built yet (refused, never ignored)",
        _o(
            "clear-text-messages",
            kinds.FLAG,
            "true",
            "take messages that are not encrypted",
            missing="encryption",
            accepted=("true",),
        ),
        _o("encrypt-dir", kinds.PATH, "", "keys for encrypted messages", missing="encryption"),
        _o("request-signatures-dir", kinds.PATH, "", "keys that sign requests", missing="signing"),
        _o(
            "response-signatures-dir",
            kinds.PATH,
            "",
            "keys that encrypt reports",
            missing="the encryption of reports",
        ),
        _o(
            "k8s-namespace",
            kinds.TEXT,
            "default",
            "namespace of the ConfigMaps",
            missing="the Kubernetes ConfigMap",
        ),
        _o(
            "k8s-configmap",
            kinds.TEXT,
            "studioml-go-runner",
            "ConfigMap with the state",
            missing="the Kubernetes ConfigMap",
        ),
        _o(
            "schema-logs",
            kinds.FLAG,
            "false",
            "output lines become metadata",
            missing="metadata of output lines",
            accepted=("false",),
        ),
        _o(
            "generate-metadata",
            kinds.FLAG,
            "false",
            "metadata lines in the output",
            missing="writing metadata into the output",
            accepted=("false",),
        ),
        _o("cpu-profile", kinds.PATH, "", "write a profile", missing="profiling"),
        _o("slack-hook", kinds.TEXT, "", "Slack web hook", missing="Slack", secret=True),
        _o("slack-room", kinds.TEXT, "", "Slack channel", missing="Slack"),
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
