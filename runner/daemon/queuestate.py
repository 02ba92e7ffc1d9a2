"""What the dispatcher remembers of one queue: what it asks for, how it has fared, whether it may be asked now."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.queues.base import QueueBackend, QueueRef
    from runner.request.model import Resources

#: What a queue asked for is forgotten after this long, or a huge first job would starve the small ones behind it.
ASK_SECS = 180.0
#: ... or, when it was put back for want of room again and again, after this long: some brokers count put-backs, and drop a
#: message after twenty.
LAST_ASK_SECS = 3600.0
FIRST_BACKOFF_SECS = 5.0
LAST_BACKOFF_SECS = 300.0
#: How long a queue whose message is not for this host is left to others.
ELSEWHERE_SECS = 300.0
#: A queue's use of the machine counts half after this long.
USAGE_HALF_LIFE_SECS = 600.0


@dataclasses.dataclass(kw_only=True, eq=False)
class QueueState:
    """One queue, as this daemon sees it. Times are of `time.monotonic`."""

    ref: QueueRef
    backend: QueueBackend
    ask: Resources | None = None
    ask_until: float = 0.0
    closed_until: float = 0.0  #: back-off
    endpoint: str = ""  #: a storage endpoint that its messages need and that does not answer
    why: str = ""  #: of the back-off, for people
    failures: int = 0
    running: int = 0
    crowded: int = 0  #: how often in a row a message of it was put back for want of room
    left: str = ""  #: digest of the message that was left to other hosts last
    _used: float = 0.0
    _used_at: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def ledger_key(self) -> str:
        """Its name in the ledger and in run states: unique over all accounts, the same after a restart."""
        return f"{self.ref.account}/{self.ref.vhost}/{self.ref.name}"

    def remember(self, ask: Resources) -> None:
        """Its last message asks for that."""
        secs = min(ASK_SECS * 2.0 ** min(self.crowded, 10), LAST_ASK_SECS)
        self.ask, self.ask_until = ask, time.monotonic() + secs

    def current_ask(self) -> Resources | None:
        """What its next message will probably ask for; None when nobody knows any more."""
        return self.ask if time.monotonic() < self.ask_until else None

    def succeeded(self) -> None:
        """A message of it was settled for good: no back-off."""
        self.failures, self.closed_until, self.why = 0, 0.0, ""

    def back_off(self, why: str, *, at_least_secs: float = 0.0) -> float:
        """Leave it alone for a while, longer each time in a row, with jitter; for how many seconds."""
        self.failures += 1
        grown = FIRST_BACKOFF_SECS * 2.0 ** min(self.failures - 1, 10)
        secs = max(min(LAST_BACKOFF_SECS, grown) * random.uniform(0.75, 1.25), at_least_secs)
        self.closed_until, self.why = time.monotonic() + secs, why
        return secs

    def used(self, core_secs: float) -> None:
        """It has had that much of this machine."""
        self._used, self._used_at = self.usage() + core_secs, time.monotonic()

    def usage(self) -> float:
        """How much of this machine it has had lately (core seconds, fading), running ones counted as a minute each."""
        faded: float = self._used * 0.5 ** ((time.monotonic() - self._used_at) / USAGE_HALF_LIFE_SECS)
        return faded + 60.0 * self.running
