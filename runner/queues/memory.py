"""Queues in memory: a double that keeps the whole contract. For tests, of this program and of others built on it."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from typing import TYPE_CHECKING

from runner.errors import QueueUnavailable
from runner.queues.base import Consumer, Delivery, Existence, QueueBackend, QueueGone, QueueInfo, QueueRef

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclasses.dataclass(kw_only=True, eq=False)
class _Message:
    body: bytes
    redelivered: bool = False


@dataclasses.dataclass(kw_only=True, eq=False)
class _Queue:
    durable: bool
    ready: collections.deque[_Message] = dataclasses.field(default_factory=collections.deque)


class MemoryBroker:
    """The other side: queues that outlive the backends connected to them. Several backends may share one."""

    def __init__(self) -> None:
        self.queues: dict[str, _Queue] = {}
        self._changed = asyncio.Event()

    def declare(self, name: str, *, durable: bool = True) -> None:
        """Make a queue; one that is there stays as it is."""
        self.queues.setdefault(name, _Queue(durable=durable))
        self.notify()

    def delete(self, name: str) -> None:
        """Remove a queue and what waits in it."""
        self.queues.pop(name, None)
        self.notify()

    def put(self, name: str, message: _Message, *, first: bool = False) -> bool:
        """Add a message at the end, or at the head; False when there is no such queue."""
        queue = self.queues.get(name)
        if queue is None:
            return False
        (queue.ready.appendleft if first else queue.ready.append)(message)
        self.notify()
        return True

    def notify(self) -> None:
        """Wake everybody who waits for a change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def change(self) -> None:
        """Wait for the next change."""
        await self._changed.wait()


class _MemoryDelivery(Delivery):
    """A message held by a `MemoryBackend`."""

    def __init__(self, backend: MemoryBackend, queue: QueueRef, message: _Message) -> None:
        super().__init__(queue=queue, body=message.body, redelivered=message.redelivered)
        self._backend = backend
        self.extended_secs = 0.0  #: what `extend` asked for last: for tests

    async def ack(self) -> bool:
        return self._backend.held.pop(self, None) is not None

    async def requeue(self, delay_secs: float = 0) -> bool:
        message = self._backend.held.pop(self, None)
        if message is None:
            return False
        return self._backend.give_back(self.queue.name, message, delay_secs)

    async def extend(self, secs: float) -> None:
        self.extended_secs = secs


class _MemoryConsumer(Consumer):
    """Takes a message only in the step that hands it out: there is nothing to lose when `next` is cancelled."""

    def __init__(self, backend: MemoryBackend, queue: QueueRef) -> None:
        self._backend = backend
        self._queue = queue

    async def next(self) -> Delivery:
        backend, name = self._backend, self._queue.name
        while True:
            if not backend.away and not backend.closed:
                queue = backend.broker.queues.get(name)
                if queue is None:
                    raise QueueGone(name)
                backend.note(name, queue.durable)
                if queue.ready:
                    return backend.hold(self._queue, queue.ready.popleft())
            await backend.broker.change()

    async def pause(self) -> None:
        """Nothing was fetched ahead."""

    async def close(self) -> None:
        """Nothing was fetched ahead."""


class MemoryBackend(QueueBackend):
    """One account of a `MemoryBroker`; without one, of a broker of its own."""

    kind = "memory"

    def __init__(self, account: str = "memory", *, broker: MemoryBroker | None = None) -> None:
        self.account = account
        self.broker = broker or MemoryBroker()
        self.held: dict[Delivery, _Message] = {}
        self.away = False
        self.closed = False
        self._durable: dict[
            str, bool
        ] = {}  # queues seen since the connection last broke, or known to be durable
        self._delayed: dict[asyncio.TimerHandle, tuple[str, _Message]] = {}

    # -- the contract ------------------------------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        """For as long as the broker lives."""
        return f"memory://{id(self.broker):x}"

    async def open(self) -> None:
        """Connected at once."""
        self.closed = False

    async def aclose(self) -> None:
        """What is held or delayed goes back."""
        self.closed = True
        self._lose_held()
        delayed, self._delayed = self._delayed, {}
        for timer, (name, message) in delayed.items():
            timer.cancel()
            self.broker.put(name, message, first=True)

    async def discover(self) -> list[QueueInfo]:
        """All queues, with what waits in each."""
        self._check()
        for name, queue in self.broker.queues.items():
            self.note(name, queue.durable)
        return [
            QueueInfo(ref=self.ref(name), ready=len(queue.ready))
            for name, queue in self.broker.queues.items()
            if not name.endswith("_response")
        ]

    async def consumer(self, queue: QueueRef) -> Consumer:
        """A consumer."""
        return _MemoryConsumer(self, queue)

    async def existence(self, queue: QueueRef) -> Existence:
        """GONE for durable queues, and for those seen since the connection last broke."""
        if self.away or self.closed:
            return Existence.UNKNOWN
        if queue.name in self.broker.queues:
            self.note(queue.name, self.broker.queues[queue.name].durable)
            return Existence.HERE
        return Existence.GONE if queue.name in self._durable else Existence.UNKNOWN

    async def publish(self, queue: QueueRef, body: bytes) -> None:
        """Confirmed at once."""
        self._check()
        if not self.broker.put(queue.name, _Message(body=body)):
            raise QueueGone(queue.name)

    # -- for the consumers and deliveries ----------------------------------------------------------------------------

    def note(self, name: str, durable: bool) -> None:
        """The queue was seen on the connection that now stands."""
        self._durable[name] = durable

    def hold(self, queue: QueueRef, message: _Message) -> Delivery:
        """Hand a message out."""
        delivery = _MemoryDelivery(self, queue, message)
        self.held[delivery] = message
        return delivery

    def give_back(self, name: str, message: _Message, delay_secs: float = 0) -> bool:
        """Put a message back at the head of its queue, marked; now or later. False when the queue is gone."""
        message.redelivered = True
        if delay_secs <= 0:
            return self.broker.put(name, message, first=True)
        if name not in self.broker.queues:
            return False

        def due() -> None:
            del self._delayed[timer]
            self.broker.put(name, message, first=True)

        timer = asyncio.get_running_loop().call_later(delay_secs, due)
        self._delayed[timer] = (name, message)
        return True

    # -- for tests ---------------------------------------------------------------------------------------------------

    def ref(self, name: str) -> QueueRef:
        """The queue of that name in this account."""
        return QueueRef(account=self.account, name=name)

    def declare(self, name: str, *, durable: bool = True) -> QueueRef:
        """Make a queue, as an experimenter does."""
        self.broker.declare(name, durable=durable)
        return self.ref(name)

    def delete(self, name: str) -> None:
        """Remove a queue: how experimenters cancel."""
        self.broker.delete(name)

    def depth(self, name: str) -> int:
        """How many messages wait, those held not counted."""
        return len(self.broker.queues[name].ready)

    def break_connection(self) -> None:
        """Every delivery held is lost and waits again, marked redelivered. The backend is connected anew at once."""
        self._lose_held()
        self._durable = {name: True for name, durable in self._durable.items() if durable}

    def restart_broker(self) -> None:
        """The broker restarts: the connection breaks, and transient queues are lost."""
        self.break_connection()
        for name in [name for name, queue in self.broker.queues.items() if not queue.durable]:
            self.broker.delete(name)

    def set_away(self, away: bool) -> None:
        """Whether the broker cannot be reached. Going away breaks the connection."""
        if away and not self.away:
            self.break_connection()
        self.away = away
        self.broker.notify()

    def _lose_held(self) -> None:
        held: Mapping[Delivery, _Message] = self.held
        self.held = {}
        for delivery, message in reversed(list(held.items())):
            delivery.lost.set()
            self.give_back(delivery.queue.name, message)

    def _check(self) -> None:
        if self.away or self.closed:
            raise QueueUnavailable(f"the queues of {self.account} cannot be reached", endpoint=self.account)
