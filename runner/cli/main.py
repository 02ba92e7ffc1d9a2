"""Where every program of the project starts: picks the verb, runs it, turns errors into exit codes.

`serve` is read by the project's own table of options (Go's spelling, DESIGN.md 5.10) and pays for no other verb; the others
are typer's, imported when they are named.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runner import config, errors

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Verb -> the module whose `add_to(app)` adds it. `serve` is not among them: see `main`.
VERBS: dict[str, str] = {
    "submit": "runner.cli.submit",
    "dlq": "runner.cli.dlq",
    "explain": "runner.cli.explain",
    "doctor": "runner.cli.doctor",
    "version": "runner.cli.version",
}
#: `runner ARGS` is `studio-runner serve ARGS`, for drop-in use.
_SERVES = "runner"
_HELP = {"-h", "-help", "--help"}

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own, with the program's name first); returns its exit code."""
    program, *arguments = sys.argv if argv is None else argv
    name = _name(program)
    try:
        if arguments[:1] == ["serve"]:
            return _serve(f"{name} serve", arguments[1:])
        if name == _SERVES and not (arguments and arguments[0] in VERBS):
            return _serve(name, arguments)
        from runner.cli import verbs

        return verbs.run(name, arguments, VERBS)
    except errors.RunnerError as exc:
        print(f"{name}: {exc}", file=sys.stderr)  # noqa: T201 - the log is not configured, or this is its last word
        return exc.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _name(program: str) -> str:
    """What the program is called: runner or studio-runner, also for `python -m runner` and `python cmd/studio_runner`."""
    path = Path(program)
    stem = path.parent.name if path.name == "__main__.py" else path.name
    return stem.replace("_", "-")


def _serve(usage: str, arguments: Sequence[str]) -> int:
    if _HELP.intersection(arguments):
        from runner.cli import options

        options.print_help(usage)
        return 0
    built = config.parse(arguments, os.environ, Path.cwd())
    _spare_rich()
    from runner.cli import serve

    return serve.serve(built)


def _spare_rich() -> None:
    """Import structlog without rich, which it wants for tracebacks that a daemon never prints: 0.1 s and 5 MB."""
    if "rich" not in sys.modules:
        sys.modules["rich"] = None  # type: ignore[assignment]  # Python's way to say: not to be imported
        importlib.import_module("structlog")
        del sys.modules["rich"]
