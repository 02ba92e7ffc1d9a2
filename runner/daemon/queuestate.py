"""What the dispatcher remembers of one queue: what it asks for, how it has fared, whether it may be asked now."""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from runner.queues.base import Consumer, Delivery, QueueBackend, QueueRef
    from runner.request.model import Request, Resources

#: What a queue asked for is forgotten after this long, or a huge first job would starve the small ones behind it.
ASK_SECS = 180.0
#: How long a message that fits this machine, but not now, is held the first time; twice as long each further time.
#: Shorter than the minute after which a message is moved to a lease.
PARK_SECS = 45.0
#: ... but no longer than this: another host may have room for it by now. Half of what RabbitMQ allows where nobody may lease.
LAST_PARK_SECS = 900.0
#: After it was put back its queue is left to other hosts for this part of the time that it was held, at least.
REST = 0.25
#: So many messages of a queue are held at most for want of room. Those behind them are taken until then.
MAX_PARKED = 2
#: ... and so many because they need an endpoint that does not answer: one wrong address is not to stop a queue.
MAX_STRANDED = 8
#: For so long nothing is taken from a queue whose message needed an endpoint that did not answer: most are back by then, and
#: most of its messages need the same. After that it is looked which ones do.
STRANDED_SECS = 30.0
#: Freed room is kept for a message in the last quarter of each doubling of its age, from this age on.
KEEP_SECS = 60.0
#: So many messages that were put back for want of room are remembered for each queue.
MAX_CROWDED = 64
FIRST_BACKOFF_SECS = 5.0
LAST_BACKOFF_SECS = 300.0
#: How long a queue whose message is not for this host is left to others, each time.
ELSEWHERE_SECS = 300.0
#: A queue's use of the machine counts half after this long.
USAGE_HALF_LIFE_SECS = 600.0


@dataclasses.dataclass(kw_only=True, eq=False)
class Parked:
    """A message that is held until it can start, or so that what comes behind it can be looked at."""

    delivery: Delivery
    request: Request | None  #: None: it is not for this host
    lacking: str  #: in words, as of when it came
    endpoint: str = ""  #: what it needs first of all: a storage endpoint that does not answer
    since: float
    over: bool = False  #: it is to be put back
    task: asyncio.Task[None] | None = None


@dataclasses.dataclass(kw_only=True)
class Crowded:
    """A message for which there was no room: since when, and how often it was put back for that."""

    since: float
    put_backs: int = 0


class Asking(NamedTuple):
    """What queues ask for, and who asks: all for which it is the same find room, or none."""

    ask: Resources | None
    owner: str = ""  #: the queue, where it makes a difference: a card serves one queue at a time


@dataclasses.dataclass(kw_only=True, eq=False)
class QueueState:
    """One queue, as this daemon sees it. Times are of `time.monotonic`."""

    ref: QueueRef
    backend: QueueBackend
    ask: Resources | None = None
    ask_until: float = 0.0
    #: Since when the message that asks for it waits: it was put back, and is asked for when there is room. 0: none was.
    ask_since: float = 0.0
    closed_until: float = 0.0  #: back-off
    left_until: float = 0.0  #: left to other hosts, however well its runs end meanwhile
    endpoint: str = ""  #: a storage endpoint that a message needed and that did not answer
    endpoint_until: float = 0.0  #: nothing is taken before, unless it answers
    why: str = ""  #: of the back-off, for people
    failures: int = 0
    running: int = 0
    holding: int = 0  #: how many of those have a part of the machine
    parked: list[Parked] = dataclasses.field(default_factory=list)
    consumer: Consumer | None = None  #: what it is taken from by now
    asked: bool = False  #: somebody waits for its next message
    on_change: Callable[[QueueState], None] | None = None  #: hears when something here may open or close it
    _crowded: collections.OrderedDict[str, Crowded] = dataclasses.field(
        default_factory=collections.OrderedDict
    )
    _used: float = 0.0
    _used_at: float = dataclasses.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        #: Its name in the ledger and in run states: the same after a restart, and by whatever account it is seen.
        self.ledger_key = f"{self.backend.identity}/{self.ref.vhost}/{self.ref.name}"

    @property
    def older_key(self) -> str:
        """What it was called there when that hung on the account's label."""
        return f"{self.ref.account}/{self.ref.vhost}/{self.ref.name}"

    @property
    def full(self) -> bool:
        """Whether it holds as many messages as it may."""
        stranded = sum(bool(parked.endpoint) for parked in self.parked)
        return stranded >= MAX_STRANDED or len(self.parked) - stranded >= MAX_PARKED

    def changed(self) -> None:
        """Something that concerns this queue alone may have opened or closed it."""
        if self.on_change is not None:
            self.on_change(self)

    # -- room

    def remember(self, ask: Resources) -> None:
        """A message that has started asked for that: so may the next one."""
        self.ask, self.ask_until, self.ask_since = ask, time.monotonic() + ASK_SECS, 0.0

    def forget_ask(self) -> None:
        """Nobody knows what its next message asks for."""
        self.ask, self.ask_until, self.ask_since = None, 0.0, 0.0

    def current_ask(self) -> Resources | None:
        """What its next message will probably ask for; None when nobody knows any more."""
        return self.ask if time.monotonic() < self.ask_until else None

    def asking(self) -> Asking:
        """What its next message will probably need, as far as it makes a difference whether there is room for it."""
        ask = self.current_ask()
        return Asking(ask, self.ledger_key if ask is not None and ask.gpus else "")

    @property
    def waits_for_room(self) -> bool:
        """Whether its next message is one that was put back for want of room: room comes first, then the message."""
        return self.ask_since > 0 and self.current_ask() is not None

    def crowded(self, digest: str) -> Crowded:
        """What is known of a message for which there is no room."""
        found = self._crowded.setdefault(digest, Crowded(since=time.monotonic()))
        self._crowded.move_to_end(digest)
        while len(self._crowded) > MAX_CROWDED:
            self._crowded.popitem(last=False)
        return found

    def found_room(self, digest: str) -> None:
        """There was room for it."""
        self._crowded.pop(digest, None)

    def park_secs(self, delivery: Delivery) -> float:
        """For how long that message is held, when there is no room for it meanwhile."""
        return min(self._cycle_secs(delivery), LAST_PARK_SECS)

    def put_back(self, delivery: Delivery, ask: Resources) -> float:
        """It goes back for want of room: for how many seconds the queue waits for that room, and for nothing else.

        Where the broker counts deliveries, the time from one to the next doubles each time: after N hours there were
        `log2(N * 80) + 1` of them at most, however many hosts took part.
        """
        cycle = self._cycle_secs(delivery)
        held = min(cycle, LAST_PARK_SECS)
        rest = max(held * REST, cycle - held if delivery.deliveries else 0.0)
        known = self.crowded(delivery.digest)
        known.put_backs += 1
        self.ask, self.ask_until, self.ask_since = ask, time.monotonic() + rest, known.since
        return rest

    def strand(self, delivery: Delivery, endpoint: str) -> None:
        """It goes back for want of an endpoint. It may come again soon, and is held for longer then.

        Where the broker drops what it has delivered too often, the time from one delivery to the next doubles, as for `put_back`.
        """
        cycle = self._cycle_secs(delivery)
        rest = cycle - min(cycle, LAST_PARK_SECS) if delivery.drops and delivery.deliveries else 0.0
        self.crowded(delivery.digest).put_backs += 1
        self.wants(endpoint, at_least_secs=rest)

    def _cycle_secs(self, delivery: Delivery) -> float:
        times = max(self.crowded(delivery.digest).put_backs, delivery.deliveries)
        return PARK_SECS * 2.0 ** min(times, 40)

    # -- back-off

    def succeeded(self) -> None:
        """A message of it was settled for good: no back-off."""
        self.failures = 0
        if time.monotonic() >= self.left_until:
            self.closed_until, self.why = 0.0, ""
        self.changed()

    def leave(self, delivery: Delivery, why: str) -> float:
        """It goes back, for other hosts to have it: for how many seconds they have the queue for themselves.

        Held before for as long as `park_secs` says, what is behind it is served most of the time. Where the broker drops what
        it has delivered too often, the time from one delivery to the next doubles, as for `put_back`.
        """
        cycle = self._cycle_secs(delivery)
        rest = ELSEWHERE_SECS * random.uniform(1.0, 1.25)
        if delivery.drops and delivery.deliveries:
            rest = max(rest, cycle - min(cycle, LAST_PARK_SECS))
        self.crowded(delivery.digest).put_backs += 1
        self.left_until = time.monotonic() + rest
        self.closed_until, self.why = max(self.closed_until, self.left_until), why
        self.changed()
        return rest

    def back_off(self, why: str, *, at_least_secs: float = 0.0) -> float:
        """Leave it alone for a while, longer each time in a row, with jitter; for how many seconds."""
        self.failures += 1
        grown = FIRST_BACKOFF_SECS * 2.0 ** min(self.failures - 1, 10)
        secs = max(min(LAST_BACKOFF_SECS, grown) * random.uniform(0.75, 1.25), at_least_secs)
        self.closed_until, self.why = max(self.left_until, time.monotonic() + secs), why
        self.changed()
        return secs

    def wants(self, endpoint: str, *, at_least_secs: float = 0.0) -> None:
        """A message of it needs an endpoint that does not answer: others may need the same."""
        until = time.monotonic() + max(STRANDED_SECS, at_least_secs)
        if (
            not self.endpoint or until > self.endpoint_until
        ):  # else it is closed for longer, for another message
            self.endpoint, self.endpoint_until = endpoint, until
        self.changed()

    # -- rank

    def used(self, core_secs: float) -> None:
        """A run of it has had that much of this machine, and has it no more."""
        self.holding -= 1
        self._used, self._used_at = self._faded() + core_secs, time.monotonic()

    def usage(self) -> float:
        """How much of this machine it has had lately (core seconds, fading), and a minute for each run that has a part of it."""
        return self._faded() + 60.0 * self.holding

    def _faded(self) -> float:
        faded: float = self._used * 0.5 ** ((time.monotonic() - self._used_at) / USAGE_HALF_LIFE_SECS)
        return faded


def keeping(age_secs: float) -> tuple[bool, float]:
    """Whether freed room is kept for a message that has waited for so long, and for how many seconds that stays so.

    A quarter of the time, in stretches that double: long runs, too, end within one of them, so that nothing starves for ever,
    and a machine that waits in vain for a run of days to end loses no more than that quarter.
    """
    if age_secs < KEEP_SECS:
        return False, KEEP_SECS * 1.75 - age_secs
    begin = KEEP_SECS * 2.0 ** math.floor(math.log2(age_secs / KEEP_SECS))
    if age_secs < begin * 1.75:
        return False, begin * 1.75 - age_secs
    return True, begin * 2.0 - age_secs
