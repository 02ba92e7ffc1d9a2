"""Consuming from a real RabbitMQ: what is particular to it. What all backends share: tests/contract."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from typing import TYPE_CHECKING

import pytest

from runner import errors
from runner.queues import absent, base, rabbitmq_connection
from tests.service.rabbitmq_kit import (
    CAPTURED,
    LIMIT,
    backend,
    consuming,
    name,
    opened,
    ref,
    take,
    through,
    until,
    wire,
)

if TYPE_CHECKING:
    from runner.queues.rabbitmq import RabbitmqBackend
    from tests.servers.proxy import Proxy
    from tests.servers.rabbitmq import RabbitmqServer

__all__ = ["backend", "name", "wire"]  # fixtures

pytestmark = pytest.mark.service


@pytest.mark.parametrize("case", ["plain", "args", "data", "hyperparam-0", "completion-0"])
async def test_messages_of_the_real_client_arrive_byte_for_byte(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, case: str, name: str
) -> None:
    body = (CAPTURED / f"{case}.json").read_bytes()
    rabbitmq.declare(name)
    rabbitmq.publish(name, body)
    delivery = await take(await backend.consumer(ref(backend, name)))
    assert (delivery.body, delivery.redelivered, delivery.attempts) == (body, False, 0)
    assert await delivery.ack()


async def test_each_vhost_is_consumed_on_its_own_connection(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str
) -> None:
    rabbitmq.add_vhost(name)
    for vhost in ("/", name):
        rabbitmq.declare(name, vhost=vhost)
        rabbitmq.publish(name, vhost.encode(), vhost=vhost)
    for vhost in ("/", name):
        consumer = await backend.consumer(ref(backend, name, vhost))
        delivery = await take(consumer)
        assert delivery.body == vhost.encode()
        assert await delivery.ack()


async def test_many_messages_cost_one_connection_and_one_channel(
    rabbitmq: RabbitmqServer, wire: Proxy, name: str
) -> None:
    rabbitmq.declare(name)
    async with opened(through(wire), rabbitmq.management_url) as one:
        consumer = await one.consumer(ref(one, name))
        for number in range(50):
            await one.publish(ref(one, name), b"%d" % number)
            delivery = await take(consumer)
            assert delivery.body == b"%d" % number
            assert await delivery.ack()
        assert wire.connections == 2  # one consumes, one publishes


async def test_no_second_message_comes_while_nobody_asks(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str
) -> None:
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"1", b"2", b"3")
    consumer = await backend.consumer(ref(backend, name))
    first = await take(consumer)
    await consuming(rabbitmq, name, count=0)
    assert await first.ack()
    await consumer.pause()
    assert rabbitmq.depth(name) == 2
    assert (await take(consumer)).body == b"2"  # and none of them was put back
    assert not (await take(consumer)).redelivered


async def test_a_message_that_races_with_a_cancelled_wait_is_kept_unmarked(
    rabbitmq: RabbitmqServer, wire: Proxy, name: str
) -> None:
    rabbitmq.declare(name)
    async with opened(through(wire), rabbitmq.management_url) as one:
        consumer = await one.consumer(ref(one, name))
        waiting = asyncio.create_task(consumer.next())
        await consuming(rabbitmq, name)
        wire.hold_answers()
        rabbitmq.publish(name, b"1")
        await until(lambda: rabbitmq.depth(name) == 0)  # the broker has sent it; we have not got it
        waiting.cancel()
        await asyncio.wait((waiting,))
        await consuming(
            rabbitmq, name, count=0
        )  # our cancel is there; its confirmation is behind the message
        wire.resume()
        delivery = await take(consumer)
        assert (delivery.body, delivery.redelivered) == (b"1", False)
        assert await delivery.requeue()
        assert (await take(consumer)).redelivered


async def test_waiting_and_pausing_puts_nothing_back(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str
) -> None:
    rabbitmq.declare(name, durable=True, arguments={"x-queue-type": "quorum", "x-delivery-limit": 1})
    consumer = await backend.consumer(ref(backend, name))
    for _ in range(10):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(consumer.next(), 0.01)
        await consumer.pause()
    rabbitmq.publish(name, b"1", persistent=True)
    delivery = await take(consumer)
    assert (delivery.redelivered, "x-delivery-count" in delivery.headers) == (False, False)
    assert await delivery.requeue()
    again = await take(consumer)
    assert (again.redelivered, again.headers["x-delivery-count"]) == (True, "1")
    assert await again.ack()


async def test_pause_gives_back_what_raced_in(rabbitmq: RabbitmqServer, wire: Proxy, name: str) -> None:
    rabbitmq.declare(name)
    async with opened(through(wire), rabbitmq.management_url) as one:
        consumer = await one.consumer(ref(one, name))
        waiting = asyncio.create_task(consumer.next())
        await consuming(rabbitmq, name)
        wire.hold_answers()
        rabbitmq.publish(name, b"1")
        await until(lambda: rabbitmq.depth(name) == 0)
        waiting.cancel()
        pausing = asyncio.create_task(consumer.pause())
        await consuming(rabbitmq, name, count=0)
        assert not pausing.done()
        wire.resume()
        await pausing
        await until(lambda: rabbitmq.depth(name) == 1)


async def test_deliveries_outlive_their_closed_consumer(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str
) -> None:
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"1", b"2")
    consumer = await backend.consumer(ref(backend, name))
    first, second = await take(consumer), await take(consumer)
    await consumer.close()
    await consumer.close()
    assert await first.ack()
    assert not await first.ack()
    assert await second.requeue()
    assert not first.lost.is_set()
    await until(lambda: rabbitmq.depth(name) == 1)
    assert rabbitmq.get(name)[2] == b"2"


async def test_the_attempt_header_travels(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str
) -> None:
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"1", headers={"attempt": 2, "owner": "h"})
    rabbitmq.publish(name, b"2", headers={"attempt": "nonsense"})
    consumer = await backend.consumer(ref(backend, name))
    delivery = await take(consumer)
    assert (delivery.attempts, delivery.headers) == (2, {"attempt": "2", "owner": "h"})
    assert (await take(consumer)).attempts == 0


async def test_a_queue_that_breaks_its_channel_disturbs_no_other(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str
) -> None:
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"1")
    held = await take(await backend.consumer(ref(backend, name)))
    with pytest.raises(base.QueueGone):
        await take(await backend.consumer(ref(backend, f"{name}_none")))
    assert await held.ack()


async def test_a_queue_that_somebody_has_for_himself_is_waited_for(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str
) -> None:
    rabbitmq.declare(name)
    with rabbitmq.channel() as channel:
        tag = channel.basic_consume(name, lambda *_: None, exclusive=True)
        waiting = asyncio.create_task((await backend.consumer(ref(backend, name))).next())
        consumer_refused = asyncio.wait((waiting,), timeout=1)
        await consumer_refused
        assert not waiting.done()
        channel.basic_cancel(tag)
        rabbitmq.publish(name, b"1")
        assert (await asyncio.wait_for(waiting, LIMIT)).body == b"1"


@pytest.mark.slow
async def test_three_hundred_idle_queues_are_cheap(rabbitmq: RabbitmqServer, wire: Proxy, name: str) -> None:
    names = [f"{name}_{number}" for number in range(300)]
    with rabbitmq.channel() as channel:
        for one_name in names:
            channel.queue_declare(one_name)
    async with opened(through(wire), rabbitmq.management_url) as one:
        consumers = [await one.consumer(ref(one, one_name)) for one_name in names]
        waiting = [asyncio.create_task(consumer.next()) for consumer in consumers]
        await consuming(rabbitmq, *names)
        shares = []
        for _ in range(3):  # what it always costs, not what else happened just now
            before, start = time.process_time(), time.monotonic()
            await asyncio.sleep(1)  # the measurement itself
            shares.append((time.process_time() - before) / (time.monotonic() - start))
        print("300 idle consumers:", [f"{share:.2%} of a core" for share in shares])
        assert min(shares) < 0.05
        assert wire.connections == 1
        rabbitmq.publish(names[150], b"1")
        assert (await asyncio.wait_for(waiting[150], LIMIT)).body == b"1"
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await asyncio.gather(*(consumer.pause() for consumer in consumers))
        for one_name in names:
            assert rabbitmq.consumers(one_name) == 0
        wire.cut()
    with rabbitmq.channel() as channel:
        for one_name in names:
            channel.queue_delete(one_name)


@pytest.mark.parametrize("durable", [False, True])
async def test_deleting_a_queue_is_noticed_by_its_waiter(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str, durable: bool
) -> None:
    rabbitmq.declare(name, durable=durable)
    consumer = await backend.consumer(ref(backend, name))
    waiting = asyncio.create_task(consumer.next())
    await consuming(rabbitmq, name)
    assert await backend.existence(ref(backend, name)) is base.Existence.HERE
    rabbitmq.delete(name)
    with pytest.raises(base.QueueGone):
        await asyncio.wait_for(waiting, LIMIT)
    assert await backend.existence(ref(backend, name)) is base.Existence.GONE
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"1")
    assert (await take(consumer)).body == b"1"  # the consumer is not spoilt by it


async def test_what_was_held_of_a_deleted_queue_can_be_ended(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str
) -> None:
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"1")
    delivery = await take(await backend.consumer(ref(backend, name)))
    rabbitmq.delete(name)
    assert await backend.existence(ref(backend, name)) is base.Existence.GONE
    assert await delivery.ack()


async def test_a_queue_never_seen_is_not_gone(backend: RabbitmqBackend, name: str) -> None:
    assert await backend.existence(ref(backend, name)) is base.Existence.UNKNOWN


async def test_a_transient_queue_missing_after_a_cut_is_not_gone_but_a_durable_one_is(
    rabbitmq: RabbitmqServer, wire: Proxy, name: str
) -> None:
    async with opened(through(wire), rabbitmq.management_url) as one:
        queues = {durable: ref(one, f"{name}_{durable}") for durable in (False, True)}
        for durable, queue in queues.items():
            rabbitmq.declare(queue.name, durable=durable)
            rabbitmq.publish(queue.name, b"1")
            await (await take(await one.consumer(queue))).ack()
            assert await one.existence(queue) is base.Existence.HERE
        wire.refuse()
        wire.cut()
        for queue in queues.values():
            rabbitmq.delete(queue.name)
        wire.listen()
        answers = {durable: await one.existence(queue) for durable, queue in queues.items()}
        assert answers == {False: base.Existence.UNKNOWN, True: base.Existence.GONE}


async def test_a_queue_made_anew_as_transient_is_no_longer_known_as_durable(
    rabbitmq: RabbitmqServer, wire: Proxy, name: str
) -> None:
    async with opened(through(wire), rabbitmq.management_url) as one:
        queue = ref(one, name)
        rabbitmq.declare(name, durable=True)
        consumer = await one.consumer(queue)
        waiting = asyncio.create_task(consumer.next())
        await consuming(rabbitmq, name)
        assert await one.existence(queue) is base.Existence.HERE
        assert one._durable == {queue: True}
        rabbitmq.delete(name)
        rabbitmq.declare(name, durable=False)
        with contextlib.suppress(base.QueueGone):
            rabbitmq.publish(name, b"1")
            await asyncio.wait_for(waiting, LIMIT)
        if isinstance(waiting.exception(), base.QueueGone):
            await take(consumer)
        assert await one.existence(queue) is base.Existence.HERE
        await until(lambda: one._durable.get(queue) is False)


async def test_what_is_known_of_a_queue_is_forgotten_when_it_has_not_been_listed_for_a_day(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, deleted = ref(backend, f"{name}_a"), ref(backend, f"{name}_b")
    for queue in (there, deleted):
        rabbitmq.declare(queue.name, durable=True, arguments={"x-queue-type": "quorum"})
        assert await backend.existence(queue) is base.Existence.HERE
    rabbitmq.delete(deleted.name)

    async def discover() -> None:
        listed = {info.ref for info in await backend.discover()} & {there, deleted}
        assert listed == {there}

    await discover()
    assert await backend.existence(deleted) is base.Existence.GONE
    monkeypatch.setattr(absent, "FORGET_SECS", 0.0)
    await discover()
    assert await backend.existence(deleted) is base.Existence.UNKNOWN
    assert set(backend._durable) == {there}
    assert {key for _, key in backend._quorum} == {there.name}
    rabbitmq.delete(there.name)
    assert await backend.existence(there) is base.Existence.GONE


async def test_the_runner_declares_nothing(
    rabbitmq: RabbitmqServer, backend: RabbitmqBackend, name: str
) -> None:
    def objects() -> set[str]:
        """What is there. Others' things may vanish meanwhile: what tests before this one left expires."""
        kinds = ("queues", "exchanges", "bindings")
        return {
            f"{kind} {_identity(thing)}" for kind in kinds for thing in rabbitmq.api("GET", f"/api/{kind}")[1]
        }

    there = f"{name}_there"
    rabbitmq.declare(there)
    before = objects()
    with pytest.raises(base.QueueGone):
        await backend.publish(ref(backend, name), b"1")
    with pytest.raises(base.QueueGone):
        await take(await backend.consumer(ref(backend, name)))
    await backend.existence(ref(backend, name))
    after = objects()
    assert after <= before
    assert [each for each in before if there in each] == [each for each in before & after if there in each]


def _identity(thing: dict[str, object]) -> str:
    keys = ("vhost", "name", "source", "destination", "routing_key")
    return " ".join(str(thing.get(key)) for key in keys)


def test_backoff_grows_to_its_limit_with_jitter() -> None:
    for failures, longest in itertools.product(range(2000), (5.0, 30.0)):
        assert 0.25 <= rabbitmq_connection.backoff(failures, longest) <= longest
    assert max(rabbitmq_connection.backoff(20, 30.0) for _ in range(100)) > 20


async def test_calls_into_a_thread_that_is_not_there_end() -> None:
    lane = rabbitmq_connection.Lane("test")

    async def answer() -> int:
        return 42

    async def never() -> None:
        await asyncio.Event().wait()

    with pytest.raises(rabbitmq_connection.Closed):
        await lane.call(answer, limit=1)
    await lane.start()
    assert await lane.call(answer, limit=LIMIT) == 42
    with pytest.raises(TimeoutError):
        await lane.call(never, limit=0.05)
    waiting = asyncio.create_task(lane.call(never, limit=LIMIT))
    await lane.call(answer, limit=LIMIT)
    await lane.stop()
    with pytest.raises(rabbitmq_connection.Closed):
        await waiting
    with pytest.raises(rabbitmq_connection.Closed):
        await lane.call(answer, limit=1)
    lane.post(print)
    await lane.stop()


async def test_closing_the_account_ends_every_wait(rabbitmq: RabbitmqServer, name: str) -> None:
    rabbitmq.declare(name)
    rabbitmq.declare(f"{name}_idle")
    rabbitmq.publish(name, b"1")
    async with opened(rabbitmq.amqp_url, rabbitmq.management_url) as one:
        held = await take(await one.consumer(ref(one, name)))
        waiting = asyncio.create_task((await one.consumer(ref(one, f"{name}_idle"))).next())
        await consuming(rabbitmq, f"{name}_idle")
    with pytest.raises(errors.QueueUnavailable):
        await asyncio.wait_for(waiting, LIMIT)
    await asyncio.wait_for(held.lost.wait(), LIMIT)
    assert not await held.ack()
    await until(lambda: rabbitmq.depth(name) == 1)
    await one.aclose()
