"""The table of options for people: `serve --help` on a terminal, and docs/configuration.md.

`python -m runner.cli.options > docs/configuration.md` writes the page anew; a test holds it against the table.
"""

from __future__ import annotations

import sys
from itertools import groupby

from runner.options import OPTIONS, VARIABLES, Option

_INTRO = """\
# Configuration

Every option of `studio-runner serve` (or `runner`, the same program) is an argument and an environment variable; the
argument wins. `-name value`, `--name value` and `--name=value` are the same; booleans are written `--name` or `--name=false`.
An empty variable is not set. A wrong value ends the program at once: exit code 2, and one line that names the option.

Sizes: `512mb`, `3gb` (decimal), `2GiB` (binary). Durations: `30s`, `1h30m`, `2d`. Relative paths start from the directory
that the program was started in.

<!-- Written by `python -m runner.cli.options > docs/configuration.md`; a test holds it against runner/options.py. -->
"""


def print_help(usage: str) -> None:
    """All options, in groups, on standard output."""
    from rich import box
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(f"\n[bold]Usage:[/] {usage} [cyan][OPTION]...[/]\n", highlight=False)
    console.print(" Run the daemon: take experiments from queues and run them.\n", highlight=False)
    console.print(
        " --name=value, -name value, or the environment variable NAME (upper case, _ for -); the argument wins.\n",
        highlight=False,
        style="dim",
    )
    for group, options in groupby(OPTIONS, key=lambda option: option.group):
        table = Table(box=None, show_header=False, padding=(0, 1), expand=True)
        table.add_column(no_wrap=True, style="bold cyan")
        table.add_column(no_wrap=True, style="yellow")
        table.add_column(ratio=1, overflow="fold")
        for option in options:
            about = Text(option.help)
            if not option.missing:
                about.append(f"  [{_default(option).replace('`', '')}]", style="dim")
            table.add_row(f"--{option.name}", "" if option.is_flag else option.kind.metavar, about)
        console.print(Panel(table, title=group, title_align="left", border_style="dim", box=box.ROUNDED))


def document() -> str:
    """docs/configuration.md."""
    parts = [_INTRO]
    for group, options in groupby(OPTIONS, key=lambda option: option.group):
        parts.append(f"## {group}\n\n{table(list(options))}")
    rows = "".join(f"| `{name}` | {text} |\n" for name, text in VARIABLES)
    parts.append(f"## Other variables\n\n| variable | meaning |\n|---|---|\n{rows}")
    return "\n".join(parts)


def table(options: list[Option]) -> str:
    """A Markdown table of these options."""
    lines = ["| option | variable | default | meaning |", "|---|---|---|---|"]
    for option in options:
        env = f"`{option.env}`" if option.env else "none"
        lines.append(f"| `--{option.name}` | {env} | {_cell(_default(option))} | {_cell(option.help)} |")
    return "\n".join(lines) + "\n"


def _default(option: Option) -> str:
    if option.default_text:
        return option.default_text
    return f"`{option.default}`" if option.default else "unset"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(document())
