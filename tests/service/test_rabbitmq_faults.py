"""What the RabbitMQ backend survives: cuts, silence, restarts, a busy daemon, the broker's limit on holding a message."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from runner import errors
from runner.queues import base, rabbitmq_connection
from tests.servers.ports import free_ports
from tests.servers.rabbitmq import rabbitmq_server
from tests.service.rabbitmq_kit import (
    LIMIT,
    consuming,
    name,
    opened,
    ref,
    take,
    through,
    until,
    wire,
    written,
)

if TYPE_CHECKING:
    import pathlib

    from tests.servers.proxy import Proxy
    from tests.servers.rabbitmq import RabbitmqServer

__all__ = ["name", "wire"]  # fixtures

pytestmark = pytest.mark.service


async def test_a_cut_loses_the_hold_and_consumption_comes_back(
    rabbitmq: RabbitmqServer, wire: Proxy, name: str
) -> None:
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"held")
    async with opened(through(wire), rabbitmq.management_url) as one:
        consumer = await one.consumer(ref(one, name))
        held = await take(consumer)
        waiting = asyncio.create_task((await one.consumer(ref(one, name))).next())
        await consuming(rabbitmq, name)
        wire.refuse()
        assert wire.cut() == 1
        await asyncio.wait_for(held.lost.wait(), LIMIT)
        assert not await held.ack()
        assert await one.existence(ref(one, name)) is base.Existence.UNKNOWN
        wire.listen()
        back = await asyncio.wait_for(waiting, LIMIT)
        assert (back.body, back.redelivered) == (b"held", True)
        assert await back.ack()
        await one.publish(ref(one, name), b"next")
        assert (await take(consumer)).body == b"next"


async def test_every_cut_is_survived(rabbitmq: RabbitmqServer, wire: Proxy, name: str) -> None:
    rabbitmq.declare(name)
    async with opened(through(wire), rabbitmq.management_url) as one:
        consumer = await one.consumer(ref(one, name))
        for number in range(6):
            waiting = asyncio.create_task(consumer.next())
            await consuming(rabbitmq, name)
            if number % 2:
                assert wire.cut() >= 1
                await consuming(rabbitmq, name)
            rabbitmq.publish(name, b"%d" % number)
            delivery = await asyncio.wait_for(waiting, LIMIT)
            assert delivery.body == b"%d" % number
            assert await delivery.ack()
        with contextlib.suppress(
            TimeoutError
        ):  # a message whose wait ended before the cut is not handed out dead
            await asyncio.wait_for(consumer.next(), 0.01)
        wire.cut()
        rabbitmq.publish(name, b"last")
        last = await take(consumer)
        assert last.body == b"last"
        assert await last.ack()


async def test_a_kept_message_whose_connection_broke_is_not_handed_out(
    rabbitmq: RabbitmqServer, wire: Proxy, name: str
) -> None:
    rabbitmq.declare(name)
    async with opened(through(wire), rabbitmq.management_url) as one:
        consumer = await one.consumer(ref(one, name))
        waiting = asyncio.create_task(consumer.next())
        await consuming(rabbitmq, name)
        waiting.cancel()
        rabbitmq.publish(name, b"1")
        await until(lambda: bool(consumer._arrived) or rabbitmq.depth(name) == 1)
        wire.cut()
        await until(lambda: one._consuming["/"].generation == 2)  # our side has seen it as well
        await until(lambda: rabbitmq.depth(name) == 1)
        delivery = await take(consumer)
        assert delivery.body == b"1"
        assert await delivery.ack()


async def test_silence_is_noticed_by_heartbeats(rabbitmq: RabbitmqServer, wire: Proxy, name: str) -> None:
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"held")
    async with opened(through(wire, "?heartbeat=2"), rabbitmq.management_url) as one:
        consumer = await one.consumer(ref(one, name))
        held = await take(consumer)
        wire.blackhole()
        await asyncio.wait_for(held.lost.wait(), LIMIT)
        wire.cut()
        wire.resume()
        again = await take(consumer)
        assert again.redelivered
        assert await again.ack()


@pytest.mark.slow
async def test_a_busy_daemon_loop_costs_no_connection(
    rabbitmq: RabbitmqServer, wire: Proxy, name: str
) -> None:
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"held")
    # Long enough for a machine that stands still for some seconds, which is not what this is about.
    async with opened(through(wire, "?heartbeat=5"), rabbitmq.management_url) as one:
        held = await take(await one.consumer(ref(one, name)))
        time.sleep(16)  # the broker gives up after two or three heartbeats
        assert await held.ack()
        assert not held.lost.is_set()
        assert wire.connections == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
async def test_a_broker_that_is_away_is_tried_again_and_again(
    rabbitmq: RabbitmqServer, wire: Proxy, name: str, host: str
) -> None:
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"1")
    wire.refuse()
    async with opened(f"amqp://guest:guest@{host}:{wire.port}/", rabbitmq.management_url) as one:
        waiting = asyncio.create_task((await one.consumer(ref(one, name))).next())
        link = one._consuming["/"]
        await until(lambda: link.failure != "not connected yet")
        assert any(word in link.failure for word in ("refused", "not known", "name resolution"))
        assert not rabbitmq_connection.is_refusal(OSError(link.failure))
        wire.listen()
        link._parameters.host = "127.0.0.1"  # as if the name had come to be known
        assert (await asyncio.wait_for(waiting, LIMIT)).body == b"1"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_restart_keeps_durable_queues_and_cancels_no_transient_ones(
    own_rabbitmq: RabbitmqServer, name: str, how: str
) -> None:
    async with opened(own_rabbitmq.amqp_url, own_rabbitmq.management_url) as one:
        durable, transient = ref(one, f"{name}_durable"), ref(one, f"{name}_transient")
        for queue in (durable, transient):
            own_rabbitmq.declare(queue.name, durable=queue is durable)
            own_rabbitmq.publish(queue.name, b"held", persistent=True)
        consumers = {queue: await one.consumer(queue) for queue in (durable, transient)}
        held = {queue: await take(consumer) for queue, consumer in consumers.items()}
        assert await one.existence(durable) is base.Existence.HERE
        assert await one.existence(transient) is base.Existence.HERE
        waits = {queue: asyncio.create_task((await one.consumer(queue)).next()) for queue in consumers}
        await until(lambda: written(own_rabbitmq, durable.name))  # or it forgets it when it is killed
        await asyncio.to_thread(getattr(own_rabbitmq, how))
        for delivery in held.values():
            await asyncio.wait_for(delivery.lost.wait(), LIMIT)
            assert not await delivery.ack()
        for queue in consumers:
            assert await one.existence(queue) is base.Existence.UNKNOWN
        with pytest.raises(errors.QueueUnavailable):
            await one.discover()
        await asyncio.to_thread(own_rabbitmq.start)
        again = await asyncio.wait_for(waits[durable], LIMIT)
        assert (again.body, again.redelivered) == (b"held", True)
        assert await again.ack()
        with pytest.raises(base.QueueGone):
            await asyncio.wait_for(waits[transient], LIMIT)
        assert await one.existence(durable) is base.Existence.HERE
        assert await one.existence(transient) is base.Existence.UNKNOWN
        own_rabbitmq.declare(transient.name)
        await one.publish(transient, b"anew")
        assert (await take(consumers[transient])).body == b"anew"


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_the_brokers_limit_on_holding_is_told_as_a_loss(name: str) -> None:
    with rabbitmq_server(
        extra="consumer_timeout = 10000\n", advanced="[{rabbit, [{channel_tick_interval, 2000}]}]."
    ) as server:
        other = f"{name}_other"
        server.declare(name)
        server.declare(other)
        server.publish(name, b"long")
        async with opened(server.amqp_url, server.management_url) as one:
            consumer = await one.consumer(ref(one, name))
            held = await take(consumer)
            await asyncio.wait_for(held.lost.wait(), LIMIT)
            assert not await held.ack()
            again = await take(consumer)  # on a new channel of the same connection
            assert (again.body, again.redelivered) == (b"long", True)
            assert await again.ack()
            assert one._consuming["/"].generation == 1


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_tls_is_verified(tmp_path: pathlib.Path, name: str) -> None:
    openssl = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    files = ["-keyout", f"{tmp_path}/key.pem", "-out", f"{tmp_path}/cert.pem"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*openssl, *files, *names], check=True, capture_output=True)
    port, management_port = free_ports(2)
    tls = f"cacertfile = {tmp_path}/cert.pem\n{{0}}certfile = {tmp_path}/cert.pem\n{{0}}keyfile = {tmp_path}/key.pem\n"
    extra = (
        f"listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.{tls.format('ssl_options.')}"
        f"management.ssl.ip = 127.0.0.1\nmanagement.ssl.port = {management_port}\n"
        f"management.ssl.{tls.format('management.ssl.')}"
    )
    with rabbitmq_server(extra=extra) as server:
        server.declare(name)
        trusting = f"amqps://guest:guest@127.0.0.1:{port}/?ssl_options={{'cafile':'{tmp_path}/cert.pem'}}"
        async with opened(trusting, f"https://localhost:{management_port}") as one:
            assert one.account == f"amqps://127.0.0.1:{port}"
            assert ref(one, name) in [info.ref for info in await one.discover()]
            await one.publish(ref(one, name), b"1")
            assert await (await take(await one.consumer(ref(one, name)))).ack()
        async with opened(
            f"amqps://guest:guest@127.0.0.1:{port}/", f"https://localhost:{management_port}"
        ) as one:
            with pytest.raises(errors.QueueUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
                await one.discover()
            assert await one.existence(ref(one, name)) is base.Existence.UNKNOWN
            keeping = one._consuming["/"]._task
            assert keeping is not None
            assert not keeping.done()
            assert "CERTIFICATE_VERIFY_FAILED" in one._consuming["/"].failure
