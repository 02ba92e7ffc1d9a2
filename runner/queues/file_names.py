"""Names and places of the directory queue: which entries are queues, which are messages, what a returned one is called.

::

    root/<queue>/<message>                            waits
    root/.claimed/<owner>/.owner                      who holds, and when he was last alive (its mtime)
    root/.claimed/<owner>/<queue>/<n>/<message>       held
    root/.claimed/.dead-<owner>/...                   was held by a dead owner, is being returned
    root/.claimed/.delayed/<queue>/<due>-<id>/<message>   waits for its time
    root/.claimed/.oversize/<queue>/<message>         too large to be a message; left for a person
    root/.claimed/.tmp/<id>                           is being written

Everything stays on one file system, so that each step is one atomic rename. INTEROP.md 2.7 and 2.8 have the formats.
"""

from __future__ import annotations

import base64
import itertools
import os
import re
import secrets
import stat
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CLAIMED = ".claimed"
LOCK = "lock.lock"
OWNER = ".owner"
DEAD = ".dead-"
NEW = ".new-"
DELAYED = ".delayed"
OVERSIZE = ".oversize"
TEMPORARY = ".tmp"

_NAME_BYTES = 255  #: of one directory entry, on every file system that matters
_RETURNED = re.compile(r"\A(?P<base>.*)\.redelivered-(?P<times>\d{1,9})-[0-9a-f]{12}\Z", re.DOTALL)
_WHOLE = re.compile(r"\A[0-9a-v]{20}\Z")


def is_queue_name(name: str) -> bool:
    """Whether a sub-directory of that name is a queue: not hidden, and a name that logs and labels can carry."""
    return name != "" and not name.startswith(".") and "/" not in name and name.isprintable()


def is_message_name(name: str) -> bool:
    """Whether an entry of a queue's directory can be a message by its name."""
    return name != LOCK and not name.startswith(".")


def is_whole(name: str) -> bool:
    """Whether the name proves that the file was completely written before it got it.

    So do names given by rename: ours and those of the Go publisher (20 characters of base32hex, INTEROP.md 2.8), and
    those of returned messages. The Python client writes in place, under names of another shape.
    """
    return _RETURNED.match(name) is not None or _WHOLE.match(name) is not None


def is_returned(name: str) -> bool:
    """Whether a daemon has held this message before."""
    return _RETURNED.match(name) is not None


def returned_name(name: str) -> str:
    """The name under which a held message goes back: says so, counts, and is unique, so that nothing is overwritten.

    The mark is in the name, because that survives every crash and reaches the daemons of other hosts.
    """
    match = _RETURNED.match(name)
    base, times = (match["base"], int(match["times"])) if match else (name, 0)
    suffix = f".redelivered-{times + 1}-{secrets.token_hex(6)}"
    kept = os.fsencode(base)[: _NAME_BYTES - len(suffix)].decode("utf-8", "ignore")
    return (kept or "message") + suffix


def printable(name: str) -> str:
    """The name as a log can carry it, whatever bytes it is made of."""
    return name if name.isprintable() else ascii(name)


def make_like(directory: Path, model: Path) -> None:
    """Make a directory with the permissions of another one: daemons of several users may share a root.

    Raises FileNotFoundError when the parent is missing; one that exists is left as it is.
    """
    try:
        directory.mkdir()
    except FileExistsError:
        return
    directory.chmod(stat.S_IMODE(model.stat().st_mode))


class NameSource:
    """Message names as the Go publisher makes them (xid): 20 characters that sort by second, then by order of making."""

    def __init__(self) -> None:
        self._source = os.urandom(5)
        self._count = itertools.count(secrets.randbelow(1 << 23))

    def __call__(self) -> str:
        """A name that was not given before."""
        raw = int(time.time()).to_bytes(4, "big") + self._source
        raw += (next(self._count) & 0xFFFFFF).to_bytes(3, "big")
        return base64.b32hexencode(raw).decode("ascii").rstrip("=").lower()
