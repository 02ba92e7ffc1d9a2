"""What the RabbitMQ backend makes of its URLs, and of the management API."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pika
import pytest

from runner import errors
from runner.queues import base, rabbitmq_connection, rabbitmq_management
from runner.queues.rabbitmq import RabbitmqBackend
from tests.servers.proxy import proxy
from tests.service.rabbitmq_kit import LIMIT, backend, name, opened, ref, take, wire

if TYPE_CHECKING:
    from tests.servers.rabbitmq import RabbitmqServer

__all__ = ["backend", "name", "wire"]  # fixtures

pytestmark = pytest.mark.service


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


async def what_publishing_says(
    one: RabbitmqBackend, queue: base.QueueRef, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Why nothing can be published, as soon as the broker has said so."""
    monkeypatch.setattr("runner.queues.rabbitmq.PUBLISH_SECS", 1.0)
    async with asyncio.timeout(LIMIT):
        while True:
            with pytest.raises(errors.QueueUnavailable) as caught:
                await one.publish(queue, b"2")
            if "not connected yet" not in str(caught.value):
                return str(caught.value)


async def test_a_wrong_password_is_said_and_tried_again(
    rabbitmq: RabbitmqServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.queues.rabbitmq_connection.REFUSED_DELAY_SECS", 3.0)
    rabbitmq.add_user(name, "old", tags="management")
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"1")
    async with opened(rabbitmq.url(user=name, password="s3cret"), rabbitmq.management_url) as one:
        with pytest.raises(errors.QueueUnavailable, match="401") as discovery:
            await one.discover()
        said = await what_publishing_says(one, ref(one, name), monkeypatch)
        assert "ACCESS_REFUSED" in said
        assert "s3cret" not in f"{discovery.value} {said}"
        assert await one.existence(ref(one, name)) is base.Existence.UNKNOWN
        waiting = asyncio.create_task((await one.consumer(ref(one, name))).next())
        rabbitmq.add_user(name, "s3cret", tags="management")
        delivery = await asyncio.wait_for(waiting, LIMIT)
        assert delivery.body == b"1"


async def test_a_missing_vhost_is_unavailable(
    rabbitmq: RabbitmqServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(rabbitmq.url(f"no {name}"), rabbitmq.management_url) as one:
        assert "vhost" in await what_publishing_says(one, ref(one, name, ""), monkeypatch)
        assert await one.existence(ref(one, name, "")) is base.Existence.UNKNOWN


async def test_nobody_at_the_address() -> None:
    async with opened("amqp://guest:s3cret@127.0.0.1:1/", None) as one:
        with pytest.raises(errors.QueueUnavailable) as caught:
            await one.discover()
        assert "s3cret" not in str(caught.value)


async def test_a_management_api_that_stalls_has_a_deadline(
    rabbitmq: RabbitmqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxy(rabbitmq.host, rabbitmq.management_port) as way:
        async with opened(rabbitmq.amqp_url, f"http://127.0.0.1:{way.port}") as one:
            assert isinstance(await one.discover(), list)
            way.blackhole()
            monkeypatch.setattr("runner.queues.rabbitmq_management.DEADLINE_SECS", 1.0)
            with pytest.raises(errors.QueueUnavailable, match="1 s"):
                await one.discover()


async def test_an_answer_has_a_size_bound(backend: RabbitmqBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.queues.rabbitmq_management.MAX_BYTES", 10)
    with pytest.raises(errors.QueueUnavailable, match="more than 10 bytes"):
        await backend.discover()


async def declare_many(url: str, count: int) -> None:
    """Without waiting for each answer: the broker is the limit."""
    link = rabbitmq_connection.Link(pika.URLParameters(url), "many")
    channel = await link.channel()
    channel.exchange_declare("StudioML.topic", "topic", durable=True, auto_delete=True)
    for number in range(count):
        channel.queue_declare(f"rmq_{number}")
        channel.queue_bind(f"rmq_{number}", "StudioML.topic", f"StudioML.rmq_{number}")
    await rabbitmq_connection.rpc(channel, channel.queue_declare, queue=f"rmq_{count - 1}", passive=True)
    await link.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_ten_thousand_queues_are_discovered_with_one_request(
    own_rabbitmq: RabbitmqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        rabbitmq_management, "DEADLINE_SECS", LIMIT
    )  # how long it takes the benchmark measures
    asked: list[str] = []
    real = rabbitmq_management.Management._get

    async def counted(management: rabbitmq_management.Management, path: str) -> tuple[int, bytes]:
        asked.append(path)
        return await real(management, path)

    monkeypatch.setattr(rabbitmq_management.Management, "_get", counted)
    own_rabbitmq.add_vhost("many")
    await declare_many(own_rabbitmq.url("many"), 10_000)
    try:
        async with opened(own_rabbitmq.amqp_url, own_rabbitmq.management_url) as one:
            found = await one.discover()
            assert sum(info.ref.vhost == "many" for info in found) == 10_000
            assert asked == ["/api/bindings"]
    finally:
        own_rabbitmq.api("DELETE", "/api/vhosts/many")
