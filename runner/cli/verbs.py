"""The verbs other than `serve`, as typer shows and runs them. `main` imports this only when one is wanted."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated

import typer

import runner

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def run(name: str, arguments: Sequence[str], verbs: Mapping[str, str]) -> int:
    """Run the verb that `arguments` name; returns its exit code (2 for wrong usage).

    `verbs`: verb -> the module whose `add_to(app)` adds it. Only that of the named verb is imported, all for the help.
    """
    named = [arguments[0]] if arguments and arguments[0] in verbs else verbs
    try:
        _app(verbs[verb] for verb in named)(list(arguments), prog_name=name)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(bool(exc.code))
    return 0


def _app(modules: Iterable[str]) -> typer.Typer:
    app = typer.Typer(
        help="A StudioML-compatible runner: pulls experiments from queues and runs them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_before_the_verb)
    app.command("serve", help="Run the daemon: `serve --help` lists its options.")(_serve)
    for module in modules:
        importlib.import_module(module).add_to(app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"studio-runner {runner.__version__}")
        raise typer.Exit


def _before_the_verb(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def _serve() -> None:
    """Stands in the list of verbs; `main` has taken every command line that names it."""
