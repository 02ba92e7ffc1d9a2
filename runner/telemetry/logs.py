"""The log: structlog's records, redacted, as console lines or JSON lines; and each run's own copy of its records.

Every record carries what is bound to its context (`structlog.contextvars`: queue, project, experiment, attempt, run).
Python's own `logging` (pika, urllib3, uvicorn) goes the same way. Nothing here blocks the loop or raises.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from runner.telemetry.redact import redact_value
from runner.telemetry.sink import Sink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import TextIO

    from structlog.typing import EventDict, WrappedLogger

    from runner import config

#: A run's own log ends here; a line says so.
RUN_LOG_BYTES = 8_000_000

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "31;1"}
_INDENT = "    "

_run_logs: dict[str, _RunLog] = {}
_current: Sink | None = None


def configure(options: config.Logs, stream: TextIO) -> None:
    """Send all records of this process to `stream`. May be called again; the last call counts.

    A reader of `stream` that is slow or gone never stops the caller: lines wait in memory, within a limit, and are
    counted when they had to be dropped.
    """
    global _current
    terminal = stream.isatty()
    as_json = options.format == "json" or (options.format == "auto" and not terminal)
    level = _LEVELS[options.level]
    sink = Sink(stream, on_dropped=_report_dropped)
    render: Callable[[EventDict], str] = _json_line if as_json else _Console(options.width, colours=terminal)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _add_logger_name,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _Finish(level, render),
        ],
        # A run's own log has its records from "info" on, whatever the console shows.
        wrapper_class=structlog.make_filtering_bound_logger(min(level, _LEVELS["info"])),
        context_class=dict,
        logger_factory=lambda *names: _Output(sink, *names),
        cache_logger_on_first_use=False,
    )
    _forward_logging(level)
    previous, _current = _current, sink
    if previous is not None:
        previous.flush(0)


def flush(secs: float = 2.0) -> None:
    """Write what still waits for a slow reader, for at most `secs`. Blocks; for the end of the process."""
    if _current is not None:
        _current.flush(secs)


@contextlib.contextmanager
def capture(run: str, path: Path) -> Iterator[None]:
    """While it is open, records bound to `run` are also appended to `path`, one JSON object a line, redacted.

    Binds `run` to the context: the task and those that it starts belong to it. Records from "info" on are kept whatever
    `--log-level` says; the file ends at `RUN_LOG_BYTES`. A disk that is full loses lines, never the run.
    """
    own = _RunLog(path)
    _run_logs[run] = own
    try:
        with structlog.contextvars.bound_contextvars(run=run):
            yield
    finally:
        del _run_logs[run]
        own.close()


class _Output:
    """What structlog calls a logger: takes finished lines. An empty one has gone elsewhere."""

    def __init__(self, sink: Sink, name: str = "") -> None:
        self.name = name
        self._sink = sink

    def msg(self, line: str) -> None:
        self._sink.write(line)

    log = debug = info = warn = warning = error = critical = fatal = exception = failure = msg


class _Finish:
    """The end of the chain: redact, copy to the run's own log, drop what the level hides, render."""

    def __init__(self, level: int, render: Callable[[EventDict], str]) -> None:
        self._level = level
        self._render = render

    def __call__(self, _logger: WrappedLogger, _method: str, record: EventDict) -> str:
        run = record.get("run")
        clean: EventDict = redact_value(record)
        own = _run_logs.get(run) if isinstance(run, str) else None
        if own is not None:
            own.write(_json_line(clean))
        if _LEVELS.get(clean["level"], self._level) < self._level:
            raise structlog.DropEvent
        return self._render(clean)


class _RunLog:
    """One run's own file of records."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o600)
        self._lock = threading.Lock()
        self._room = RUN_LOG_BYTES - os.fstat(self._fd).st_size

    def write(self, line: str) -> None:
        data = line.encode(errors="backslashreplace") + b"\n"
        with self._lock, contextlib.suppress(OSError):
            if self._fd < 0 or self._room <= 0:
                return
            self._room -= len(data)
            os.write(
                self._fd,
                data if self._room > 0 else b'{"level":"warning","event":"log ends here: too long"}\n',
            )

    def close(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            fd, self._fd = self._fd, -1
            os.close(fd)


class _Console:
    """`time level event key=value ...`; past `width` columns each further key has a line of its own.

    Control characters are shown, not sent: what a message or a workload says must not steer a terminal or fake a line.
    """

    def __init__(self, width: int | None, *, colours: bool) -> None:
        self._width = width
        self._colours = colours

    def __call__(self, record: EventDict) -> str:
        rest = dict(record)
        blocks = [rest.pop(name) for name in ("exception", "stack") if rest.get(name)]
        level, event = rest.pop("level"), _shown(str(rest.pop("event", "")), quote=False)
        rest.pop("logger", None)
        line = f"{rest.pop('timestamp', '')} {self._colour(level)} {event}"
        column = len(line) - len(self._colour(level)) + len(level)
        for key, value in rest.items():
            pair = f"{_shown(key)}={_shown(value)}"
            if self._width is not None and column + 1 + len(pair) > self._width:
                line, column = f"{line}\n{_INDENT}{pair}", len(_INDENT) + len(pair)
            else:
                line, column = f"{line} {pair}", column + 1 + len(pair)
        for block in blocks:
            line += "".join(
                f"\n{_INDENT}{_shown(part, quote=False)}" for part in str(block).expandtabs().splitlines()
            )
        return line

    def _colour(self, level: str) -> str:
        shown = f"{level:<7}"
        return f"\x1b[{_COLOURS.get(level, '0')}m{shown}\x1b[0m" if self._colours else shown


class _Forward(logging.Handler):
    """Python's `logging` into structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event = record.getMessage()
        except (TypeError, ValueError):  # a library's arguments do not fit its format
            event = str(record.msg)
        level = min(max(record.levelno // 10 * 10, _LEVELS["debug"]), _LEVELS["critical"])
        structlog.get_logger(record.name).log(level, event, exc_info=record.exc_info)


def _forward_logging(level: int) -> None:
    """Libraries may warn; at level "debug" they may also inform, but for those that tell each step."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Forward)]:
        root.removeHandler(handler)
    root.addHandler(_Forward())
    root.setLevel(_LEVELS["info"] if level == _LEVELS["debug"] else _LEVELS["warning"])
    for chatty in ("pika", "uvicorn"):
        logging.getLogger(chatty).setLevel(_LEVELS["warning"])


def _add_logger_name(logger: WrappedLogger, _method: str, record: EventDict) -> EventDict:
    name = getattr(logger, "name", "")
    if name:
        record.setdefault("logger", name)
    return record


def _report_dropped(count: int) -> None:
    structlog.get_logger(__name__).warning("log lines dropped: the reader was too slow", count=count)


def _shown(value: Any, *, quote: bool = True) -> str:
    text = value if isinstance(value, str) else str(value)
    if not text.isprintable():
        text = text.encode("unicode_escape").decode("ascii")
    if quote and (not text or any(char in text for char in ' "=')):
        return f'"{text.replace(chr(34), chr(92) + chr(34))}"' if isinstance(value, str) else text
    return text


def _json_line(record: EventDict) -> str:
    ordered = {name: record[name] for name in ("timestamp", "level", "event", "logger") if name in record}
    ordered.update(record)
    try:
        return orjson.dumps(ordered, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # lone surrogates (undecodable file names), integers beyond 64 bits
        return json.dumps(ordered, default=str)
