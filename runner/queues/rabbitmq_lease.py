"""The lease of one message on RabbitMQ: a queue of its own, from which it returns by itself when nobody renews it (docs/leases.md).

What is done with such a queue, each a short exchange on a channel that is given up afterwards. All of it runs in the
thread of `rabbitmq_connection.Lane`, and raises pika's AMQPError when the broker refuses or the connection breaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import enum
import hashlib
from typing import TYPE_CHECKING, Any

from pika import exceptions, spec

from runner.queues import rabbitmq_connection as wire

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pika.channel import Channel

PREFIX = "studio-runner.lease."
#: A lease queue that nobody touches for so many lease times is removed by the broker. Shorter than one would lose messages.
QUEUE_EXPIRES_LEASES = 10
#: How many copies are looked through; more than one only where the same bytes were published more than once.
MOST_COPIES = 100

PRECONDITION_FAILED = 406  #: AMQP's reply codes
ACCESS_REFUSED = 403

OWNER, TOKEN, SEQ, ATTEMPT = "owner", "lease", "seq", "attempt"  #: our headers


class Finding(enum.Enum):
    """What a lease queue holds, from one owner's view."""

    OURS = "ours"
    OTHERS = "others"  #: only copies of others
    NOTHING = "nothing"
    NO_QUEUE = "no queue"  #: there is no such queue


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """A message as its experimenter published it."""

    queue: str
    body: bytes
    properties: spec.BasicProperties

    @property
    def lease_queue(self) -> str:
        """The name of its lease queue: the same for every runner."""
        return PREFIX + hashlib.sha256(self.queue.encode() + b"\0" + self.body).hexdigest()[:32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stamp:
    """What our headers say of a copy."""

    owner: str  #: the daemon that holds it: the same after its restart
    token: str  #: its hold
    #: How often it was renewed since its original is known to be gone. 0: the original may still be around, and come again.
    seq: int
    attempt: int  #: how often it was tried


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    """A message got from a lease queue, not yet acknowledged."""

    tag: int
    body: bytes
    properties: spec.BasicProperties
    stamp: Stamp


def stamp(headers: Mapping[str, Any] | None) -> Stamp:
    """What those headers say; zeros and empty texts where they are not ours."""
    found = headers or {}
    return Stamp(
        owner=str(found.get(OWNER, "")),
        token=str(found.get(TOKEN, "")),
        seq=count(found.get(SEQ)),
        attempt=count(found.get(ATTEMPT)),
    )


def count(value: object) -> int:
    """A header that counts something; 0 when it is missing or is no count."""
    try:
        return max(0, int(str(value)))
    except ValueError:
        return 0


def stamped(original: spec.BasicProperties, mark: Stamp, *, secs: float | None) -> spec.BasicProperties:
    """The properties of a copy: the original's, with our headers, kept by the broker, for `secs` if given."""
    properties: spec.BasicProperties = copy.copy(original)
    # What a broker noted on it (x-death, x-delivery-count) was of its former life.
    kept = {key: value for key, value in (original.headers or {}).items() if not key.startswith("x-")}
    properties.headers = kept | {
        OWNER: mark.owner,
        TOKEN: mark.token,
        SEQ: mark.seq,
        ATTEMPT: mark.attempt,
    }
    properties.delivery_mode = 2
    properties.expiration = None if secs is None else str(round(secs * 1000))
    properties.user_id = None  # the broker takes it only from that user
    return properties


async def declare(channel: Channel, message: Message, *, secs: float, quorum: bool) -> None:
    """Make the lease queue, unless it is there. Reply code 406: it was made for another lease time."""
    await wire.rpc(
        channel,
        channel.queue_declare,
        queue=message.lease_queue,
        durable=True,
        arguments={
            "x-queue-type": "quorum" if quorum else "classic",
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": message.queue,
            "x-expires": round(QUEUE_EXPIRES_LEASES * secs * 1000),
        },
    )


async def renew(
    channel: Channel,
    message: Message,
    mine: Callable[[Stamp], bool],
    make: Callable[[Copy | None], spec.BasicProperties],
    *,
    fresh: bool,
) -> Finding:
    """Replace our copy by one that lives anew, in one transaction; `fresh`: also where there is none yet.

    OURS: done, and the broker has it safe. Else nothing was changed.
    """
    await wire.rpc(channel, channel.tx_select)
    found = await _search(channel, message.lease_queue, mine)
    if not found.ours and not fresh:
        return found.finding
    properties = make(found.ours[-1] if found.ours else None)
    await _replace(channel, message.lease_queue, properties, message.body, found)
    return Finding.OURS


async def give_back(channel: Channel, message: Message, mine: Callable[[Stamp], bool], attempt: int) -> bool:
    """Move our copy to the end of the queue that it came from, as `attempt`; False when there is none to be had now.

    Somebody else's look may have it for a moment: then the queue must stay. In one transaction, so that there is one message all the time. When that queue is gone, the message goes too.
    """
    await wire.rpc(channel, channel.tx_select)
    found = await _search(channel, message.lease_queue, mine)
    if not found.ours:
        return False
    mark = dataclasses.replace(found.ours[-1].stamp, attempt=attempt)
    with contextlib.suppress(exceptions.UnroutableError):
        await _replace(
            channel, message.queue, stamped(message.properties, mark, secs=None), message.body, found
        )
    await _leave(channel, message, found)
    return True


async def finish(channel: Channel, message: Message, mine: Callable[[Stamp], bool]) -> bool:
    """Remove our copy, and the queue if it holds no other; False when there is none to be had now. Publishes nothing."""
    found = await _search(channel, message.lease_queue, mine)
    if not found.ours:
        return False
    found.end(channel)
    await _leave(channel, message, found)  # its answer tells that the acknowledgement was heard
    return True


async def look(channel: Channel, message: Message) -> list[Stamp] | None:
    """Whose copies are there; None when there is no such queue. Nothing is changed; the channel is of no use afterwards."""
    found = await _search(channel, message.lease_queue, lambda _: True)
    wire.discard(channel)  # which gives the copies back
    return None if found.no_queue else [each.stamp for each in found.ours]


async def waiting(channel: Channel, message: Message) -> int | None:
    """How many copies wait in the lease queue; None when there is no such queue."""
    try:
        answer = await wire.rpc(channel, channel.queue_declare, queue=message.lease_queue, passive=True)
    except exceptions.ChannelClosedByBroker as error:
        if not wire.is_missing_queue(error):
            raise
        return None
    return int(answer.method.message_count)


async def remove_if_empty(channel: Channel, message: Message) -> None:
    """Remove the lease queue unless it holds a copy. The channel may be of no use afterwards."""
    # Not by `if_empty`: quorum queues answer that by closing the connection. Should a copy of somebody else's come in
    # between, its owner finds the queue missing at the next renewal, and makes it again.
    if await waiting(channel, message) == 0:
        await wire.rpc(channel, channel.queue_delete, queue=message.lease_queue)


async def _leave(channel: Channel, message: Message, found: _Found) -> None:
    """Our copy is gone: remove the queue if there was no other. A count may overtake a put-back, and say nothing of it."""
    if found.others:
        await waiting(channel, message)
    else:
        await remove_if_empty(channel, message)


@dataclasses.dataclass(kw_only=True)
class _Found:
    """What a search has got, unacknowledged."""

    ours: list[Copy] = dataclasses.field(default_factory=list)
    others: list[Copy] = dataclasses.field(default_factory=list)
    no_queue: bool = False

    @property
    def finding(self) -> Finding:
        if self.ours:
            return Finding.OURS
        if self.others:
            return Finding.OTHERS
        return Finding.NO_QUEUE if self.no_queue else Finding.NOTHING

    def end(self, channel: Channel) -> None:
        """Acknowledge ours, put back the others'."""
        for each in self.ours:
            channel.basic_ack(each.tag)
        for each in self.others:
            channel.basic_nack(each.tag, requeue=True)


async def _search(channel: Channel, queue: str, mine: Callable[[Stamp], bool]) -> _Found:
    """Get every copy. When there is no such queue, the channel is closed afterwards."""
    found = _Found()
    try:
        while (
            len(found.ours) + len(found.others) < MOST_COPIES
            and (one := await _get(channel, queue)) is not None
        ):
            (found.ours if mine(one.stamp) else found.others).append(one)
    except exceptions.ChannelClosedByBroker as error:
        if not wire.is_missing_queue(error):
            raise
        return _Found(no_queue=True)
    return found


async def _get(channel: Channel, queue: str) -> Copy | None:
    answered: asyncio.Future[Copy | None] = asyncio.get_running_loop().create_future()

    def on_message(_: Channel, method: Any, properties: spec.BasicProperties, body: bytes) -> None:
        found = Copy(
            tag=method.delivery_tag, body=body, properties=properties, stamp=stamp(properties.headers)
        )
        wire.settle(answered, found)

    channel.add_callback(lambda _frame: wire.settle(answered, None), [spec.Basic.GetEmpty])
    channel.add_on_close_callback(lambda _channel, reason: wire.fail(answered, reason))
    channel.basic_get(queue, on_message)
    return await answered


async def _replace(
    channel: Channel, queue: str, properties: spec.BasicProperties, body: bytes, found: _Found
) -> None:
    """Publish and `end` in one transaction. Raises `UnroutableError` after it, when there is no such queue."""
    returned: list[object] = []
    channel.add_on_return_callback(lambda *what: returned.append(what))
    channel.basic_publish("", queue, body, properties, mandatory=True)
    found.end(channel)
    await wire.rpc(channel, channel.tx_commit)
    if returned:
        raise exceptions.UnroutableError([])
