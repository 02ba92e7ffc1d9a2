"""Shows a submission and what becomes of it: a live line on a terminal, plain lines elsewhere, or JSON for programs."""

from __future__ import annotations

import abc
import codecs
import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, Self

import orjson

from runner.client.follow import End, Event, Metric, Output, Stage
from runner.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from runner.client.submit import Submitted

#: Smaller ones are packed and sent before anybody could read of it.
_WORTH_TELLING_BYTES = 8 << 20
STAGES = {
    "queued": "waiting for a runner",
    "starting": "starting",
    "staging": "fetching artifacts",
    "environment": "preparing the Python environment",
    "running": "running",
    "uploading": "storing results",
}


class Show(abc.ABC):
    """How people or programs see it. A context manager; also a `client.submit.Progress`."""

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 - most have nothing to put back
        """Leave the terminal as it was."""

    @contextlib.contextmanager
    def step(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Something takes time. Says so only where it matters."""
        if total is not None and total >= _WORTH_TELLING_BYTES:
            self.say(f"{what}: {format_bytes(total)}")
        yield lambda _: None

    def warn(self, text: str) -> None:
        """Something is not as expected, but goes on."""
        self.say(f"warning: {text}")

    @abc.abstractmethod
    def say(self, text: str) -> None:
        """A line for a person."""

    @abc.abstractmethod
    def submitted(self, submitted: Submitted) -> None:
        """It was published."""

    @abc.abstractmethod
    def event(self, event: Event) -> None:
        """Something became of it."""


class Plain(Show):
    """Output as it comes on stdout, all else on stderr."""

    def say(self, text: str) -> None:
        """On stderr."""
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - what a command line is for

    def submitted(self, submitted: Submitted) -> None:
        """One line."""
        self.say(f"submitted {submitted.key} to {submitted.queue}")

    def event(self, event: Event) -> None:
        """Metrics are not told: the output that they are in is."""
        match event:
            case Output(data=data):
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            case Stage():
                self.say(f"[{describe(event)}]")
            case End():
                self.say(summary(event))
            case Metric():
                pass


class Json(Show):
    """One object a line on stdout."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def say(self, text: str) -> None:
        """As an event."""
        self._write({"event": "note", "text": text})

    def submitted(self, submitted: Submitted) -> None:
        """Key, queue, digest and addresses."""
        self._write(submitted.as_event())

    def event(self, event: Event) -> None:
        """Every one. Output is text here: bytes that are no UTF-8 are replaced."""
        match event:
            case Output(data=data):
                if text := self._decoder.decode(data):
                    self._write({"event": "output", "text": text})
            case Stage():
                told = {"stage": event.stage, "attempt": event.attempt, "note": event.note or None}
                self._write({"event": "stage", **told})
            case Metric(values=values):
                self._write({"event": "metric", "values": values})
            case End(ending=ending):
                told = {
                    name: getattr(ending, name)
                    for name in ("status", "reason", "text", "exit_code", "attempt")
                }
                self._write({"event": "end", **told, "code": ending.code})

    def _write(self, record: dict[str, Any]) -> None:
        sys.stdout.buffer.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.buffer.flush()


def chosen(*, as_json: bool) -> Show:
    """JSON when asked for; the live one when both ends are a terminal's."""
    if as_json:
        return Json()
    if sys.stdout.isatty() and sys.stderr.isatty():
        from runner.cli.live import Live

        return Live()
    return Plain()


def describe(stage: Stage) -> str:
    """A stage in words."""
    words = STAGES.get(stage.stage, stage.stage)
    if stage.attempt > 1 and stage.stage != "queued":
        words = f"attempt {stage.attempt}: {words}"
    return f"{words}: {stage.note}" if stage.note else words


def summary(end: End) -> str:
    """The last line."""
    ending = end.ending
    if ending.status == "completed":
        return "completed"
    told = f"{ending.status} ({ending.reason}): {ending.text}"
    return told if ending.code == ending.exit_code else f"the runner ended it: {told}"


def metrics(values: dict[str, Any]) -> str:
    """The scalars of what a workload told, on one line; empty when there are none."""
    return "  ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool)
    )


def clock(since: float) -> str:
    """The time since then (monotonic)."""
    secs = time.monotonic() - since
    return f"{secs:.1f} s" if secs < 60 else f"{secs // 60:.0f} min {secs % 60:02.0f} s"  # noqa: PLR2004 - a minute
