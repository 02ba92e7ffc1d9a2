"""Writes lines to a stream whose reader may be slow, or gone, without ever waiting for it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import io
import os
import select
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

#: What may wait in memory for a slow reader.
PENDING_BYTES = 4_000_000
#: A pipe that polls writable takes this much without blocking (PIPE_BUF).
_CHUNK_BYTES = 4096
_RETRY_SECS = 0.1


class Sink:
    """Lines to a stream, in order. Thread-safe; `write` neither blocks nor raises.

    Lines are written at once while the reader keeps up (a crash loses none). When it does not they wait in memory, at
    most `PENDING_BYTES`; further ones are dropped, and `on_dropped(count)` is called once the reader has caught up.
    After a broken pipe nothing is written any more.
    """

    def __init__(self, stream: TextIO, *, on_dropped: Callable[[int], None]) -> None:
        self._stream = stream
        self._on_dropped = on_dropped
        self._fd = _descriptor(stream)
        self._poll = select.poll()
        if self._fd is not None:
            self._poll.register(self._fd, select.POLLOUT)
        self._lock = threading.RLock()
        self._pending: collections.deque[bytes] = collections.deque()
        self._pending_bytes = 0
        self._dropped = 0
        self._broken = False
        self._retry: asyncio.TimerHandle | None = None

    def write(self, line: str) -> None:
        """One line, without its newline."""
        with self._lock:
            if self._fd is None:
                with contextlib.suppress(
                    OSError, ValueError
                ):  # ValueError: closed, at the end of the process
                    self._stream.write(line + "\n")
                return
            if self._broken:
                return
            data = line.encode(errors="backslashreplace") + b"\n"
            if self._pending_bytes + len(data) > PENDING_BYTES:
                self._dropped += 1
            else:
                self._pending.extend(data[at : at + _CHUNK_BYTES] for at in range(0, len(data), _CHUNK_BYTES))
                self._pending_bytes += len(data)
            self._drain()
        self._after()

    def flush(self, secs: float) -> None:
        """Wait for the reader, for at most `secs`. Blocks."""
        deadline = time.monotonic() + secs
        with self._lock:
            self._drain()
            while self._pending and (left := deadline - time.monotonic()) > 0:
                self._poll.poll(left * 1000)
                self._drain()

    def _after(self) -> None:
        """Tell what was lost, or come back for what still waits."""
        with self._lock:
            dropped, waiting = self._dropped, bool(self._pending)
            if not waiting:
                self._dropped = 0
        if dropped and not waiting:
            self._on_dropped(dropped)
        if waiting and self._retry is None:
            with contextlib.suppress(RuntimeError):  # not in a loop: the next line tries again
                self._retry = asyncio.get_running_loop().call_later(_RETRY_SECS, self._come_back)

    def _come_back(self) -> None:
        self._retry = None
        with self._lock:
            self._drain()
        self._after()

    def _drain(self) -> None:
        while self._pending and self._fd is not None:
            if not self._poll.poll(0):
                return
            head = self._pending[0]
            try:
                done = os.write(self._fd, head)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                self._broken = exc.errno in {errno.EPIPE, errno.EBADF, errno.EIO}
                self._dropped += 1
                self._pending.clear()
                self._pending_bytes = 0
                return
            self._pending_bytes -= done
            if done == len(head):
                self._pending.popleft()
            else:
                self._pending[0] = head[done:]


def _descriptor(stream: TextIO) -> int | None:
    """None for a stream that is not a file (a test's)."""
    with contextlib.suppress(io.UnsupportedOperation, OSError, ValueError, AttributeError):
        return stream.fileno()
    return None
