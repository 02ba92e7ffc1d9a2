"""The options by which the client verbs find a daemon and its directories; the same words everywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from runner.client.api import Daemon
from runner.daemon import lock

WorkingDir: TypeAlias = Annotated[
    Path | None,
    typer.Option(envvar="WORKING_DIR", help="The daemon's --working-dir.", show_default="$TMPDIR, else /tmp"),
]
StateDir: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        envvar="STATE_DIR",
        help="The daemon's --state-dir.",
        show_default="as the daemon took it, else <working-dir>/state",
    ),
]
Address: TypeAlias = Annotated[
    str, typer.Option(help="host:port of the daemon's HTTP port; without it the working directory tells.")
]
Token: TypeAlias = Annotated[str | None, typer.Option(envvar="HTTP_TOKEN", help="The daemon's --http-token.")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", metavar="", help="JSON, for programs.")]


def working_directory(named: Path | None) -> Path:
    """The working directory as `serve` takes it."""
    return (named or Path(os.environ.get("TMPDIR") or "/tmp")).absolute()  # noqa: S108 - as `serve` has it


def state_directory(named: Path | None, working_dir: Path | None) -> Path:
    """The state directory as `serve` takes it; as the last daemon took it where these options do not say."""
    if named:
        return named.absolute()
    working_dir = working_directory(working_dir)
    return lock.state_of(working_dir) or working_dir / "state"


def daemon(address: str, working_dir: Path | None, token: str | None) -> Daemon:
    """The daemon that these options mean. Asks nobody."""
    return Daemon(
        address=address, working_dir=None if address else working_directory(working_dir), token=token
    )
