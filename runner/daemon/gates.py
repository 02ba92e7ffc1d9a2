"""Waiting for a queue to open or to close. There may be thousands of queues: a change wakes those whom it concerns.

A queue that listens is concerned only by what takes its room away, a closed one only by what may open it. Which change of the
machine does that is the same for all queues that asked for the same last, and is found out once for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from runner.daemon.queuestate import Asking, QueueState

#: Queues that have lost their room go on listening for so long: closing and opening consumers at each start costs more.
LINGER_SECS = 1.0
#: Closed queues are looked at again at least so often: room can come back without a word (a disk that others empty).
LOOK_SECS = 60.0
#: Of those that may open, the one that has had the least of the machine lately asks first; so much later the next ones do,
#: if there is still room: more of them in each step.
STEP_SECS = 0.02
GROWTH = 4


class _Kind(enum.Enum):
    LISTENING = enum.auto()
    CLOSED = enum.auto()  # for want of room
    BARRED = enum.auto()  # for another reason, too
    RESERVED = enum.auto()  # it has room of its own, or waits for it in the allocator


class Gates:
    """Who waits, for what. Made in the loop that it works in."""

    def __init__(
        self,
        *,
        shut: Callable[[], bool],
        lacks: Callable[[Asking], bool],
    ) -> None:
        """`shut`: no queue is open, whatever it asks for. `lacks`: there is no room for queues that asked for that last."""
        self._shut = shut
        self._lacks = lacks
        self._woken: dict[QueueState, asyncio.Future[bool]] = {}  # True: the machine has woken it
        self._ready: dict[QueueState, Callable[[], bool]] = {}  # of those that are barred
        self._groups: dict[tuple[_Kind, Asking], dict[QueueState, None]] = {}
        self._short: dict[Asking, float] = {}  # since when those that listen lack room
        self._loop = asyncio.get_running_loop()
        self._due = False
        self._timer: asyncio.TimerHandle | None = None
        self._step = 0  # how many were opened in the last step, while steps go on
        self._step_at = 0.0

    def notify(self) -> None:
        """The machine has changed. Cheap; callable often: all changes of one turn of the loop are one."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self._sweep)

    def changed(self, state: QueueState, *, needs_room: bool) -> None:
        """Something has changed that concerns that queue alone. If it still needs room it stays in line for that."""
        if not needs_room or state not in self._groups.get((_Kind.CLOSED, state.asking()), ()):
            self._wake([state], by_machine=False)

    async def opened(
        self, state: QueueState, ready: Callable[[], bool] | None, timeout_secs: float | None
    ) -> None:
        """Wait until a queue may be open, or for so long. `ready` tells that it is; None: all that it lacks is room."""
        if self._timer is None:
            self._at(LOOK_SECS)
        with self._waiting(state, _Kind.CLOSED if ready is None else _Kind.BARRED) as woken:
            if ready is not None:
                self._ready[state] = ready
            try:
                await asyncio.wait({woken}, timeout=timeout_secs)
            finally:
                self._ready.pop(state, None)

    async def closing(self, state: QueueState, wish: asyncio.Future[Any]) -> bool:
        """Wait until `wish` is done, or an open queue may be closed. True: it has had no room for a while."""
        with self._waiting(state, _Kind.LISTENING) as woken:
            await asyncio.wait({wish, woken}, return_when=asyncio.FIRST_COMPLETED)
            return woken.done() and woken.result()

    def reserved(self, state: QueueState) -> contextlib.AbstractContextManager[asyncio.Future[bool]]:
        """What is done when something changes that concerns that queue alone, or when all are shut."""
        return self._waiting(state, _Kind.RESERVED)

    @contextlib.contextmanager
    def _waiting(self, state: QueueState, kind: _Kind) -> Iterator[asyncio.Future[bool]]:
        """One task waits for a queue, at one place at a time."""
        key = kind, state.asking()
        woken = self._woken[state] = self._loop.create_future()
        self._groups.setdefault(key, {})[state] = None
        try:
            yield woken
        finally:
            del self._woken[state]
            group = self._groups[key]
            del group[state]
            if not group:
                del self._groups[key]

    def _wake(self, states: Iterable[QueueState], *, by_machine: bool) -> None:
        for state in states:
            woken = self._woken.get(state)
            if woken is not None and not woken.done():
                woken.set_result(by_machine)

    def _at(self, secs: float) -> None:
        """Sweep in so many seconds, or before."""
        when = self._loop.time() + secs
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = self._loop.call_later(secs, self.notify)

    def _sweep(self) -> None:
        self._due = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        shut = self._shut()
        self._close(shut=shut)
        if not shut:
            self._open()

    def _close(self, *, shut: bool) -> None:
        now, short = self._loop.time(), {}
        for (kind, asking), group in self._groups.items():
            if shut and kind in {_Kind.LISTENING, _Kind.RESERVED}:
                self._wake(group, by_machine=True)
            elif kind is _Kind.LISTENING and self._lacks(asking):
                since = short[asking] = self._short.get(asking, now)
                if (left := since + LINGER_SECS - now) <= 0:
                    self._wake(group, by_machine=True)
                else:
                    self._at(left)
        self._short = short

    def _open(self) -> None:
        ready: list[QueueState] = []
        closed = False
        for (kind, asking), group in self._groups.items():
            if kind is _Kind.BARRED:
                ready += [state for state in group if self._ready[state]()]
                closed = True
            elif kind is _Kind.CLOSED:
                ready += [] if self._lacks(asking) else group
                closed = True
        if closed:
            self._at(LOOK_SECS)
        if not ready:
            self._step = 0
            return
        now = self._loop.time()
        if self._step and now < self._step_at:
            self._at(self._step_at - now)
            return
        ready.sort(key=lambda state: state.usage())
        self._step = self._step * GROWTH or 1
        self._wake(ready[: self._step], by_machine=True)
        if len(ready) > self._step:
            self._step_at = now + STEP_SECS
            self._at(STEP_SECS)
        else:
            self._step = 0
