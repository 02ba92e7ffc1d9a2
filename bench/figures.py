"""A measured figure, the bar it is held against, and how a list of them is shown and kept."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """What a figure, or its ratio where it has a baseline, must keep (DESIGN.md 7)."""

    limit: float
    aim: float | None = None
    at_most: bool = True

    def keeps(self, measured: float, limit: float | None = None) -> bool:
        """Whether the measured one is on the right side."""
        limit = self.limit if limit is None else limit
        return measured <= limit if self.at_most else measured >= limit

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{sign} {self.limit:g}" + (f" (aim {self.aim:g})" if self.aim is not None else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table."""

    name: str
    value: float
    unit: str
    baseline: float | None = None  #: measured in the same run, interleaved; the bar is then one of the ratio
    bar: Bar | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The value as a multiple of its baseline."""
        return self.value / self.baseline if self.baseline else None

    @property
    def held(self) -> float:
        """What the bar is held against."""
        return self.value if self.ratio is None else self.ratio

    @property
    def kept(self) -> bool | None:
        """Whether the bar is kept; None without one."""
        return None if self.bar is None else self.bar.keeps(self.held)


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def show(figures: Sequence[Figure], console: Console | None = None) -> None:
    """The table, on standard output."""
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title="studio-runner bench", title_justify="left", row_styles=["", "dim"])
    for name in ("what", "measured", "baseline", "ratio", "bar", ""):
        table.add_column(name, justify="left" if name in {"what", "bar", ""} else "right")
    for figure in figures:
        verdict = {None: "", True: "[green]kept[/]", False: "[red]missed[/]"}[figure.kept]
        if figure.kept and figure.bar and figure.bar.aim is not None:
            verdict = "[green]aim[/]" if figure.bar.keeps(figure.held, figure.bar.aim) else verdict
        name = figure.name + (f"\n  [dim]{figure.note}[/]" if figure.note else "")
        table.add_row(
            name,
            _number(figure.value, figure.unit),
            "" if figure.baseline is None else _number(figure.baseline, figure.unit),
            "" if figure.ratio is None else f"{figure.ratio:.2f} x",
            "" if figure.bar is None else f"{figure.bar}{'' if figure.ratio is None else ' x'}",
            verdict,
        )
    console.print(table)


def _number(value: float, unit: str) -> str:
    digits = 0 if value >= 1000 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f} {unit}"


def document(figures: Sequence[Figure], *, options: dict[str, Any], secs: float) -> dict[str, Any]:
    """All of it, for a file."""
    return {
        "options": options,
        "secs": round(secs, 1),
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "load": [round(load, 2) for load in os.getloadavg()],
        },
        "commit": _commit(),
        "figures": [
            dataclasses.asdict(figure) | {"ratio": figure.ratio, "kept": figure.kept} for figure in figures
        ],
    }


def save(directory: Path, name: str, content: dict[str, Any]) -> Path:
    """Write the JSON; where it is."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _commit() -> str:
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()
