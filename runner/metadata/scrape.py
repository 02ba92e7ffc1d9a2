"""Finds the lines of a workload's output that are JSON objects or arrays (INTEROP.md 5.2), each byte looked at once."""

from __future__ import annotations

import re
from typing import Any

from runner.request import document

MAX_LINE_BYTES = 16 << 20

# A line with its newline in front: to look for that one byte is the fastest way there is to visit the lines. Objects begin
# with a member and patches with an object, and the ends are checked here too: printed Python dicts, arrays of numbers and
# lines such as "[2024-01-01] INFO" are many in ordinary logs, and so cost no Python code.
_CANDIDATE = re.compile(rb'\n[ \t\r\f\v]*(\{[ \t]*"[^\n]*\}|\[[ \t]*\{[^\n]*\}[ \t]*\])[ \t\r\f\v]*(?=\n)')
_FIRST_BYTE = re.compile(rb"\n[ \t\r\f\v]*([^ \t\r\f\v])")


class Scraper:
    """Takes output in pieces of any size, gives directives in order. For one thread at a time.

    A directive is the parsed line: an object to merge, or an array of objects that is a patch (or is not: `Document.apply`
    says). Empty ones and arrays of anything else are ordinary output.
    Holds at most one unfinished line of `MAX_LINE_BYTES`; longer ones are passed over and counted.
    """

    def __init__(self) -> None:
        self.unparsable = 0  #: lines that looked like JSON, and are not
        self.too_long = 0  #: lines that began like JSON, and were longer than is looked at
        self._pieces = [b"\n"]  #: the unfinished line, with the newline in front of it
        self._held = 1
        self._passing = False  #: the unfinished line is of no interest: wait for its end

    def feed(self, data: bytes) -> list[Any]:
        """The directives in the lines that end in `data`."""
        last = data.rfind(b"\n")
        if last < 0:
            self._hold(data)
            return []
        if self._passing:
            whole = data[data.find(b"\n") : last + 1]
        else:
            whole = b"".join([*self._pieces, data[: last + 1]])
        self._pieces, self._held, self._passing = [b"\n"], 1, False
        if last + 1 < len(data):
            self._hold(data[last + 1 :])
        return self._directives(whole)

    def finish(self) -> list[Any]:
        """The output has ended: the directive in a last line without a newline, if there is one."""
        return self.feed(b"\n")

    def _hold(self, data: bytes) -> None:
        """Keep the beginning of a line, for as long as it may become a candidate."""
        if self._passing:
            return
        begun = self._held > 1
        self._pieces.append(data)
        self._held += len(data)
        if not begun:
            first = _FIRST_BYTE.match(b"\n" + data)
            if first is None:  # blanks only, of which there may be many
                self._pieces, self._held = [b"\n"], 1
            elif first[1] not in b"{[":
                self._pass()
                return
        if self._held > MAX_LINE_BYTES:
            self.too_long += 1
            self._pass()

    def _pass(self) -> None:
        self._pieces, self._held, self._passing = [b"\n"], 1, True

    def _directives(self, lines: bytes) -> list[Any]:
        found = []
        for candidate in _CANDIDATE.finditer(lines):
            text = candidate[1]
            if len(text) > MAX_LINE_BYTES:
                self.too_long += 1
                continue
            try:
                found.append(_parse(text))
            except ValueError:
                self.unparsable += 1
        return found


def _parse(text: bytes) -> Any:
    """Raises ValueError. Bytes that are not UTF-8 become U+FFFD: the rest of the line is worth having."""
    try:
        return document.loads(text)
    except UnicodeDecodeError:
        return document.loads(text.decode(errors="replace").encode())
