"""`studio-runner doctor`: what a daemon started with these options and variables would find, and what to do about it."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from runner import config

if TYPE_CHECKING:
    from runner.cli.finding import Finding

_MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "problem": ("PROBLEM", "bold red")}


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        "doctor",
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "help_option_names": ["--help"],  # -h would hide single-dash options of the daemon
        },
        options_metavar="[--json] [--store URL]... [OPTIONS OF serve]...",
    )(doctor)


def doctor(
    context: typer.Context,
    *,
    store: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL|PATH",
            envvar="STUDIO_STORAGE",
            help="A store that experiments use, as for `submit --storage`; repeatable.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="JSON, for programs.")] = False,
) -> None:
    """Check this machine, its accounts and its stores, and say of each what to do.

    Takes the options and variables of `serve`: give those of the daemon. Starts nothing, takes no work.

    Exit code 1 when something is a problem, 0 when all is well or only warned of.
    """
    from runner.cli import checks
    from runner.telemetry import logs

    options = config.parse(context.args, os.environ, Path.cwd())
    logs.configure(config.Logs(level="error"), sys.stderr)  # what a library has to say is told as a finding
    findings = asyncio.run(checks.examine(options, store or []))
    if as_json:
        typer.echo(
            orjson.dumps([finding.as_dict() for finding in findings], option=orjson.OPT_INDENT_2).decode()
        )
    else:
        _print(findings)
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


def _print(findings: list[Finding]) -> None:
    if sys.stdout.isatty():
        _print_table(findings)
    else:  # a line each, for grep
        for finding in findings:
            advice = f" -> {finding.advice}" if finding.advice else ""
            typer.echo(f"{_MARKS[finding.verdict][0]}: {finding.subject}: {finding.text}{advice}")
    problems, warnings = (
        sum(finding.verdict == verdict for finding in findings) for verdict in ("problem", "warning")
    )
    typer.echo(f"problems: {problems}, warnings: {warnings}")


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        word, style = _MARKS[finding.verdict]
        said = Text(finding.text)
        if finding.advice:
            said.append(f"\n-> {finding.advice}", style="dim")
        table.add_row(Text(word, style=style), Text(finding.subject, style="bold"), said)
    Console().print(table)
