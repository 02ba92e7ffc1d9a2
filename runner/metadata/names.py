"""What the metadata objects of one run are called (INTEROP.md 5.1), so that no two runs of a host share a name."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import string
import urllib.parse
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase  # ASCII order: names sort by time
_MAX_COMPONENT = 150  # of the 255 bytes that a file name has; the rest is for what is put around it
_MAX_BYTES = 4096  # of the record of taken seconds, a page: 160 ranges; the oldest are forgotten first
_OPEN_RECORD = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC


@dataclasses.dataclass(frozen=True, order=True)
class Accession:
    """`<host>-<T>`: names one run of one host, for ever."""

    host: str
    second: int  #: unix time; see `claim_second`

    def __post_init__(self) -> None:
        if self.second < 0:
            raise ValueError(f"{self.second} is before 1970")

    def __str__(self) -> str:
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        return f"{safe_component(self.host)}-{base62(self.second)}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The opposite of `str`; splits at the last "-", as hosts may have some. Raises ValueError."""
        host, dash, token = text.rpartition("-")
        if not dash:
            raise ValueError(f"{text!r} is no accession id; one looks like host-1r31eq")
        return cls(urllib.parse.unquote(host), from_base62(token))

    @property
    def output_name(self) -> str:
        """The object that holds what the workload wrote."""
        return f"output-host-{self}.log"

    @property
    def runner_name(self) -> str:
        """The object that holds the runner's own records of the run."""
        return f"runner-host-{self}.log"

    @property
    def scrape_name(self) -> str:
        """The object that holds the document."""
        return f"scrape-host-{self}.json"


def base62(number: int) -> str:
    """Digits 0-9, A-Z, a-z, the most significant first, no padding; 0 is the empty string."""
    digits = []
    while number > 0:
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))


def from_base62(text: str) -> int:
    """The opposite of `base62`. Raises ValueError for other characters."""
    number = 0
    for digit in text:
        number = number * 62 + _DIGITS.index(digit)
    return number


def safe_component(name: str) -> str:
    """The name as one component of a path or key: letters, digits and `._-` stay, the rest is %-quoted.

    Different names stay different, also long ones, which are cut and end in a hash. "", ".", ".." and names that begin with
    a dot cannot come out.
    """
    quoted = urllib.parse.quote(name, safe="", errors="replace").replace("~", "%7E") or "%"
    if quoted.startswith("."):
        quoted = "%2E" + quoted[1:]
    if len(quoted) <= _MAX_COMPONENT:
        return quoted
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:16]
    return f"{quoted[: _MAX_COMPONENT - 17]}~{digest}"


def claim_second(state_dir: Path, host: str, now: float) -> int:
    """The first second from `now` (unix time) on that no run of this host has had; nobody gets the same one again.

    Safe between threads and processes that share `state_dir`, and across restarts. Blocking, for microseconds. Raises OSError
    when the directory cannot be written.
    """
    directory = state_dir / "accessions"
    record = directory / f"{safe_component(host)}.json"
    try:
        fd = os.open(record, _OPEN_RECORD, 0o600)
    except FileNotFoundError:
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(record, _OPEN_RECORD, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        before = os.read(fd, _MAX_BYTES)
        ranges = _ranges(before)
        second = _take_free(ranges, max(0, int(now)))
        # In place, in one write within one page, which a kill cannot divide; blanks where more stood before.
        os.pwrite(fd, _packed(ranges).ljust(len(before)), 0)
    finally:
        os.close(fd)
    return second


def _ranges(data: bytes) -> list[list[int]]:
    """Taken seconds as [first, last], in order. A record that was lost or damaged (power failure) is an empty one."""
    try:
        ranges = json.loads(data)
    except ValueError:
        return []
    sane = isinstance(ranges, list) and all(
        isinstance(pair, list) and [type(second) for second in pair] == [int, int] for pair in ranges
    )
    return ranges if sane else []


def _packed(ranges: list[list[int]]) -> bytes:
    while len(packed := json.dumps(ranges, separators=(",", ":")).encode()) > _MAX_BYTES:
        del ranges[: len(ranges) // 10 + 1]
    return packed


def _take_free(ranges: list[list[int]], second: int) -> int:
    """Takes the first free second at or after `second`; neighbouring ranges become one."""
    place = 0
    while place < len(ranges) and ranges[place][1] < second - 1:
        place += 1
    if place < len(ranges) and ranges[place][0] <= second:  # within a range, or just behind its end
        second = max(second, ranges[place][1] + 1)
        ranges[place][1] = second
    else:
        ranges.insert(place, [second, second])
    if place + 1 < len(ranges) and ranges[place + 1][0] == second + 1:
        ranges[place][1] = ranges.pop(place + 1)[1]
    return second
