"""Taking the oldest message out of one queue's directory, whatever else lies in it. All calls block."""

from __future__ import annotations

import collections
import dataclasses
import errno
import json
import os
import stat
import time
from typing import TYPE_CHECKING

import orjson
import structlog

from runner.queues import file_names as names
from runner.queues.file_lock import locked

if TYPE_CHECKING:
    from pathlib import Path

    from runner.queues.file_claims import Claims
    from runner.queues.file_owner import Owner
    from runner.queues.file_root import QueueRoot

log = structlog.get_logger(__name__)

LOCK_RETRY_SECS = 0.02  #: the Python client holds its lock for a millisecond


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSettings:
    """How long the directory queue waits for what. The defaults are right; tests shorten them."""

    heartbeat_secs: float = 15.0  #: how often an owner shows other hosts that it lives
    stale_secs: float = 60.0  #: an owner of another host that showed nothing for so long is dead
    sweep_secs: float = 2.0  #: how often claims of the dead are looked for
    rescan_secs: float = 5.0  #: how often directories are looked at where notifications do not come
    partial_secs: float = 10.0  #: a file that does not parse is half-written until it is so old
    lock_stale_secs: float = 60.0  #: a lock of the Python client that is older was left by a crash
    message_bytes: int = 64 * 2**20  #: what is larger is no message, and is set aside


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """A message that was claimed."""

    claim: Path
    body: bytes
    redelivered: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Take:
    """What an attempt to take a message gave: it, or when to look again without being told of a change (None: never)."""

    message: Message | None = None
    retry_secs: float | None = None


class Taker:
    """Takes messages of one queue, oldest first. One thread at a time.

    A listing is used for several messages, for at most ten times as long as it took: else emptying a directory of N
    messages would cost N listings.
    """

    def __init__(
        self, root: QueueRoot, queue: str, claims: Claims, owner: Owner, settings: FileSettings
    ) -> None:
        self._root = root
        self._queue = queue
        self._directory = root.queue(queue)
        self._claims = claims
        self._owner = owner
        self._settings = settings
        self._names: collections.deque[str] = collections.deque()
        self._valid_until = 0.0
        self._partial: dict[
            tuple[str, int, int], float
        ] = {}  # (name, mtime, size) -> first seen so, monotonic
        self._unreadable: set[str] = set()

    def invalidate(self) -> None:
        """The directory has changed at its old end: list it anew."""
        self._valid_until = 0.0

    def has_work(self) -> bool:
        """Whether something waits that may be a message; True also when the directory cannot be read."""
        try:
            with os.scandir(self._directory) as entries:
                return any(
                    names.is_message_name(e.name) and e.is_file(follow_symlinks=False) for e in entries
                )
        except OSError:
            return True

    def take(self) -> Take:
        """The oldest message, claimed. Raises OSError: FileNotFoundError when the queue is not there."""
        if self._names and time.monotonic() < self._valid_until:
            took = self._take_first()
            if took.message is not None or took.retry_secs is not None:
                return took
            # Others were faster, and what has come since the listing is not in it.
        self._list()
        return self._take_first() if self._names else Take()

    def _take_first(self) -> Take:
        retry_secs: list[float] = []
        record = self._claims.record()
        with locked(self._directory, record, self._owner, stale_secs=self._settings.lock_stale_secs) as held:
            if not held:
                return Take(retry_secs=LOCK_RETRY_SECS)
            while self._names:
                took = self._take(self._names.popleft())
                if took.message is not None:
                    return took
                if took.retry_secs is not None:
                    retry_secs.append(took.retry_secs)
        return Take(retry_secs=min(retry_secs, default=None))

    def _list(self) -> None:
        started = time.monotonic()
        found: list[tuple[int, str]] = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if not names.is_message_name(entry.name):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    found.append((status.st_mtime_ns, entry.name))
        found.sort()
        self._names = collections.deque(name for _, name in found)
        now = time.monotonic()
        self._valid_until = now + max(0.05, 10 * (now - started))
        present = set(self._names)
        self._partial = {key: seen for key, seen in self._partial.items() if key[0] in present}
        self._unreadable &= present

    def _take(self, name: str) -> Take:
        """Claim one file, if it is a whole message."""
        try:
            status, body = _read(self._directory / name, self._settings.message_bytes)
        except FileNotFoundError:
            return Take()
        except OSError as exc:
            if name not in self._unreadable:
                self._unreadable.add(name)
                log.warning(
                    "message cannot be read",
                    queue=self._queue,
                    message=names.printable(name),
                    error=exc.strerror,
                )
            return Take()
        oversize = status.st_size > self._settings.message_bytes
        wait_secs = 0.0 if oversize else self._unfinished_secs(name, status, body)
        if wait_secs > 0:
            return Take(retry_secs=wait_secs)
        try:
            claim = self._claims.take(self._queue, name)
        except FileNotFoundError:
            self._directory.lstat()  # raises when it is the queue that is missing
            return Take()
        return self._set_aside(claim, status) if oversize else self._checked(claim, status, body)

    def _set_aside(self, claim: Path, status: os.stat_result) -> Take:
        aside = self._claims.set_aside(claim, self._queue)
        log.error(
            "file too large for a message set aside", queue=self._queue, bytes=status.st_size, path=str(aside)
        )
        return Take()

    def _checked(self, claim: Path, status: os.stat_result, body: bytes) -> Take:
        """The claimed message, unless the file was exchanged or written to since it was read."""
        if _identity(claim.lstat()) != _identity(status):
            self._claims.give_back(claim, self._queue)
            return Take(retry_secs=0.0)
        return Take(message=Message(claim=claim, body=body, redelivered=names.is_returned(claim.name)))

    def _unfinished_secs(self, name: str, status: os.stat_result, body: bytes) -> float:
        """How long to wait for the rest of a file that the Python client may be writing; 0 when it is whole."""
        if names.is_whole(name) or _is_json(body):
            return 0.0
        key = (name, status.st_mtime_ns, status.st_size)
        # By its time stamp, or, should that lie ahead, by how long it has been seen unchanged.
        seen = self._partial.setdefault(key, time.monotonic())
        age_secs = max(time.time() - status.st_mtime, time.monotonic() - seen)
        return max(0.0, self._settings.partial_secs - age_secs)


def _read(path: Path, limit_bytes: int) -> tuple[os.stat_result, bytes]:
    """A regular file's status and content; no content when it is larger than the limit. Raises OSError."""
    # Neither a link nor a FIFO that took the place of the file since it was listed may lead astray or block.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return status, b"" if status.st_size > limit_bytes else file.read(limit_bytes + 1)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_json(body: bytes) -> bool:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        try:
            json.loads(
                body
            )  # accepts what the Python client may write and orjson does not: NaN, lone surrogates
        except (ValueError, RecursionError):
            return False
    return True
