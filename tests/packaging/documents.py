"""What the tests of the documentation share: the commands in it, and the table of options in the README.

A ```console block is preceded by `<!-- run -->` or `<!-- not run: the reason -->`. In it, `$ ` begins a command, `> ` goes on with
it, and the other lines are what it prints, which is not looked at when there are none; `...` stands for anything, on a line or for
any number of lines.

`python -m tests.packaging.documents` writes the README's table of options anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from runner.cli import options
from runner.options import OPTIONS
from tests.servers.daemon import clean_environment

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted(
    page
    for page in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("deploy/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
    ]
    if not page.is_symlink()
)
#: What an operator needs first.
FIRST = (
    "queue-match",
    "amqp-url",
    "certs-dir",
    "queue-root",
    "working-dir",
    "state-dir",
    "max-cores",
    "max-mem",
    "cpu-only",
    "cache-dir",
    "grace",
    "prom-address",
    "log-level",
)
BEGIN = "<!-- options: written by `python -m tests.packaging.documents`; a test holds it against runner/options.py -->"
END = "<!-- end of options -->"

LIMIT_SECS = 400

_NEXT = "=== next command ==="
_MARK = re.compile(r"<!-- (?:(run)|not run: (.+)) -->")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One ```console block."""

    page: Path
    line: int
    reason: str | None  #: why it is not run; None: it is
    steps: tuple[tuple[str, tuple[str, ...]], ...]  #: each command and the lines that it prints

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The ```console blocks of a page. Raises AssertionError when one does not say whether it is run."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.strip() == "```console":
            mark = _MARK.fullmatch(lines[number - 1].strip())
            assert mark, (
                f"{page}:{number}: a console block needs <!-- run --> or <!-- not run: why --> before it"
            )
            end = lines.index("```", number)
            found.append(
                Block(page=page, line=number + 1, reason=mark[2], steps=_steps(lines[number + 1 : end]))
            )
    return found


def _steps(lines: list[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    steps: list[tuple[list[str], list[str]]] = []
    for line in lines:
        if line.startswith("$ "):
            steps.append(([line[2:]], []))
        elif line.startswith("> "):
            steps[-1][0].append(line[2:])
        else:
            steps[-1][1].append(line)
    return tuple(("\n".join(command), tuple(printed)) for command, printed in steps)


def pattern(printed: tuple[str, ...]) -> re.Pattern[str]:
    """What a command prints, as a pattern."""
    parts = [
        r"(?:.*\n)*" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + r"\s*\n"
        for line in printed
    ]
    return re.compile("".join(parts))


def run(block: Block, directory: Path, *, places: Mapping[str, str], env: Mapping[str, str]) -> None:
    """Run a block's commands in one shell in `directory`; each must succeed, and print what the page says.

    `places`: what stands in the page -> what it is here. What a command leaves in the background is ended.
    """
    script = ["set -eu"]
    for command, _ in block.steps:
        for name, place in places.items():
            command = command.replace(name, place)  # noqa: PLW2901 - that is the point
        script += [f"printf '{_NEXT}\\n'", command]
    shell = subprocess.Popen(
        ["bash", "-c", "\n".join(script)],
        cwd=directory,
        env=clean_environment() | dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        told, _ = shell.communicate(timeout=LIMIT_SECS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGTERM)
    assert shell.returncode == 0, f"{block}:\n{told}"
    for (command, printed), shown in zip(block.steps, told.split(f"{_NEXT}\n")[1:], strict=True):
        assert not printed or pattern(printed).fullmatch(shown), f"{block}: {command}\nprinted:\n{shown}"


def options_table() -> str:
    """The README's table of options, with its markers."""
    chosen = {option.name: option for option in OPTIONS}
    return f"{BEGIN}\n{options.table([chosen[name] for name in FIRST])}{END}"


def with_table(text: str) -> str:
    """The README with its table as it should be."""
    before, rest = text.split(BEGIN)
    return before + options_table() + rest.split(END, 1)[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
