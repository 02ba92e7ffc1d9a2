"""Stopping is a protocol in stages: the first signal drains, the second ends at once (DESIGN.md 5.10).

A limit that is reached (INTEROP.md 8.6) drains as well, but is no signal: runs finish whatever `--grace` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Iterator

log = structlog.get_logger(__name__)


@dataclasses.dataclass(eq=False)
class Stop:
    """What was asked for so far. Handlers only set flags; `daemon.service` acts on them."""

    drain: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    signalled: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)  #: runs get `--grace`
    force: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    signal: int = 0  #: the last one; the exit code of a forced stop is 128 and this

    def ask(self, number: int = 0) -> None:
        """Drain; by a signal: with `--grace`; by a second one: end at once.

        A hang-up is no second signal: of one terminal that is closed it comes twice, from the shell and from the kernel.
        """
        if number == signal.SIGHUP and self.signalled.is_set():
            return
        name = signal.Signals(number).name if number else None
        if number and self.signalled.is_set():
            log.warning("second signal: ending at once", signal=name)
            self.signal = number
            self.force.set()
            return
        if not self.drain.is_set():
            log.info("draining", signal=name)
        self.drain.set()
        if number:
            self.signal = number
            self.signalled.set()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """While it is open, SIGTERM, SIGINT and, unless `nohup` has it ignored, SIGHUP come here. Only in the main thread's loop.

        A terminal that is closed under the daemon would kill it otherwise, and that is an attempt of every run.
        """
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self.ask, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)
