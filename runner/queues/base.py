"""What every queue backend does: the contracts that `daemon.dispatch` is written against.

A backend is one account: a broker with its credentials, or a directory. It discovers queues, consumes them, publishes.
All methods are coroutines of the daemon's loop; a backend whose client library blocks or has a loop of its own owns one
thread and hides it. Errors of the connection leave as `errors.QueueUnavailable` and as nothing else, with credentials
stripped from the text. A backend reconnects by itself, backing off with jitter; nobody re-opens it.

INTEROP.md section 2 has the wire formats.
"""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import enum
import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class QueueRef:
    """One queue of one account. Equal refs are the same queue."""

    account: str  #: the backend's `account`: a label without credentials, unique in this daemon
    name: str  #: the bare name, as experimenters write it; what `--queue-match` is applied to
    vhost: str = ""  #: RabbitMQ's virtual host, decoded; empty elsewhere

    def __str__(self) -> str:
        """`name`, or `vhost?name` where the vhost is not the default: for logs and for directory names."""
        return f"{self.vhost}?{self.name}" if self.vhost not in {"", "/"} else self.name


class Existence(enum.Enum):
    """What is known of a queue. Only GONE cancels its runs (DESIGN.md rule 11)."""

    HERE = "here"
    GONE = "gone"  #: proven: durable, or seen on a connection unbroken since
    UNKNOWN = "unknown"  #: not seen, but it may have been lost with its broker


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueueInfo:
    """A queue as discovery saw it."""

    ref: QueueRef
    ready: int | None = None  #: messages that wait, where discovery tells without a further request


class Delivery(abc.ABC):
    """One message, held by this runner. Exactly one of `ack`, `requeue` and `reject` ends it; further calls do nothing.

    The hold may be lost under way (a connection that broke, a lease that ran out): then `lost` is set, `ack` and
    `requeue` return False, and the message comes back marked `redelivered`, here or elsewhere.
    """

    #: Whether the broker, left as it comes, drops for good what it has delivered too often (`deliveries`).
    drops = False

    def __init__(
        self,
        *,
        queue: QueueRef,
        body: bytes,
        redelivered: bool = False,
        attempts: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.queue = queue
        self.body = body
        self.redelivered = redelivered  #: the broker says that somebody had it before
        #: Attempts that travelled with the message (a lease's header), 0 if none; what it says when it is given back.
        self.attempts = attempts
        self.headers = dict(headers or {})
        self.lost = asyncio.Event()  #: set, in the daemon's loop, when the hold is gone
        #: With `lost`, or later: another runner has the message, or may have; a run of it here has to stop.
        self.superseded = False
        #: How often it was delivered before, where the broker counts that, and may drop what it has delivered too often.
        self.deliveries = 0
        #: With `queue`, the identity of the message (DESIGN.md 5.3).
        self.digest = hashlib.sha256(body).hexdigest()

    async def began(self, attempt: int) -> None:
        """A run of it starts, or goes on: its attempt number `attempt`, which travels with the message from now on where it can.

        Returns when that is durable, for a message that was delivered before; never raises, and waits some seconds at most.
        """
        self.attempts = attempt

    @abc.abstractmethod
    async def ack(self) -> bool:
        """The outcome is durable: forget the message. True when the broker was told in time, False when lost.

        Returns once the call is handed to a connection that still holds the message (RabbitMQ has no confirm for acks).
        """

    @abc.abstractmethod
    async def requeue(self, delay_secs: float = 0) -> bool:
        """Give it back; someone may try again. `delay_secs` is honoured where the broker can, else it is the caller's to wait."""

    @abc.abstractmethod
    async def extend(self, secs: float) -> None:
        """Hold it for at least `secs` more. Does nothing where the broker holds it for as long as the connection lives."""

    async def reject(self) -> bool:
        """The message is in the dead letters (the caller has put it there): remove it from its queue."""
        return await self.ack()


class Consumer(abc.ABC):
    """A standing wish for messages of one queue. One task uses it at a time."""

    _trouble = ""

    @property
    def trouble(self) -> str:
        """Why nothing can come although it is asked for, as far as is known: for people, without credentials; else empty."""
        return self._trouble

    @abc.abstractmethod
    async def next(self) -> Delivery:
        """The next message; waits until there is one, pushed by the broker where it can.

        Safe to cancel: a message that arrives while the wait is being cancelled is returned by the following `next`, or
        given back by `pause`. While nobody is in `next`, the broker sends nothing (at most one message that was already
        on its way). Survives reconnects. Raises `QueueGone` when the queue does not exist (any more).
        """

    @abc.abstractmethod
    async def pause(self) -> None:
        """Stop asking, and give back what arrived but was not handed out. `next` asks again. Deliveries handed out stay held."""

    @abc.abstractmethod
    async def close(self) -> None:
        """`pause`, for good. Deliveries handed out stay valid until they are ended. Idempotent."""


class QueueGone(Exception):  # noqa: N818 - a state of the world that the dispatcher handles, not a failure
    """The queue that is consumed does not exist. Whether that cancels its runs, `QueueBackend.existence` tells."""


class QueueBackend(abc.ABC):
    """One account of one kind of broker. The constructor does no I/O."""

    kind: str  #: "rabbitMQ" | "sqs" | "pubsub" | "local": the `queue_type` label of INTEROP.md 9.4
    account: str  #: a label for logs and metrics, without credentials

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """What it opens, as a URL without credentials: the same for all accounts of it, whatever they are called, and for ever.

        With vhost and name it tells a queue from all others. Empty until it is known: when `discover` first returns a queue.
        """

    @abc.abstractmethod
    async def open(self) -> None:
        """Start what serves the other calls. Does not wait for the broker: an account that is away comes later."""

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Close connections; deliveries still held go back by that. Idempotent, bounded to some seconds."""

    def on_queues_changed(self, told: Callable[[], None]) -> None:  # noqa: B027 - most cannot notice
        """Call `told`, in the loop, whenever queues come or go, where the backend notices that by itself; until `aclose`.

        Does nothing where it cannot: the next discovery finds out.
        """

    @abc.abstractmethod
    async def discover(self) -> list[QueueInfo]:
        """Every queue of the account that may hold work, unfiltered by name, response queues left out. One request.

        Raises `errors.QueueUnavailable`.
        """

    @abc.abstractmethod
    async def consumer(self, queue: QueueRef) -> Consumer:
        """A consumer of that queue; it asks for nothing before its first `next`. Never declares, alters or deletes the queue."""

    @abc.abstractmethod
    async def existence(self, queue: QueueRef) -> Existence:
        """Whether the queue is there, asked of the broker now. Never raises: a broker that is away gives UNKNOWN."""

    async def reclaim(self, queue: QueueRef, body: bytes) -> Delivery | None:  # noqa: ARG002 - for those who hold by leases
        """A message that an earlier process of this daemon held, where it would not come back at once by itself.

        Held by us again, and marked `redelivered`; None when there is none. Never raises, and waits some seconds at most.
        """
        return None

    @abc.abstractmethod
    async def publish(self, queue: QueueRef, body: bytes) -> None:
        """Put a message at the end of an existing queue, and return when the broker has confirmed it.

        Raises `errors.QueueUnavailable`, or `QueueGone` when there is no such queue.
        """
