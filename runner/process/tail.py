"""Reading a file that grows, each byte once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Tail:
    """A place in a file that somebody else appends to. Holds no descriptor between reads; blocking, so for threads.

    `offset` is the place: what lies before it was read. It may be given to go on where another Tail has ended.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset

    def read_new(self, max_bytes: int) -> bytes:
        """Return the next bytes, at most so many; nothing when there are none yet, or no file.

        A file that has become shorter than `offset` was truncated and is read from its start again. Raises OSError
        when there is a file but it cannot be read.
        """
        try:
            file = self.path.open("rb", buffering=0)
        except FileNotFoundError:
            return b""
        with file:
            if file.seek(0, 2) < self.offset:
                self.offset = 0
            file.seek(self.offset)
            data = file.read(max_bytes)
        self.offset += len(data)
        return data
