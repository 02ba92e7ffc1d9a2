"""`studio-runner submit`: packs a directory, uploads it, publishes the message, and follows it if asked to."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runner import config, errors, kinds, units
from runner.cli import show
from runner.client import message
from runner.client.api import Daemon
from runner.client.follow import End, follow
from runner.client.order import Capture, Order, Queue
from runner.client.submit import Submitted, submit
from runner.storage.registry import Stores
from runner.storage.transport import Patience

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

EXIT_INTERRUPTED = 130
_PYTHON = re.compile(r"\d+(\.\d+){0,2}", re.ASCII)
_VARIABLE = re.compile(r"[^=\0]+=[^\0]*")
#: For one question while following: the next one is asked soon.
_PATIENCE = Patience(connect_secs=5.0, stall_secs=10.0, attempts=2, retry_secs=10.0)

_WHERE, _WHAT, _NEEDS, _LIMITS, _AFTER = "Where", "What", "Needs", "Limits", "Afterwards"


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("submit", no_args_is_help=True)(verb)


def verb(  # noqa: PLR0917 - one parameter an option: that is how typer reads them
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The workspace; all of it is packed.")],
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- SCRIPT ARGS...", help="What to run in it: a script, or -m and a module."),
    ],
    queue: Annotated[
        str,
        typer.Option(
            "--queue",
            metavar="NAME",
            help="rmq_... is RabbitMQ, local_... a directory.",
            rich_help_panel=_WHERE,
        ),
    ],
    amqp_url: Annotated[
        str | None,
        typer.Option(envvar="AMQP_URL", metavar="URL", help="The RabbitMQ broker.", rich_help_panel=_WHERE),
    ] = None,
    queue_root: Annotated[
        Path | None,
        typer.Option(
            envvar="QUEUE_ROOT", help="Directory of queues (WORKING_DIR/queue)", rich_help_panel=_WHERE
        ),
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="WORKING_DIR",
            help="The working directory of a daemon here ($TMPDIR, else /tmp)",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            envvar="STUDIO_STORAGE",
            metavar="URL|PATH",
            help="Where artifacts go: http(s)://host:port/bucket (S3), s3://host/bucket, or a directory. Keys are "
            "taken from AWS_ACCESS_KEY_ID and its like (WORKING_DIR/storage)",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    persistent: Annotated[
        bool,
        typer.Option(
            "--persistent",
            metavar="",
            help="Make the queue durable, if it is not there yet.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
    experiment: Annotated[
        str, typer.Option(metavar="KEY", help="Its name (<seconds>_<uuid>)", rich_help_panel=_WHAT)
    ] = "",
    project: Annotated[
        str | None, typer.Option(metavar="NAME", help="What it belongs to.", rich_help_panel=_WHAT)
    ] = None,
    python: Annotated[
        str,
        typer.Option(metavar="VERSION", help="Such as 3.11 (that of this program)", rich_help_panel=_WHAT),
    ] = "",
    image: Annotated[
        str,
        typer.Option(
            metavar="IMAGE", help="Run in this Docker image, with its Python.", rich_help_panel=_WHAT
        ),
    ] = "",
    requirements: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Packages to install.", rich_help_panel=_WHAT)
    ] = None,
    pip: Annotated[
        list[str] | None,
        typer.Option(metavar="LINE", help="One more package; repeatable.", rich_help_panel=_WHAT),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A variable of the workload; repeatable.", rich_help_panel=_WHAT
        ),
    ] = None,
    capture: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR:TAG",
            help="A directory that goes along as ../TAG and comes back; repeatable.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    capture_once: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE:TAG",
            help="A path or URL that goes along as ../TAG, to be read; repeatable.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Cores.", rich_help_panel=_NEEDS)
    ] = None,
    ram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory: 3gb, 2GiB.", rich_help_panel=_NEEDS)
    ] = None,
    hdd: Annotated[str | None, typer.Option(metavar="SIZE", help="Disk.", rich_help_panel=_NEEDS)] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="GPU slots.", rich_help_panel=_NEEDS)
    ] = None,
    gpu_mem: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of each GPU.", rich_help_panel=_NEEDS)
    ] = None,
    gpu_count: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="So many cards, the slots spread over them.", rich_help_panel=_NEEDS
        ),
    ] = None,
    max_duration: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="How long it may run: 1h30m.", rich_help_panel=_LIMITS),
    ] = None,
    lifetime: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION", help="When it is of no use any more, from now.", rich_help_panel=_LIMITS
        ),
    ] = None,
    save_frequency: Annotated[
        str,
        typer.Option(
            metavar="DURATION", help="How often results are stored while it runs.", rich_help_panel=_LIMITS
        ),
    ] = "1m",
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            metavar="",
            help="Follow it: its output, and in the end its exit code.",
            rich_help_panel=_AFTER,
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", metavar="", help="One JSON object a line, for programs.", rich_help_panel=_AFTER
        ),
    ] = False,
    address: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", help="The daemon to ask (found in WORKING_DIR)", rich_help_panel=_AFTER
        ),
    ] = "",
    token: Annotated[
        str | None, typer.Option(envvar="HTTP_TOKEN", help="Its --http-token.", rich_help_panel=_AFTER)
    ] = None,
) -> None:
    """Submit an experiment: pack DIR, upload it, publish the message.

    studio-runner submit examples/digits --queue local_demo --requirements examples/digits/requirements.txt --wait -- train.py --epochs 20
    """
    working = (working_dir or Path(os.environ.get("TMPDIR") or "/tmp")).absolute()  # noqa: S108 - as `serve` has it
    where = Queue.named(
        queue, amqp_url=_amqp_url(amqp_url, os.environ), root=(queue_root or working / "queue").absolute()
    )
    order = Order(
        directory=directory.absolute(),
        command=command,
        queue=where,
        storage=_storage(storage, where, working),
        key=experiment,
        captures=[
            *(Capture.parse(text, mutable=True) for text in capture or ()),
            *(Capture.parse(text, mutable=False) for text in capture_once or ()),
        ],
        credentials=_credentials(os.environ),
        requirements=[*_lines(requirements), *(pip or ())],
        python=_python(python),
        project=project,
        resources=_resources(cpus=cpus, ram=ram, hdd=hdd, gpus=gpus, gpu_mem=gpu_mem, gpu_count=gpu_count),
        image=image,
        max_duration=_checked("max-duration", max_duration, units.parse_duration),
        lifetime=_checked("lifetime", lifetime, units.parse_duration),
        save_frequency=_checked("save-frequency", save_frequency, units.parse_duration) or "1m",
        env=dict(_variable(text) for text in env or ()),
        persistent=persistent,
    )
    _check_apart(order, working)
    daemon = Daemon(address=address, working_dir=None if address else working, token=token)
    raise typer.Exit(run(order, daemon if wait else None, show.chosen(as_json=as_json), wait=wait))


def run(order: Order, daemon: Daemon | None, shown: show.Show, *, wait: bool) -> int:
    """Submit, and follow if asked to; the exit code."""
    submitted: Submitted | None = None
    stores = Stores(config.S3())
    try:
        with shown:
            submitted = submit(order, stores, shown)
            shown.submitted(submitted)
            return asyncio.run(_wait(submitted, daemon, shown)) if wait else 0
    except KeyboardInterrupt:
        told = (
            "interrupted: nothing was submitted"
            if submitted is None
            else f"interrupted: the experiment {submitted.key} goes on without us"
        )
        print(told, file=sys.stderr)  # noqa: T201 - the last word
        return EXIT_INTERRUPTED
    finally:
        stores.close()


async def _wait(submitted: Submitted, daemon: Daemon | None, shown: show.Show) -> int:
    stores = Stores(config.S3(), patience=_PATIENCE)
    async for event in follow(submitted, stores, daemon):
        shown.event(event)
        if isinstance(event, End):
            return event.ending.code
    raise AssertionError  # the last event is an End


def _amqp_url(text: str | None, environ: Mapping[str, str]) -> str | None:
    """As `serve` reads it: `${VAR}` is taken from the environment."""
    if text is None:
        return None

    def lookup(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise errors.UsageError(f"--amqp-url: the environment has no variable {match[1]}")
        return environ[match[1]]

    try:
        url: str = kinds.AMQP_URL.parse(re.sub(r"\$\{(\w+)\}", lookup, text))
    except ValueError as exc:
        raise errors.UsageError(f"--amqp-url: {exc} (example: {kinds.AMQP_URL.example})") from exc
    return url


def _storage(text: str | None, queue: Queue, working_dir: Path) -> message.Storage:
    if text is None and queue.amqp_url is not None:
        raise errors.UsageError(
            f"--queue={queue.name} may be served by other machines: say where artifacts go with --storage (STUDIO_STORAGE)"
        )
    return message.Storage.parse(text or str(working_dir / "storage"), Path.cwd())


def _credentials(environ: Mapping[str, str]) -> message.Credentials | None:
    access, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
    if bool(access) != bool(secret):
        raise errors.UsageError(
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together: only one of them is set"
        )
    if not access or not secret:
        return None
    return message.Credentials(
        access_key=access,
        secret_access_key=secret,
        session_token=environ.get("AWS_SESSION_TOKEN") or None,
        region=environ.get("AWS_DEFAULT_REGION") or None,
    )


def _lines(file: Path | None) -> list[str]:
    """Requirement lines, continued ones joined."""
    if file is None:
        return []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise errors.UsageError(f"--requirements={file}: cannot be read: {exc}") from exc
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _python(text: str) -> str:
    if not text:
        return f"{sys.version_info.major}.{sys.version_info.minor}"
    if not _PYTHON.fullmatch(text):
        raise errors.UsageError(f"--python={text}: not a version; examples: 3, 3.11")
    return text


def _resources(
    *,
    cpus: int | None,
    ram: str | None,
    hdd: str | None,
    gpus: int | None,
    gpu_mem: str | None,
    gpu_count: int | None,
) -> dict[str, int | str]:
    """`resources_needed`; what was not given is left out."""
    asked = {
        "gpus": gpus,
        "cpus": cpus,
        "ram": _checked("ram", ram, units.parse_bytes),
        "hdd": _checked("hdd", hdd, units.parse_bytes),
        "gpuMem": _checked("gpu-mem", gpu_mem, units.parse_bytes),
        "gpuCount": gpu_count,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _checked(name: str, text: str | None, parse: Callable[[object], object]) -> str | None:
    """The text itself: the runner reads it, as it would the client's."""
    if text is not None:
        try:
            parse(text)
        except ValueError as exc:
            raise errors.UsageError(f"--{name}: {exc}") from exc
    return text


def _variable(text: str) -> tuple[str, str]:
    if not _VARIABLE.fullmatch(text):
        raise errors.UsageError(f"--env={text}: written as NAME=VALUE")
    name, _, value = text.partition("=")
    return name, value


def _check_apart(order: Order, working_dir: Path) -> None:
    """The runner's own files do not go along."""
    inside = [working_dir / "state", working_dir / "queue", working_dir / "storage"]
    if order.queue.root is not None:
        inside.append(order.queue.root)
    if order.storage.type == "local":
        inside.append(Path(order.storage.endpoint) / order.storage.bucket)
    for path in inside:
        if path.exists() and path.resolve().is_relative_to(order.directory.resolve()):
            raise errors.UsageError(
                f"{order.directory} holds {path}, which would be packed with it: keep the two apart (--working-dir, --storage)"
            )
