"""Publishing to a real RabbitMQ, as the runner and as a client."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from runner import errors
from runner.queues import base, rabbitmq_client
from tests.service.rabbitmq_kit import CAPTURED, LIMIT, backend, name, opened, ref, through, wire

if TYPE_CHECKING:
    from runner.queues.rabbitmq import RabbitmqBackend
    from tests.servers.proxy import Proxy
    from tests.servers.rabbitmq import RabbitmqServer

__all__ = ["backend", "name", "wire"]  # fixtures

pytestmark = pytest.mark.service


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
    backend: RabbitmqBackend, rabbitmq: RabbitmqServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.queues.rabbitmq.PUBLISH_SECS", LIMIT)  # the last waits for all the others
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
    rabbitmq.declare(name)
    async with opened(through(wire), rabbitmq.management_url) as one:
        await one.publish(ref(one, name), b"1")
        wire.hold_answers()
        monkeypatch.setattr("runner.queues.rabbitmq.PUBLISH_SECS", 1.0)
        with pytest.raises(errors.QueueUnavailable, match="1 s"):
            await one.publish(ref(one, name), b"2")
        wire.resume()
        monkeypatch.setattr("runner.queues.rabbitmq.PUBLISH_SECS", LIMIT)
        with pytest.raises(base.QueueGone):  # and the late confirmation is not taken for this one's
            await one.publish(ref(one, f"{name}_none"), b"3")
        await one.publish(ref(one, name), b"4")
    assert [rabbitmq.get(name)[2] for _ in range(3)] == [b"1", b"2", b"4"]


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
