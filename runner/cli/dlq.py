"""`studio-runner dlq list | show | requeue | drop`: messages that were given up."""

from __future__ import annotations

import sys
from typing import Annotated, Any
from urllib.parse import quote

import orjson
import typer

from runner import errors
from runner.cli import plain, where
from runner.client.api import Declined, Missing
from runner.daemon.deadletters import DeadLetters, Entry

_EMPTY = "no dead letters"
#: Where there is no terminal, lines are not folded: `grep` wants them whole.
_PIPE_WIDTH = 1000
Id = Annotated[str, typer.Argument(help="Its id, or the beginning or end of it.", metavar="ID")]
Ids = Annotated[list[str] | None, typer.Argument(help="Ids, or beginnings or ends of them.", metavar="ID...")]
Queue = Annotated[str | None, typer.Option(help="Only those of this queue.")]
All = Annotated[bool, typer.Option("--all", metavar="", help="All of them (or all of --queue).")]


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    dlq = typer.Typer(
        no_args_is_help=True, help="Messages that were given up: see why, try again, or forget them."
    )
    for command in (list_, show, requeue, drop):
        dlq.command(command.__name__.rstrip("_"))(command)
    app.add_typer(dlq, name="dlq")


def list_(
    *,
    queue: Queue = None,
    working_dir: where.WorkingDir = None,
    state_dir: where.StateDir = None,
    as_json: where.AsJson = False,
) -> None:
    """List them, oldest first, with the reason of each."""
    entries = _letters(state_dir, working_dir).entries(queue)
    if as_json:
        _print_json([_row(entry) for entry in entries])
        return
    if not entries:
        typer.echo(_EMPTY)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("id", "queue", "reason", "attempts"):
        table.add_column(name, no_wrap=True)
    table.add_column("text", overflow="fold")
    for entry in entries:
        row = _row(entry)
        shown = (plain.line(str(row[name])) for name in ("id", "queue", "reason", "attempts", "text"))
        table.add_row(*(Text(each) for each in shown))  # as text: rich would take [brackets] for its own
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)


def show(name: Id, *, working_dir: where.WorkingDir = None, state_dir: where.StateDir = None) -> None:
    """Print one as JSON, the message redacted. The original lies beside the file that `path` names."""
    entry = _letters(state_dir, working_dir).find(name)
    _print_json({"id": entry.id, "path": str(entry.path)} | entry.document)


def requeue(
    names: Ids = None,
    *,
    every: All = False,
    queue: Queue = None,
    working_dir: where.WorkingDir = None,
    state_dir: where.StateDir = None,
    address: where.Address = "",
    token: where.Token = None,
) -> None:
    """Publish them anew, at the end of their queues, as new messages; through the running daemon, which has the accounts."""
    letters = _letters(state_dir, working_dir)
    daemon = where.daemon(address, working_dir, token)
    chosen = _chosen(letters, names, every, queue)
    stay = 0
    for entry in chosen:
        try:
            answer = daemon.post(f"/api/dead-letters/{quote(entry.id)}")
        except (Declined, Missing) as exc:  # the others go on
            typer.echo(plain.line(f"{entry.id}: {exc}"), err=True)
            stay += 1
        else:
            typer.echo(plain.line(f"requeued {answer['requeued']} to {answer['queue']}"))
    if stay:
        raise errors.RunnerError(f"{stay} of {len(chosen)} could not be requeued")


def drop(
    names: Ids = None,
    *,
    every: All = False,
    queue: Queue = None,
    working_dir: where.WorkingDir = None,
    state_dir: where.StateDir = None,
) -> None:
    """Remove them, for good."""
    letters = _letters(state_dir, working_dir)
    for entry in _chosen(letters, names, every, queue):
        letters.drop(entry)
        typer.echo(f"dropped {entry.id}")


def _letters(state_dir: Any, working_dir: Any) -> DeadLetters:
    state = where.state_directory(state_dir, working_dir)
    if not state.is_dir():
        raise errors.UsageError(
            f"{state} is no daemon's state directory: name it with --state-dir or --working-dir"
        )
    return DeadLetters(state / "dead-letter")


def _chosen(letters: DeadLetters, names: list[str] | None, every: bool, queue: str | None) -> list[Entry]:
    if bool(names) == every:
        raise errors.UsageError("name the dead letters by their ids, or say --all")
    return letters.entries(queue) if every else [letters.find(name) for name in names or ()]


def _row(entry: Entry) -> dict[str, Any]:
    kept = ("queue", "account", "reason", "attempts", "time", "text", "digest")
    return {"id": entry.id} | {name: entry.document.get(name) for name in kept}


def _print_json(value: object) -> None:
    typer.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())
