"""`studio-runner explain [QUEUE]`: why nothing is running from it. The running daemon tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import orjson
import typer

from runner.cli import plain, where

if TYPE_CHECKING:
    from collections.abc import Iterator


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("explain")(explain)


def explain(
    queue: Annotated[
        str | None, typer.Argument(help="A queue's name; without one: all that are served.")
    ] = None,
    *,
    working_dir: where.WorkingDir = None,
    address: where.Address = "",
    token: where.Token = None,
    as_json: where.AsJson = False,
) -> None:
    """Say of each queue whether work is taken from it, and if not, why."""
    query = f"?queue={quote(queue)}" if queue else ""
    answer = where.daemon(address, working_dir, token).get_json(f"/api/queues{query}")
    if as_json:
        typer.echo(orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode())
        return
    for said in _lines(queue, answer):
        typer.echo(plain.line(said))


def _lines(queue: str | None, answer: dict[str, Any]) -> Iterator[str]:
    for told in answer["queues"]:
        yield f"{told['queue']} ({told['account']}): {_state(told)}"
    if answer["why"]:
        yield f"{queue}: {answer['why']}"
    elif not answer["queues"]:
        yield "no queue is served"
    for name, why in answer["credentials"].items():
        yield f"credentials {name} cannot be used: {why}"
    for account in answer["accounts"]:
        if account["error"]:
            since = account["unavailable_since"] or "the start"
            yield f"account {account['account']} does not answer since {since}: {account['error']}"


def _state(told: dict[str, Any]) -> str:
    running = f"{told['running']} running; " if told["running"] else ""
    if told["closed_because"]:
        return f"{running}no more is taken: {told['closed_because']}"
    parked = f"{told['parked']}; " if told.get("parked") else ""
    if told["trouble"]:
        return f"{running}{parked}open, but nothing can come: {told['trouble']}"
    return f"{running}{parked}open, waiting for its next message"
