"""Which queues have a standing consumer, where there are more of them than consumers are good for (docs/performance.md).

A consumer is a channel: some 50 to 80 kB of the broker's memory, for each runner, and one of the connection's channels.
So a bounded number of queues has one, those with messages or lately with messages first. The others are *watched*: one
request to the management API tells how many messages wait in each queue, and one that has some is given the place of a
queue that has none. All of it runs in the daemon's loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Protocol, TypeAlias

import structlog

from runner import errors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

log = structlog.get_logger(__name__)

#: How many queues of an account have a consumer at a time.
STANDING = 500
#: How long after an answer the counts of the others are asked for again.
LOOK_SECS = 5.0
#: How soon the first look follows the first queue that finds no place: others of the same discovery are on their way.
FIRST_LOOK_SECS = 0.5
#: How long a queue with messages keeps a place that gives it none (its consumer was not asked) while others wait for one.
TENURE_SECS = 10.0
#: So many looks fail in a row before places go round blindly: a hiccup is not worth moving consumers for.
FAILURES = 3
#: Which part of the places is moved at a time when nobody tells who has messages.
BLIND_SHARE = 4

Key: TypeAlias = tuple[str, str]  #: (vhost, queue)


class Seeker(Protocol):
    """What asks for a place: a consumer."""

    @property
    def key(self) -> Key:
        """Which queue it is of."""

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for its next message now."""

    def placed(self) -> None:
        """It has a place from now on."""

    def displaced(self) -> None:
        """It has none any more: end the consumer at the broker, and ask again."""


class Places:
    """The places of one account. Up to `limit` queues nothing happens here: each has its own, for good."""

    def __init__(self, limit: int, count: Callable[[], Awaitable[Mapping[Key, int | None]]]) -> None:
        """`count` tells how many messages wait in each queue (None: not known); raises `errors.QueueUnavailable`."""
        self.limit = limit
        self._count = count
        #: -> when it last got a message, or its place for the sake of one
        self._placed: dict[Seeker, float] = {}
        self._watched: dict[
            Seeker, None
        ] = {}  # without a place, and asked since the last look; longest first
        self._failures = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def looking(self) -> bool:
        """Whether `count` is asked again within the next seconds, and has answered the last time."""
        return bool(self._watched) and not self._failures

    def ask(self, seeker: Seeker) -> bool:
        """Whether it has a place, from now on if one is free. If not, its queue is watched, and `placed` may follow."""
        if seeker in self._placed:
            return True
        if len(self._placed) < self.limit and not self._watched:
            self._placed[seeker] = -math.inf
            return True
        self._watched[seeker] = None
        if self._task is None:
            log.info(
                "more queues than standing consumers: the others are watched by their counts",
                standing=self.limit,
            )
            self._task = asyncio.create_task(self._look_on(), name="watch queues")
        return False

    def active(self, seeker: Seeker) -> None:
        """It has got a message."""
        if self._placed.pop(seeker, None) is not None:
            self._placed[seeker] = time.monotonic()

    def leave(self, seeker: Seeker) -> None:
        """It is closed. Its place is given away with the next look."""
        self._placed.pop(seeker, None)
        self._watched.pop(seeker, None)

    def shrink(self, limit: int) -> None:
        """The connection has room for fewer: those that had no message for longest lose theirs."""
        if limit < self.limit:
            log.warning("the broker allows few channels: fewer queues have a consumer", standing=limit)
            self.limit = limit
            for seeker in list(self._placed)[: max(0, len(self._placed) - limit)]:
                self._displace(seeker)

    async def aclose(self) -> None:
        """Look no more. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _look_on(self) -> None:
        wait = FIRST_LOOK_SECS
        while True:
            await asyncio.sleep(wait)
            wait = LOOK_SECS
            try:
                if self._watched:  # else nobody has asked in vain
                    await self._look()
            except Exception:  # nobody else would serve the watched
                log.exception("queues cannot be watched")

    async def _look(self) -> None:
        try:
            counts = await self._count()
        except errors.QueueUnavailable as error:
            self._failures += 1
            if self._failures < FAILURES:
                return
            if self._failures == FAILURES:
                log.warning("which queues have messages is not known: they take turns", error=str(error))
            counts = dict.fromkeys(seeker.key for seeker in self._watched)
        else:
            self._failures = 0
        self._rearrange(counts)

    def _rearrange(self, counts: Mapping[Key, int | None]) -> None:
        """Give places to the queues that have messages, and what is free to the others."""
        full = [seeker for seeker in self._watched if counts.get(seeker.key, 0)]
        blind = [seeker for seeker in self._watched if counts.get(seeker.key, 0) is None]
        victims = iter(self._victims(counts))
        for seeker in full + blind[: max(1, self.limit // BLIND_SHARE)]:
            if len(self._placed) >= self.limit:
                if (victim := next(victims, None)) is None:
                    break
                self._displace(victim)
            self._place(seeker, time.monotonic())
        for seeker in list(self._watched):
            if len(self._placed) < self.limit:
                self._place(seeker, -math.inf)
            elif not seeker.waiting and counts.get(seeker.key, 0) == 0:
                del self._watched[seeker]  # until it asks again

    def _victims(self, counts: Mapping[Key, int | None]) -> list[Seeker]:
        """Who may lose its place: first those without messages, those that had one longest ago first."""
        by_age = sorted(self._placed, key=self._placed.__getitem__)
        empty = [seeker for seeker in by_age if counts.get(seeker.key) == 0]
        old = time.monotonic() - TENURE_SECS
        return empty + [
            seeker for seeker in by_age if counts.get(seeker.key) != 0 and self._placed[seeker] <= old
        ]

    def _place(self, seeker: Seeker, since: float) -> None:
        self._watched.pop(seeker, None)
        self._placed[seeker] = since
        seeker.placed()

    def _displace(self, seeker: Seeker) -> None:
        del self._placed[seeker]
        seeker.displaced()
