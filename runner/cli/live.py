"""A submission on a terminal: output scrolls by, and below it one line says where it is."""

from __future__ import annotations

import codecs
import contextlib
import time
from typing import TYPE_CHECKING, Any, Self

from rich import live
from rich.console import Console, Group
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.spinner import Spinner
from rich.text import Text

from runner.cli import show
from runner.client.follow import End, Event, Metric, Output, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from runner.client.submit import Submitted

#: A stage that was shorter is not worth a line of its own.
_SHORT_SECS = 0.5
_LINE_CHARS = 10_000  # longer lines, and longer unfinished ones, are cut: a terminal is no log
#: What is left of what steers a terminal when the colours were taken out.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


class Live(show.Show):
    """The live line: a spinner, the stage, the time, the last metrics."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._began = self._stage_began = time.monotonic()
        self._stage: Stage | None = None
        self._metrics = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._line = ""
        self._spinner = Spinner("dots", style="cyan")
        self._live = live.Live(
            get_renderable=self._render, console=self.console, refresh_per_second=8, transient=True
        )

    def __exit__(self, *_: object) -> None:
        """Take the line away."""
        self._live.stop()

    def __enter__(self) -> Self:
        """Nothing is shown before there is something to show."""
        return self

    @contextlib.contextmanager
    def step(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """A bar, gone when it is done."""
        columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count: progress.advance(task, count)

    def say(self, text: str) -> None:
        """Above the live line."""
        self.console.print(Text(text, style="dim"))

    def warn(self, text: str) -> None:
        """Above the live line."""
        self.console.print(Text(f"warning: {text}", style="yellow"))

    def submitted(self, submitted: Submitted) -> None:
        """One line."""
        self.console.print(
            Text.assemble("submitted ", (submitted.key, "bold"), " to ", (submitted.queue, "bold"))
        )

    def event(self, event: Event) -> None:
        """Output above, all else in the live line."""
        if not self._live.is_started:
            self._live.start()
        match event:
            case Output(data=data):
                self._print(self._decoder.decode(data))
            case Stage():
                self._finish_stage()
                self._stage, self._stage_began = event, time.monotonic()
            case Metric(latest=latest):
                self._metrics = show.metrics(latest) or self._metrics
            case End():
                self._end(event)

    def _print(self, text: str) -> None:
        *lines, self._line = (self._line + text).split("\n")
        self._line = self._line[-_LINE_CHARS:]
        for line in lines:
            # What a progress bar has overwritten is gone, and only colours get through to the terminal.
            shown = line.rstrip("\r").rpartition("\r")[2]
            self.console.print(_harmless(shown[:_LINE_CHARS]), soft_wrap=True)

    def _finish_stage(self) -> None:
        spent = time.monotonic() - self._stage_began
        if self._stage is not None and (spent >= _SHORT_SECS or self._stage.note):
            words, took = show.describe(self._stage), show.clock(self._stage_began)
            self.console.print(Text(f"  {words}  {took}", style="dim"))

    def _end(self, end: End) -> None:
        if self._line:
            self._print("\n")
        self._finish_stage()
        self._live.stop()
        good = end.ending.status == "completed"
        mark, style = ("✔", "green") if good else ("✘", "red")
        took = show.clock(self._began)
        self.console.print(Text.assemble((f"{mark} {show.summary(end)}", f"bold {style}"), f"  {took}"))
        if self._metrics:
            self.console.print(Text(f"  {self._metrics}"))

    def _render(self) -> Any:
        words = "submitted" if self._stage is None else show.describe(self._stage)
        line = Text.assemble(
            (words, "bold"), f"  {show.clock(self._began)}", no_wrap=True, overflow="ellipsis"
        )
        if self._metrics:
            line.append(f"  {self._metrics}", style="cyan")
        self._spinner.update(text=line)
        partial = self._line.rpartition("\r")[2]
        if not partial:
            return self._spinner
        unfinished = _harmless(partial)
        unfinished.no_wrap, unfinished.overflow = True, "ellipsis"
        return Group(unfinished, self._spinner)


def _harmless(line: str) -> Text:
    """What a workload printed, in its colours; nothing else of it reaches the terminal but characters."""
    shown = Text.from_ansi(line)
    shown.plain = shown.plain.translate(_CONTROLS)
    return shown
