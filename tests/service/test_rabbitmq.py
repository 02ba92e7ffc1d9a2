"""The RabbitMQ backend against a real broker: what is particular to it. What all backends share: tests/contract."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import pathlib
import time
import uuid
from typing import TYPE_CHECKING

import pytest

from runner import errors
from runner.queues import base, rabbitmq_client, rabbitmq_connection
from runner.queues.rabbitmq import RabbitmqBackend
from tests.servers.proxy import Proxy, proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.servers.rabbitmq import RabbitmqServer

pytestmark = pytest.mark.service

CAPTURED = pathlib.Path(__file__).parents[1] / "data" / "captured"
LIMIT = 40.0


@contextlib.asynccontextmanager
async def opened(url: str, management_url: str | None) -> AsyncIterator[RabbitmqBackend]:
    backend = RabbitmqBackend(url, management_url)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.aclose()


@pytest.fixture
async def backend(rabbitmq: RabbitmqServer) -> AsyncIterator[RabbitmqBackend]:
    async with opened(rabbitmq.amqp_url, rabbitmq.management_url) as one:
        yield one


@pytest.fixture
def name() -> str:
    return f"rmq_{uuid.uuid4().hex[:12]}"


@pytest.fixture
def wire(rabbitmq: RabbitmqServer) -> Iterator[Proxy]:
    with proxy(rabbitmq.host, rabbitmq.port) as one:
        yield one


def through(wire: Proxy, query: str = "") -> str:
    return f"amqp://guest:guest@127.0.0.1:{wire.port}/{query}"


def ref(backend: RabbitmqBackend, name: str, vhost: str = "/") -> base.QueueRef:
    return base.QueueRef(account=backend.account, name=name, vhost=vhost)


async def take(consumer: base.Consumer) -> base.Delivery:
    return await asyncio.wait_for(consumer.next(), LIMIT)


async def until(claim: Callable[[], bool]) -> None:
    """Wait for something that only asking tells."""
    async with asyncio.timeout(LIMIT):
        while not await asyncio.to_thread(claim):
            await asyncio.sleep(0.05)


async def consuming(server: RabbitmqServer, *names: str, count: int = 1) -> None:
    for name in names:
        await until(functools.partial(lambda name: server.consumers(name) == count, name))


# -- configuration


def test_the_account_has_no_credentials() -> None:
    one = RabbitmqBackend("amqps://us%40er:p%2Fw@broker.example:5999/%2f?heartbeat=7")
    assert one.account == "amqps://broker.example:5999"
    assert one._management.label == "https://broker.example:15671"
    assert one._parameters.credentials.username == "us@er"
    assert one._parameters.credentials.password == "p/w"
    assert one._parameters.heartbeat == 7
    assert RabbitmqBackend("amqp://u:p@[::1]/").account == "amqp://[::1]:5672"
    assert RabbitmqBackend("amqp://u:p@h/", "https://m:1/rabbit/")._management.label == "https://m:1/rabbit"


@pytest.mark.parametrize(
    "url",
    [
        "http://u:s3cret@h/",
        "amqp://u:s3cret@h:port/",
        "amqp://u:s3cret@h/?no_such=1",
        "amqp://u:s3cret@h/?heartbeat=x",
        "",
    ],
)
def test_a_bad_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        RabbitmqBackend(url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["amqp://h", "http://", "http://u:s3cret@h:port"])
def test_a_bad_management_url_is_refused(url: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        RabbitmqBackend("amqp://u:p@h/", url)
    assert "s3cret" not in str(caught.value)


# -- discovery


async def test_discovery_sees_the_bindings_of_all_vhosts(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str
) -> None:
    vhost = f"team/{name}"
    rabbitmq.add_vhost(vhost)
    rabbitmq.declare(name)
    rabbitmq.declare(f"{name}_response")
    rabbitmq.declare(f"{name} ü%2f", vhost=vhost)
    with rabbitmq.channel() as channel:
        channel.queue_declare(f"{name}_unbound")
        channel.queue_declare(f"{name}_tap")
        channel.queue_bind(f"{name}_tap", "StudioML.topic", "StudioML.#")
    found = [info.ref for info in await backend.discover() if info.ref.name.startswith(name)]
    rabbitmq.delete(f"{name}_tap")  # else nothing is unroutable any more
    assert found == [ref(backend, name), ref(backend, f"{name} ü%2f", vhost)]


async def test_a_user_without_the_management_tag_is_told_so(rabbitmq: RabbitmqServer, name: str) -> None:
    rabbitmq.add_user(name, "pass/w@rd")
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"1")
    async with opened(rabbitmq.url(user=name, password="pass/w@rd"), rabbitmq.management_url) as one:
        with pytest.raises(errors.QueueUnavailable, match="management") as caught:
            await one.discover()
        assert "pass/w@rd" not in str(caught.value)
        consumer = await one.consumer(ref(one, name))  # and everything else works
        assert await (await take(consumer)).ack()
        assert await one.existence(ref(one, name)) is base.Existence.HERE
        rabbitmq.delete(name)
        assert await one.existence(ref(one, name)) is base.Existence.GONE


async def test_a_wrong_password_is_said_and_tried_again(
    rabbitmq: RabbitmqServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.queues.rabbitmq.PUBLISH_SECS", 3.0)
    rabbitmq.add_user(name, "old", tags="management")
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"1")
    async with opened(rabbitmq.url(user=name, password="s3cret"), rabbitmq.management_url) as one:
        with pytest.raises(errors.QueueUnavailable, match="401") as discovery:
            await one.discover()
        with pytest.raises(errors.QueueUnavailable, match="ACCESS_REFUSED") as publishing:
            await one.publish(ref(one, name), b"2")
        assert "s3cret" not in f"{discovery.value} {publishing.value}"
        assert await one.existence(ref(one, name)) is base.Existence.UNKNOWN
        waiting = asyncio.create_task((await one.consumer(ref(one, name))).next())
        rabbitmq.add_user(name, "s3cret", tags="management")
        delivery = await asyncio.wait_for(waiting, LIMIT)
        assert delivery.body == b"1"


async def test_a_missing_vhost_is_unavailable(
    rabbitmq: RabbitmqServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.queues.rabbitmq.PUBLISH_SECS", 3.0)
    async with opened(rabbitmq.url(f"no {name}"), rabbitmq.management_url) as one:
        with pytest.raises(errors.QueueUnavailable, match="vhost"):
            await one.publish(ref(one, name, ""), b"2")
        assert await one.existence(ref(one, name, "")) is base.Existence.UNKNOWN


async def test_nobody_at_the_address() -> None:
    async with opened("amqp://guest:s3cret@127.0.0.1:1/", None) as one:
        with pytest.raises(errors.QueueUnavailable) as caught:
            await one.discover()
        assert "s3cret" not in str(caught.value)


async def test_a_management_api_that_stalls_has_a_deadline(
    rabbitmq: RabbitmqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.queues.rabbitmq_management.DEADLINE_SECS", 1.0)
    with proxy(rabbitmq.host, rabbitmq.management_port) as way:
        async with opened(rabbitmq.amqp_url, f"http://127.0.0.1:{way.port}") as one:
            assert isinstance(await one.discover(), list)
            way.blackhole()
            with pytest.raises(errors.QueueUnavailable, match="1 s"):
                await one.discover()


async def test_an_answer_has_a_size_bound(backend: RabbitmqBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.queues.rabbitmq_management.MAX_BYTES", 10)
    with pytest.raises(errors.QueueUnavailable, match="more than 10 bytes"):
        await backend.discover()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_ten_thousand_queues_are_discovered_in_two_seconds(own_rabbitmq: RabbitmqServer) -> None:
    own_rabbitmq.add_vhost("many")
    with own_rabbitmq.channel("many") as channel:
        channel.exchange_declare("StudioML.topic", "topic", durable=True, auto_delete=True)
        for number in range(10_000):
            channel.queue_declare(f"rmq_{number}")
            channel.queue_bind(f"rmq_{number}", "StudioML.topic", f"StudioML.rmq_{number}")
    try:
        async with opened(own_rabbitmq.amqp_url, own_rabbitmq.management_url) as one:
            taken = []
            for _ in range(3):
                start = time.monotonic()
                found = await one.discover()
                taken.append(time.monotonic() - start)
                assert sum(info.ref.vhost == "many" for info in found) == 10_000
            print("10 000 queues:", [f"{secs:.2f} s" for secs in taken])
            assert (
                min(taken) < 2.0
            )  # a claim about the product; the best of three, on a machine that others use
    finally:
        own_rabbitmq.api("DELETE", "/api/vhosts/many")


# -- taking


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
        before, start = time.process_time(), time.monotonic()
        await asyncio.sleep(3)  # the measurement itself
        share = (time.process_time() - before) / (time.monotonic() - start)
        print(f"300 idle consumers: {share:.2%} of a core")
        assert share < 0.05
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


# -- queues that go away


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


async def test_the_runner_declares_nothing(
    rabbitmq: RabbitmqServer, backend: RabbitmqBackend, name: str
) -> None:
    def objects() -> object:
        things = [rabbitmq.api("GET", path)[1] for path in ("/api/queues", "/api/exchanges", "/api/bindings")]
        return [sorted(str(thing.get("name", thing)) for thing in some) for some in things]

    before = objects()
    with pytest.raises(base.QueueGone):
        await backend.publish(ref(backend, name), b"1")
    with pytest.raises(base.QueueGone):
        await take(await backend.consumer(ref(backend, name)))
    await backend.existence(ref(backend, name))
    assert objects() == before


# -- publishing


@pytest.mark.parametrize("durable", [False, True])
async def test_publishing_looks_like_the_real_client(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str, durable: bool
) -> None:
    rabbitmq.declare(name, durable=durable)
    body = (CAPTURED / "plain.json").read_bytes()
    await backend.publish(ref(backend, name), body)
    method, properties, got = rabbitmq.get(name)
    captured = json.loads((CAPTURED / "plain.amqp.json").read_text())
    assert got == body
    assert (method.exchange, method.routing_key) == (captured["method"]["exchange"], f"StudioML.{name}")
    assert properties.delivery_mode == (2 if durable else 1)
    assert properties.content_type == captured["properties"]["content_type"]
    assert properties.app_id == captured["properties"]["app_id"]


async def test_an_unbound_queue_is_published_to_by_name(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str
) -> None:
    with rabbitmq.channel() as channel:
        channel.queue_declare(name)
    await backend.publish(ref(backend, name), b"1")  # with or without the exchange
    rabbitmq.declare(f"{name}_other")
    await backend.publish(ref(backend, name), b"2")
    assert [rabbitmq.get(name)[2], rabbitmq.get(name)[2]] == [b"1", b"2"]


async def test_many_at_once_are_published_each_to_its_own(
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str
) -> None:
    rabbitmq.declare(name)
    bodies = [b"%d" % number for number in range(40)]
    missing = ref(backend, f"{name}_none")
    answers = await asyncio.gather(
        *(backend.publish(missing if int(body) % 2 else ref(backend, name), body) for body in bodies),
        return_exceptions=True,
    )
    assert [isinstance(answer, base.QueueGone) for answer in answers] == [
        bool(int(body) % 2) for body in bodies
    ]
    assert rabbitmq.depth(name) == 20


async def test_a_full_queue_refuses(backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str) -> None:
    rabbitmq.declare(name, arguments={"x-max-length": 0, "x-overflow": "reject-publish"})
    with pytest.raises(errors.QueueUnavailable, match="refused the message"):
        await backend.publish(ref(backend, name), b"1")


async def test_publishing_has_a_time_limit(
    rabbitmq: RabbitmqServer, wire: Proxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.queues.rabbitmq.PUBLISH_SECS", 1.0)
    rabbitmq.declare(name)
    async with opened(through(wire), rabbitmq.management_url) as one:
        await one.publish(ref(one, name), b"1")
        wire.hold_answers()
        with pytest.raises(errors.QueueUnavailable, match="1 s"):
            await one.publish(ref(one, name), b"2")
        wire.resume()
        monkeypatch.setattr("runner.queues.rabbitmq.PUBLISH_SECS", LIMIT)
        with pytest.raises(base.QueueGone):  # and the late confirmation is not taken for this one's
            await one.publish(ref(one, f"{name}_none"), b"3")
        await one.publish(ref(one, name), b"4")
    assert [rabbitmq.get(name)[2] for _ in range(3)] == [b"1", b"2", b"4"]


# -- the client's side


@pytest.mark.parametrize("case", ["plain", "completion"])
def test_declaring_makes_what_the_real_client_made(own_rabbitmq: RabbitmqServer, case: str) -> None:
    captured = json.loads((CAPTURED / f"{case}.queue.json").read_text())
    queue = captured["queue"]["name"]
    with rabbitmq_client.RabbitmqPublisher(own_rabbitmq.amqp_url) as client:
        client.declare_like_client(queue, durable=False)
        client.declare_like_client(queue, durable=True)  # what is there stays as it is
        client.publish(queue, b"1", durable=False)
        with pytest.raises(base.QueueGone):
            client.publish(f"{queue}_none", b"1", durable=False)
        found = {
            "queue": own_rabbitmq.api("GET", f"/api/queues/%2F/{queue}")[1],
            "exchange": own_rabbitmq.api("GET", "/api/exchanges/%2F/StudioML.topic")[1],
        }
        for thing, made in found.items():
            assert {key: made[key] for key in captured[thing]} == captured[thing]
        bindings = own_rabbitmq.api("GET", f"/api/queues/%2F/{queue}/bindings")[1]
        pick = lambda some: sorted((one["source"], one["routing_key"]) for one in some)
        assert pick(bindings) == pick(captured["bindings"])
        assert own_rabbitmq.get(queue)[1].delivery_mode is None
        client.delete(queue)
        client.delete(queue)
        assert own_rabbitmq.api("GET", f"/api/queues/%2F/{queue}")[0] == 404


def test_a_client_without_a_broker_is_told_so() -> None:
    with (
        pytest.raises(errors.QueueUnavailable) as caught,
        rabbitmq_client.RabbitmqPublisher("amqp://u:s3cret@127.0.0.1:1/"),
    ):
        pass
    assert "s3cret" not in str(caught.value)


# -- the crossing


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
    assert rabbitmq.depth(name) == 1
    await one.aclose()
