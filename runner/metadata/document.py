"""The scraped document of one run: the runner's own members, and what the workload printed (DESIGN.md 5.6)."""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from typing import TYPE_CHECKING, Any, Self

import orjson

from runner.metadata import merge
from runner.request import document as reading

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BYTES = 64 << 20
#: How far the estimate of the size may be off before the document is measured again.
_SLACK_BYTES = 1 << 20

SCHEMAS = ("1.0", "0.14")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What a document is about; the same in every checkpoint of its run."""

    key: str  #: the experiment's
    project: str | None
    host: str
    request: Mapping[str, Any]  #: the message, redacted (`request.redact`)
    artifacts: Mapping[str, str]  #: tag -> URI, without credentials


class Document:
    """One per run; the same instance serves every checkpoint. Not thread-safe.

    Roots of schema 1.0: `runner` and `asset`, which workloads cannot touch; `studioml`, to which they can add; `experiment` and
    any others, which are theirs. Schema 0.14 has `studioml` and `experiment` only (INTEROP.md 5.3).
    """

    def __init__(self, roots: dict[str, Any], *, schema: str) -> None:
        """Use `begin` or `load`."""
        self.schema = schema
        self.bad = 0  #: directives that were skipped
        self._roots = roots
        self._bytes = len(orjson.dumps(roots))  # never too small
        self._unmeasured = 0  # bytes asked for since `_bytes` was exact

    @classmethod
    def begin(cls, subject: Subject, *, schema: str = "1.0", asset: str | None = None) -> Self:
        """The document of a new run; `asset` is given when it is written anew after a restart."""
        if schema not in SCHEMAS:
            raise ValueError(f"there is no metadata schema {schema!r}; there are {', '.join(SCHEMAS)}")
        key, project, artifacts = subject.key, subject.project, dict(subject.artifacts)
        if schema == "0.14":
            names = {"key": key, "project": project}
            studioml = {"experiment": names, "artifacts": artifacts, "host": subject.host}
            return cls({"studioml": studioml, "experiment": {}}, schema=schema)
        roots = {
            "runner": {"host": subject.host, "request": dict(subject.request)},
            "experiment": {},
            "studioml": {"experiment": key, "project": project, "artifacts": artifacts},
            "asset": asset or str(uuid.uuid4()),
        }
        return cls(roots, schema=schema)

    @classmethod
    def load(cls, data: bytes, *, schema: str) -> Self:
        """Go on with what `to_bytes` gave, after a restart. Raises ValueError when it is no document of that schema."""
        roots = reading.loads(data)
        needed = {"studioml": dict} | ({"runner": dict, "asset": str} if schema == "1.0" else {})
        if not isinstance(roots, dict) or not all(
            isinstance(roots.get(name), kind) for name, kind in needed.items()
        ):
            raise ValueError(f"not a metadata document of schema {schema}")
        return cls(roots, schema=schema)

    def set_running(self, *, started: float, **runner: Any) -> None:
        """The run has begun, at that unix time. Further members describe the machine: of `runner`, and only in schema 1.0."""
        self._studioml(status="running")
        self._when("start", started)
        self.note(**runner)

    def set_final(
        self, *, status: str, reason: str, stopped: float, exit_code: int | None = None, **runner: Any
    ) -> None:
        """The run is over, at that unix time; on every ending, also after a kill. The last call counts."""
        self._studioml(status=status, reason=reason, exit_code=exit_code)
        self._when("stop", stopped)
        self.note(**runner)

    def note(self, **runner: Any) -> None:
        """Members of `runner`: what the machine was and used. JSON values; schema 0.14 has no place for them."""
        if self.schema == "1.0":
            self._roots["runner"].update(runner)

    def apply(self, directive: Any) -> bool:
        """What a line of the workload asks for (`scrape.Scraper`), whole or not at all. False: it was bad, skipped and counted."""
        try:
            self._apply(directive)
        except merge.BadDirective:
            self.bad += 1
            return False
        return True

    def to_bytes(self) -> bytes:
        """One line of JSON and a newline."""
        return orjson.dumps(self._roots, option=orjson.OPT_APPEND_NEWLINE)

    @property
    def last(self) -> Any:
        """What the workload has told so far: the `experiment` root."""
        return self._roots.get("experiment")

    def _apply(self, directive: Any) -> None:
        asked = len(orjson.dumps(directive))
        room = self._room(asked)
        if room < 0:
            raise merge.BadDirective("the document would become too large")
        if isinstance(directive, dict):
            merge.apply_merge(self._roots, directive)
        elif isinstance(directive, list):
            copied = merge.apply_patch(self._roots, directive, room=room)
            self._bytes += copied
            self._unmeasured += copied
        else:
            raise merge.BadDirective("neither an object nor a patch")
        self._bytes += asked

    def _room(self, asked: int) -> int:
        """How many bytes the document may grow beyond what is asked for. Measuring costs, so it is done rarely."""
        self._unmeasured += asked
        if self._bytes + asked > MAX_BYTES and self._unmeasured > _SLACK_BYTES:
            self._bytes, self._unmeasured = len(orjson.dumps(self._roots)), 0
        return MAX_BYTES - self._bytes - asked

    def _studioml(self, **members: Any) -> None:
        self._roots["studioml"].update(members)

    def _when(self, event: str, when: float) -> None:
        if self.schema == "1.0":
            self._roots["runner"][event] = timestamp(when)
        else:
            self._studioml(**{f"{event}_time": timestamp(when)})


def timestamp(when: float) -> str:
    """Unix time as RFC 3339 in UTC, with milliseconds: 2018-10-23T18:25:43.511Z."""
    moment = dt.datetime.fromtimestamp(when, dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
