"""What every queue backend does, whatever is behind it (runner/queues/base.py)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, TypeVar

import pytest

from runner.errors import MalformedMessage
from runner.queues.base import Existence, QueueGone, QueueRef
from tests.contract.queue_backends import BACKENDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from runner.queues.base import Consumer, Delivery, QueueBackend
    from tests.contract.queue_backends import QueueHarness

T = TypeVar("T")

SOON = 30.0  # generous: nothing here is about speed

# Hundreds of messages are flushed one by one to a disk that other tests use as well.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(params=[pytest.param(name, marks=entry.marks) for name, entry in BACKENDS.items()])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[QueueHarness]:
    async with BACKENDS[request.param].factory(request) as harness:
        yield harness


@pytest.fixture
async def connect(harness: QueueHarness) -> AsyncIterator[Callable[[], Awaitable[QueueBackend]]]:
    """Opens backends, and closes what the test has left open."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_one() -> QueueBackend:
            backend = harness.connect()
            await backend.open()
            stack.push_async_callback(backend.aclose)
            return backend

        yield open_one


@pytest.fixture
async def backend(connect: Callable[[], Awaitable[QueueBackend]]) -> QueueBackend:
    return await connect()


@pytest.fixture
async def queue(harness: QueueHarness) -> QueueRef:
    return await harness.declare("rmq_contract")


async def soon(awaitable: Awaitable[T]) -> T:
    return await asyncio.wait_for(awaitable, SOON)


async def reaches(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SOON):
        while not await check():
            await asyncio.sleep(0.01)


async def nothing_comes(consumer: Consumer) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(consumer.next(), 0.3)
    await consumer.pause()


async def depth_is(harness: QueueHarness, queue: QueueRef, depth: int) -> None:
    async def check() -> bool:
        return await harness.depth(queue) == depth

    await reaches(check)


async def test_a_message_is_published_taken_and_acknowledged(harness, backend, queue):
    consumer = await backend.consumer(queue)
    await backend.publish(queue, b'{"a": 1}')
    delivery = await soon(consumer.next())
    assert (delivery.body, delivery.queue, delivery.redelivered, delivery.attempts) == (
        b'{"a": 1}',
        queue,
        False,
        0,
    )
    assert not delivery.lost.is_set()
    assert await delivery.ack() is True
    await nothing_comes(consumer)
    await backend.aclose()
    await depth_is(harness, queue, 0)


async def test_a_waiting_consumer_is_told_of_a_new_message(backend, queue):
    consumer = await backend.consumer(queue)
    waiting = asyncio.create_task(consumer.next())
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await backend.publish(queue, b"{}")
    assert (await soon(waiting)).body == b"{}"


async def test_messages_come_in_the_order_of_publishing(backend, queue):
    bodies = [b'{"n": %d}' % n for n in range(30)]
    for body in bodies:
        await backend.publish(queue, body)
    consumer = await backend.consumer(queue)
    got = []
    for _ in bodies:
        delivery = await soon(consumer.next())
        got.append(delivery.body)
        assert await delivery.ack()
    assert got == bodies


@pytest.mark.parametrize(
    "body", [b"", b"\x00\xff\xfe not json", b"[" + b"1," * 500_000 + b"1]"], ids=["empty", "binary", "1MB"]
)
async def test_any_bytes_pass_unchanged(harness, backend, queue, body):
    if not harness.any_bytes and not body.startswith(b"["):
        with pytest.raises(MalformedMessage):
            await backend.publish(queue, body)
        return
    consumer = await backend.consumer(queue)
    await backend.publish(queue, body)
    delivery = await soon(consumer.next())
    assert delivery.body == body
    assert await delivery.ack()


async def test_only_the_first_call_ends_a_delivery(harness, backend, queue):
    consumer = await backend.consumer(queue)
    await backend.publish(queue, b"1")
    await backend.publish(queue, b"2")
    first, second = await soon(consumer.next()), await soon(consumer.next())
    assert await first.ack() is True
    assert [await first.ack(), await first.requeue(), await first.reject()] == [False] * 3
    assert await second.requeue() is True
    assert [await second.ack(), await second.requeue(), await second.reject()] == [False] * 3
    again = await soon(consumer.next())
    assert again.body == b"2"
    assert await again.ack()
    await nothing_comes(consumer)
    await depth_is(harness, queue, 0)


async def test_a_message_given_back_comes_again_marked_and_before_later_ones(harness, backend, queue):
    consumer = await backend.consumer(queue)
    await backend.publish(queue, b"first")
    delivery = await soon(consumer.next())
    await backend.publish(queue, b"second")
    assert await delivery.requeue() is True
    await depth_is(harness, queue, 2)
    one, two = await soon(consumer.next()), await soon(consumer.next())
    if harness.redelivers_at_head:
        assert [one.body, two.body] == [b"first", b"second"]
    assert {(d.body, d.redelivered) for d in (one, two)} == {(b"first", True), (b"second", False)}


async def test_a_message_given_back_with_a_delay_comes_when_it_is_over(harness, backend, queue):
    """Where the broker cannot, at once: the delay is the caller's to wait."""
    consumer = await backend.consumer(queue)
    await backend.publish(queue, b"late")
    delivery = await soon(consumer.next())
    given_back = time.monotonic()
    assert await delivery.requeue(delay_secs=0.7 if harness.delays else 3600) is True
    again = await soon(consumer.next())
    assert time.monotonic() - given_back > 0.65 * harness.delays
    assert (again.body, again.redelivered) == (b"late", True)
    assert await again.ack()


async def test_a_rejected_message_does_not_come_again(harness, backend, queue):
    consumer = await backend.consumer(queue)
    await backend.publish(queue, b"bad")
    assert await (await soon(consumer.next())).reject() is True
    await nothing_comes(consumer)
    await backend.aclose()
    await depth_is(harness, queue, 0)


@pytest.mark.parametrize("secs", [0.1, 13 * 3600, 30 * 24 * 3600])
async def test_extending_a_hold_never_ends_it(harness, backend, queue, secs):
    """Also by more than any broker grants at a time (Pub/Sub 10 minutes, SQS 12 hours in all)."""
    consumer = await backend.consumer(queue)
    await backend.publish(queue, b"x")
    delivery = await soon(consumer.next())
    await delivery.extend(secs)
    await nothing_comes(consumer)
    assert not delivery.lost.is_set()
    assert await delivery.ack() is True
    await delivery.extend(secs)  # what has ended is not held again
    await nothing_comes(consumer)
    await depth_is(harness, queue, 0)


async def test_a_message_is_held_past_the_brokers_limit(harness, connect, queue):
    one, two = await connect(), await connect()
    await one.publish(queue, b"long")
    delivery = await soon((await one.consumer(queue)).next())
    waiting = asyncio.create_task((await two.consumer(queue)).next())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 1.2 * harness.limit_secs + 1.0)
    assert not delivery.lost.is_set()
    assert await delivery.ack() is True
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(waiting, 0.5)


async def test_cancelling_next_loses_nothing(backend, queue):
    consumer = await backend.consumer(queue)
    bodies = [b"%d" % n for n in range(40)]
    got: list[Delivery] = []
    publishing = asyncio.create_task(publish_all(backend, queue, bodies))
    async with asyncio.timeout(200):  # forty messages, each flushed
        step = 0
        while len(got) < len(bodies):
            waiting = asyncio.create_task(consumer.next())
            await asyncio.sleep(0.0005 * (step % 17))
            step += 1
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                got.append(await waiting)
            if step > 200:  # enough of cancelling
                got.append(await consumer.next())
    await publishing
    assert [d.body for d in got] == bodies
    assert [await d.ack() for d in got] == [True] * len(got)


async def publish_all(backend: QueueBackend, queue: QueueRef, bodies: list[bytes]) -> None:
    for body in bodies:
        await backend.publish(queue, body)


async def test_pausing_gives_back_what_was_not_handed_out(harness, connect, queue):
    here, there = await connect(), await connect()
    consumer = await here.consumer(queue)
    for _ in range(20):
        await here.publish(queue, b"x")
        waiting = asyncio.create_task(consumer.next())
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await waiting).requeue()
        await consumer.pause()
        other = await there.consumer(queue)
        assert await (await soon(other.next())).ack()
        await other.close()
    await depth_is(harness, queue, 0)


async def test_a_paused_consumer_asks_again_with_next_and_keeps_what_it_handed_out(backend, queue):
    consumer = await backend.consumer(queue)
    await backend.publish(queue, b"1")
    first = await soon(consumer.next())
    await consumer.pause()
    await backend.publish(queue, b"2")
    assert (await soon(consumer.next())).body == b"2"
    await consumer.close()
    await consumer.close()
    assert await first.ack() is True


async def test_two_consumers_of_one_queue_never_get_the_same_message(connect, queue):
    one, two = await connect(), await connect()
    await one.publish(queue, b"only")
    tasks = [asyncio.create_task((await b.consumer(queue)).next()) for b in (one, two)]
    done, pending = await asyncio.wait(tasks, timeout=SOON, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1
    await asyncio.sleep(0.3)
    assert not next(iter(pending)).done()
    assert await done.pop().result().ack()
    for task in pending:
        task.cancel()
    await asyncio.wait(pending)


async def test_five_hundred_messages_through_four_consumers_come_once_each(harness, connect, queue):
    backends = [await connect(), await connect()]
    bodies = {b"%d" % n for n in range(500)}
    got: list[bytes] = []
    everything = asyncio.Event()
    lends = backends[0].kind.lower() in {"sqs", "pubsub"}

    async def work(consumer: Consumer) -> None:
        while True:
            delivery = await consumer.next()
            # What was in an answer that came too late to be kept comes again from services that lend for a time.
            assert lends or not delivery.redelivered
            assert await delivery.ack()
            got.append(delivery.body)
            if len(got) == len(bodies):
                everything.set()

    workers = [asyncio.create_task(work(await backends[n % 2].consumer(queue))) for n in range(4)]
    await asyncio.gather(
        *[publish_all(backends[0], queue, part) for part in (sorted(bodies)[:250], sorted(bodies)[250:])]
    )
    coming = asyncio.create_task(everything.wait())
    await asyncio.wait([coming, *workers], timeout=200, return_when=asyncio.FIRST_COMPLETED)
    for task in (coming, *workers):
        task.cancel()
    ended = await asyncio.gather(*workers, return_exceptions=True)
    assert [error for error in ended if not isinstance(error, asyncio.CancelledError)] == []
    assert sorted(got) == sorted(bodies)
    await depth_is(harness, queue, 0)


async def test_what_a_closed_backend_held_goes_to_another(harness, connect, queue):
    one, two = await connect(), await connect()
    await one.publish(queue, b"held")
    held = await soon((await one.consumer(queue)).next())
    waiting = asyncio.create_task((await two.consumer(queue)).next())
    await asyncio.sleep(0.1)
    await one.aclose()
    await one.aclose()
    again = await soon(waiting)
    assert (again.body, again.redelivered) == (b"held", True)
    assert await held.ack() is False
    assert await again.ack() is True
    await depth_is(harness, queue, 0)


async def test_a_hold_that_is_lost_is_told_and_the_message_comes_again(harness, backend, queue):
    consumer = await backend.consumer(queue)
    await backend.publish(queue, b"held")
    first = await soon(consumer.next())
    await harness.break_connection(backend)
    await soon(first.lost.wait())
    await first.extend(60)
    assert [await first.ack(), await first.requeue(), await first.reject()] == [False] * 3
    again = await soon(consumer.next())
    assert (again.body, again.redelivered) == (b"held", True)
    assert await again.ack() is True
    await nothing_comes(consumer)


async def test_publishing_to_a_queue_that_does_not_exist_is_told(backend):
    with pytest.raises(QueueGone):
        await soon(backend.publish(QueueRef(account=backend.account, name="rmq_none"), b"x"))


async def test_consuming_a_queue_that_does_not_exist_is_told(backend):
    consumer = await backend.consumer(QueueRef(account=backend.account, name="rmq_none"))
    with pytest.raises(QueueGone):
        await soon(consumer.next())
    await consumer.close()


async def test_a_queue_that_is_deleted_ends_the_wait(harness, backend, queue):
    consumer = await backend.consumer(queue)
    waiting = asyncio.create_task(consumer.next())
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await harness.delete(queue)
    with pytest.raises(QueueGone):
        await soon(waiting)


async def test_existence(harness, backend, queue):
    assert queue in [info.ref for info in await backend.discover()]
    assert await backend.existence(queue) is Existence.HERE
    await harness.delete(queue)

    async def gone() -> bool:
        return await backend.existence(queue) is Existence.GONE

    await reaches(gone)


async def test_giving_back_into_a_deleted_queue_does_not_raise(harness, backend, queue):
    consumer = await backend.consumer(queue)
    await backend.publish(queue, b"x")
    delivery = await soon(consumer.next())
    await harness.delete(queue)
    assert isinstance(await delivery.requeue(), bool)


async def test_accounts_of_one_broker_have_one_identity(connect, queue):
    first, second = await connect(), await connect()

    async def listed() -> bool:
        return all([await each.discover() for each in (first, second)])

    await reaches(listed)
    assert first.identity == second.identity
    assert "://" in first.identity


async def test_discovery_lists_work_queues_but_no_response_queues(harness, backend, queue):
    other = await harness.declare("some other name")
    await harness.declare("rmq_contract_response")

    async def listed() -> bool:
        return {info.ref for info in await backend.discover()} == {queue, other}

    await reaches(listed)
    await harness.delete(other)
    await reaches(lambda: only(backend, queue))


async def only(backend: QueueBackend, queue: QueueRef) -> bool:
    return [info.ref for info in await backend.discover()] == [queue]
