"""More queues than there are standing consumers: the others are watched, and lose nothing by it but some seconds."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from runner.queues import base, rabbitmq_channels, rabbitmq_connection, rabbitmq_management, rabbitmq_places
from runner.queues.rabbitmq import RabbitmqBackend
from tests.service.rabbitmq_kit import LIMIT, consuming, name, ref, take, through, until, wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from pika.channel import Channel

    from runner.queues.rabbitmq_consumer import RabbitmqConsumer
    from tests.servers.proxy import Proxy
    from tests.servers.rabbitmq import RabbitmqServer

__all__ = ["name", "wire"]  # fixtures

pytestmark = pytest.mark.service

STANDING = 3


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rabbitmq_places, "LOOK_SECS", 0.5)
    monkeypatch.setattr(rabbitmq_places, "TENURE_SECS", 1.0)


@pytest.fixture
def names(rabbitmq: RabbitmqServer, name: str) -> Iterator[list[str]]:
    found = [f"{name}_{number:02}" for number in range(12)]
    with rabbitmq.channel() as channel:
        for queue in found:
            channel.queue_declare(queue)
    yield found
    with rabbitmq.channel() as channel:
        for queue in found:
            channel.queue_delete(queue)


@contextlib.asynccontextmanager
async def few_places(
    url: str, management_url: str | None, standing: int = STANDING
) -> AsyncIterator[RabbitmqBackend]:
    backend = RabbitmqBackend(url, management_url, standing=standing)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.aclose()


def standing(server: RabbitmqServer, names: list[str]) -> list[str]:
    """Those that have a consumer."""
    with server.channel() as channel:
        return [name for name in names if channel.queue_declare(name, passive=True).method.consumer_count]


@contextlib.asynccontextmanager
async def all_waiting(
    one: RabbitmqBackend, names: list[str]
) -> AsyncIterator[dict[str, asyncio.Task[base.Delivery]]]:
    """Somebody waits in `next` of each, in this order."""
    waiting = {
        name: asyncio.create_task((await one.consumer(ref(one, name))).next(), name=name) for name in names
    }
    await asyncio.sleep(0)
    try:
        yield waiting
    finally:
        for task in waiting.values():
            task.cancel()
        await asyncio.gather(*waiting.values(), return_exceptions=True)


def consumer_of(one: RabbitmqBackend, name: str) -> RabbitmqConsumer:
    return next(each for each in one._consumers if each.key == ("/", name))


async def test_up_to_the_bound_nothing_is_watched(rabbitmq: RabbitmqServer, names: list[str]) -> None:
    async with (
        few_places(rabbitmq.amqp_url, rabbitmq.management_url, standing=len(names)) as one,
        all_waiting(one, names),
    ):
        await consuming(rabbitmq, *names)
        assert one._places._task is None


async def test_a_queue_beyond_the_bound_is_served_and_then_pushed_to(
    rabbitmq: RabbitmqServer, names: list[str]
) -> None:
    async with (
        few_places(rabbitmq.amqp_url, rabbitmq.management_url) as one,
        all_waiting(one, names) as waiting,
    ):
        await until(lambda: standing(rabbitmq, names) == names[:STANDING])
        late = names[-1]
        rabbitmq.publish(late, b"1", b"2")
        first = await asyncio.wait_for(waiting.pop(late), LIMIT)
        assert (first.body, first.redelivered) == (b"1", False)
        await until(lambda: len(standing(rabbitmq, names)) <= STANDING)
        consumer = consumer_of(one, late)
        second = await take(consumer)
        assert (second.body, second.redelivered) == (b"2", False)
        assert await first.ack()
        assert await second.ack()
        again = asyncio.create_task(consumer.next())
        await consuming(rabbitmq, late)  # it has kept its place: pushed to, before any count tells
        await until(lambda: len(standing(rabbitmq, names)) == STANDING)
        waiting[late] = again


async def test_one_request_tells_what_kind_all_queues_are(
    rabbitmq: RabbitmqServer, names: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        pytest.fail("a request for a single queue")

    monkeypatch.setattr(rabbitmq_management.Management, "queue", never)
    durable = f"{name}_durable"
    rabbitmq.declare(durable, durable=True)
    async with (
        few_places(rabbitmq.amqp_url, rabbitmq.management_url) as one,
        all_waiting(one, [*names, durable]) as waiting,
    ):
        for queue in (durable, names[-1]):
            rabbitmq.publish(queue, b"1")
            assert await (await asyncio.wait_for(waiting.pop(queue), LIMIT)).ack()
        await until(lambda: one._durable == {ref(one, durable): True, ref(one, names[-1]): False})
    rabbitmq.delete(durable)


async def test_none_starves_when_all_have_messages(rabbitmq: RabbitmqServer, names: list[str]) -> None:
    rounds = 2
    for queue in names:
        rabbitmq.publish(queue, *[b"%d" % number for number in range(rounds)])

    async def serve(consumer: base.Consumer) -> list[bytes]:
        """As the dispatcher does, one message after the other; then it waits for the next."""
        got = []
        for _ in range(rounds):
            delivery = await consumer.next()
            assert not delivery.redelivered
            got.append(delivery.body)
            assert await delivery.ack()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await consumer.next()
        await consumer.pause()
        return got

    async with few_places(rabbitmq.amqp_url, rabbitmq.management_url) as one:
        consumers = [await one.consumer(ref(one, queue)) for queue in names]
        async with asyncio.timeout(LIMIT):
            assert await asyncio.gather(*map(serve, consumers)) == [[b"0", b"1"]] * len(names)


async def test_a_queue_whose_messages_nobody_wants_yields_its_place(
    rabbitmq: RabbitmqServer, names: list[str]
) -> None:
    async with few_places(rabbitmq.amqp_url, rabbitmq.management_url) as one:
        async with all_waiting(one, names[:STANDING]) as closed:
            await consuming(rabbitmq, *closed)
        await consuming(rabbitmq, *closed, count=0)
        for queue in names:
            rabbitmq.publish(queue, b"1")
        async with all_waiting(one, names[STANDING:]) as waiting:
            for task in waiting.values():
                assert await (await asyncio.wait_for(task, LIMIT)).ack()
            assert [rabbitmq.depth(queue) for queue in closed] == [1] * STANDING


async def test_what_a_displaced_queue_holds_stays_held(rabbitmq: RabbitmqServer, names: list[str]) -> None:
    async with few_places(rabbitmq.amqp_url, rabbitmq.management_url, standing=1) as one:
        rabbitmq.publish(names[0], b"held")
        consumer = await one.consumer(ref(one, names[0]))
        held = await take(consumer)
        rabbitmq.publish(names[1], b"1")
        assert await (await take(await one.consumer(ref(one, names[1])))).ack()  # has taken the place
        assert not held.lost.is_set()
        assert await held.requeue()
        await until(lambda: rabbitmq.depth(names[0]) == 1)
        again = await take(consumer)
        assert (again.body, again.redelivered) == (b"held", True)
        assert await again.ack()


async def test_a_message_on_its_way_to_a_displaced_queue_is_handed_out(
    rabbitmq: RabbitmqServer, wire: Proxy, names: list[str]
) -> None:
    async with (
        few_places(through(wire), rabbitmq.management_url, standing=1) as one,
        all_waiting(one, names[:2]) as waiting,
    ):
        await consuming(rabbitmq, names[0])
        wire.hold_answers()
        rabbitmq.publish(names[0], b"on its way")
        await until(lambda: rabbitmq.depth(names[0]) == 0)
        consumer = consumer_of(one, names[0])
        one._places._displace(consumer)
        await consuming(rabbitmq, names[0], count=0)
        wire.resume()
        delivery = await asyncio.wait_for(waiting[names[0]], LIMIT)
        assert (delivery.body, delivery.redelivered) == (b"on its way", False)
        assert await delivery.ack()


async def test_a_watched_queue_can_be_paused_and_closed(rabbitmq: RabbitmqServer, names: list[str]) -> None:
    async with few_places(rabbitmq.amqp_url, rabbitmq.management_url, standing=1) as one:
        async with all_waiting(one, names):
            await consuming(rabbitmq, names[0])
            consumers = {each.key[1]: each for each in one._consumers}
        for consumer in consumers.values():
            await consumer.pause()
        rabbitmq.publish(names[1], b"1")
        assert standing(rabbitmq, names) == []
        await consumers.pop(names[0]).close()  # its place is free
        assert await (await take(consumers[names[1]])).ack()
        for consumer in consumers.values():
            await consumer.close()
        assert standing(rabbitmq, names) == []


async def test_a_deleted_queue_gives_its_place_away(rabbitmq: RabbitmqServer, names: list[str]) -> None:
    async with (
        few_places(rabbitmq.amqp_url, rabbitmq.management_url, standing=1) as one,
        all_waiting(one, names[:2]) as waiting,
    ):
        await consuming(rabbitmq, names[0])
        rabbitmq.delete(names[0])
        with pytest.raises(base.QueueGone):
            await asyncio.wait_for(waiting[names[0]], LIMIT)
        await consumer_of(one, names[0]).close()
        await consuming(rabbitmq, names[1])


async def test_without_counts_queues_take_turns(rabbitmq: RabbitmqServer, names: list[str]) -> None:
    async with few_places(rabbitmq.amqp_url, "http://127.0.0.1:1") as one, all_waiting(one, names) as waiting:
        rabbitmq.publish(names[-1], b"1")
        rabbitmq.publish(names[-2], b"1")
        for queue in names[-2:]:
            assert await (await asyncio.wait_for(waiting.pop(queue), LIMIT)).ack()
        await until(lambda: len(standing(rabbitmq, names)) <= STANDING)


async def test_a_broker_with_few_channels_has_fewer_consumers(
    rabbitmq: RabbitmqServer, names: list[str]
) -> None:
    url = f"{rabbitmq.amqp_url}?channel_max=8"
    async with (
        few_places(url, rabbitmq.management_url, standing=100) as one,
        all_waiting(one, names) as waiting,
    ):
        for queue in names:
            rabbitmq.publish(queue, b"1")
        for task in waiting.values():
            assert await (await asyncio.wait_for(task, LIMIT)).ack()
        assert one._places.limit == 4
        async with asyncio.timeout(LIMIT):  # those that were displaced give their channels back first
            while await one.existence(ref(one, names[0])) is not base.Existence.HERE:
                await asyncio.sleep(0.05)


async def test_channels_are_opened_a_few_at_a_time(
    rabbitmq: RabbitmqServer, wire: Proxy, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbitmq_channels, "OPENING_AT_ONCE", 2)
    real = rabbitmq_connection.Link.channel
    under_way, most, opened = 0, 0, 0

    async def counted(link: rabbitmq_connection.Link) -> Channel:
        nonlocal under_way, most, opened
        under_way += 1
        most = max(most, under_way)
        try:
            channel = await real(link)
        finally:
            under_way -= 1
        opened += 1
        return channel

    monkeypatch.setattr(rabbitmq_connection.Link, "channel", counted)
    async with (
        few_places(through(wire), rabbitmq.management_url, standing=len(names)) as one,
        all_waiting(one, names),
    ):
        await consuming(rabbitmq, *names)
        assert (most, opened) == (2, len(names))
        wire.cut()
        await until(lambda: opened == 2 * len(names))
        await consuming(rabbitmq, *names)
        assert most == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_thousands_of_matching_queues(
    own_rabbitmq: RabbitmqServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a connection has channels for (2047). A queue among the last is served, also after a broken connection."""
    monkeypatch.undo()
    count = 2500
    names = [f"{name}_{number}" for number in range(count)]
    with own_rabbitmq.channel() as channel:
        for queue in names:
            channel.queue_declare(queue)
    async with (
        few_places(own_rabbitmq.amqp_url, own_rabbitmq.management_url, rabbitmq_places.STANDING) as one,
        all_waiting(one, names) as waiting,
    ):
        await consuming(own_rabbitmq, names[0], names[rabbitmq_places.STANDING - 1])
        own_rabbitmq.publish(names[-1], b"1")
        assert await (await asyncio.wait_for(waiting.pop(names[-1]), 2 * LIMIT)).ack()
        await until(lambda: len(standing(own_rabbitmq, names)) <= rabbitmq_places.STANDING)
        await until(
            lambda: own_rabbitmq.close_connections() > 0
        )  # the management API hears of one some seconds later
        own_rabbitmq.publish(names[-2], b"2")
        assert await (await asyncio.wait_for(waiting.pop(names[-2]), 2 * LIMIT)).ack()
    with own_rabbitmq.channel() as channel:
        for queue in names:
            channel.queue_delete(queue)
