"""`studio-runner version`."""

from __future__ import annotations

import platform

import typer

import runner


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("version")(version)


def version() -> None:
    """Print the versions of the runner and of the Python that it runs on."""
    typer.echo(
        f"studio-runner {runner.__version__} on Python {platform.python_version()}, {platform.platform()}"
    )
