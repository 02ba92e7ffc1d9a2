"""What the Pub/Sub backend does beyond the contract suite: discovery, holding, flow control, cost of being there."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from runner.queues import pubsub_delivery, pubsub_stream
from tests.service.pubsub_kit import LIMIT, QUICK, STEADY, opened, ref, server, stopped, take, until, way

if TYPE_CHECKING:
    from tests.servers.pubsub import PubsubServer

__all__ = ["server", "way"]  # fixtures

pytestmark = pytest.mark.service


# -- discovery -------------------------------------------------------------------------------------------------------


async def test_queues_are_the_pull_subscriptions_that_clients_make(server: PubsubServer) -> None:
    for name in ("pubsub_b", "pubsub_a", "pubsub_a_response"):
        server.declare(name)
    subscriptions = f"projects/{server.project}/subscriptions/"
    for name, more in {
        "other": {},
        "pubsub_pushed_sub": {"push_config": {"push_endpoint": "https://example.com/x"}},
        "pubsub_a-second_sub": {},
    }.items():
        request = {"name": subscriptions + name, "topic": server.topic("pubsub_a"), **more}
        server.subscriber.create_subscription(request=request)
    async with opened(server) as backend:
        assert sorted(info.ref.name for info in await backend.discover()) == [
            "pubsub_a",
            "pubsub_a-second",
            "pubsub_b",
        ]


async def test_all_pages_are_asked_for(server: PubsubServer) -> None:
    server.publisher.create_topic(name=server.topic("pubsub_many"))
    names = {f"pubsub_{number}" for number in range(2100)}
    for name in names:
        server.subscriber.create_subscription(
            name=server.subscription(name), topic=server.topic("pubsub_many"), timeout=LIMIT
        )
    async with opened(server) as backend:
        before = server.calls().get("ListSubscriptions", 0)
        assert {info.ref.name for info in await backend.discover()} == names
        assert server.calls()["ListSubscriptions"] - before == 3


# -- taking ----------------------------------------------------------------------------------------------------------


async def test_while_nobody_asks_the_service_sends_nothing(server: PubsubServer) -> None:
    server.declare("pubsub_q")
    async with opened(server, times=STEADY) as backend:
        consumer = await backend.consumer(ref())
        for number in range(5):
            server.publish("pubsub_q", b"%d" % number)
        assert (server.held("pubsub_q"), server.ready("pubsub_q")) == (0, 5)
        first = await take(consumer)
        await until(lambda: server.streams() == 0)
        assert await first.ack()
        second = await take(consumer)
        await until(lambda: server.streams() == 0)
        assert (server.held("pubsub_q"), server.ready("pubsub_q")) == (1, 3)
        assert await second.ack()


async def test_pausing_gives_back_at_once_what_was_not_handed_out(
    server: PubsubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pubsub_stream, "FINISH_SECS", LIMIT)  # a service that is slow is waited for
    server.declare("pubsub_q")
    async with opened(server) as backend:
        consumer = await backend.consumer(ref())
        waiting = asyncio.create_task(consumer.next())
        await until(lambda: server.streams() == 1)
        server.publish("pubsub_q", b"x")
        await until(lambda: server.held("pubsub_q") == 1)
        await stopped(waiting)
        if not waiting.cancelled():  # it was handed out just before
            await waiting.result().requeue()
        await consumer.pause()
        assert (server.held("pubsub_q"), server.ready("pubsub_q"), server.streams()) == (0, 1, 0)


async def test_a_message_of_nine_megabytes_passes(server: PubsubServer) -> None:
    server.declare("pubsub_q")
    body = b"x" * 9_000_000
    async with opened(server) as backend:
        await backend.publish(ref(), body)
        delivery = await take(await backend.consumer(ref()))
        assert delivery.body == body
        assert await delivery.ack()


async def test_attempts_travel_in_an_attribute(server: PubsubServer) -> None:
    server.declare("pubsub_q")
    async with opened(server) as backend:
        consumer = await backend.consumer(ref())
        for value, attempts in (("2", 2), ("many", 0), ("-1", 0)):
            server.publish("pubsub_q", b"x", {"attempt": value, "other": "kept"})
            delivery = await take(consumer)
            assert (delivery.attempts, delivery.headers["other"]) == (attempts, "kept")
            assert await delivery.ack()


async def test_hundreds_of_idle_queues_do_not_delay_an_ack(server: PubsubServer) -> None:
    """A connection takes 100 calls at a time; streams that stand use up theirs."""
    names = [f"pubsub_{number}" for number in range(230)]
    for name in names:
        server.declare(name)
    async with opened(server) as backend:
        waiting = {
            name: asyncio.create_task((await backend.consumer(ref(name))).next(), name=name) for name in names
        }
        await until(lambda: server.streams() == len(names))
        for name in (names[0], names[-1]):
            server.publish(name, b"x")
            delivery = await asyncio.wait_for(waiting.pop(name), LIMIT)
            assert await delivery.ack()
        for task in waiting.values():
            await stopped(task)
        await until(lambda: server.streams() == 0)


# -- holding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exactly_once", [False, True])
async def test_a_message_is_held_for_as_long_as_its_run_lives(
    server: PubsubServer, exactly_once: bool
) -> None:
    server.declare("pubsub_q", exactly_once=exactly_once)
    async with opened(server, times=STEADY) as backend:
        server.publish("pubsub_q", b"long")
        consumer = await backend.consumer(ref())
        delivery = await take(consumer)
        before, since = server.calls().get("ModifyAckDeadline", 0), time.monotonic()
        other = asyncio.create_task(consumer.next())
        await asyncio.wait(
            (other,), timeout=16
        )  # more than the ten seconds of the stream, and than its lease
        assert not other.done()
        assert not delivery.lost.is_set()
        renewals = server.calls()["ModifyAckDeadline"] - before
        most = 2 + (time.monotonic() - since) / (STEADY.lease_secs / 2)
        assert 2 <= renewals <= most, "one renewal every half lease"
        assert await delivery.ack()
        assert (server.held("pubsub_q"), server.ready("pubsub_q")) == (0, 0)
        renewing = delivery._renewing  # type: ignore[attr-defined]
        await until(renewing.done)  # an acknowledged message is not renewed
        await stopped(other)


async def test_an_exactly_once_subscription_tells_that_a_hold_is_lost(server: PubsubServer) -> None:
    server.declare("pubsub_q", exactly_once=True)
    async with opened(server, times=QUICK) as backend:
        server.publish("pubsub_q", b"x")
        delivery = await take(await backend.consumer(ref()))
        server.expire("pubsub_q")
        await asyncio.wait_for(delivery.lost.wait(), LIMIT)  # at the next renewal
        assert await delivery.ack() is False
        await until(lambda: server.ready("pubsub_q") == 1)


async def test_an_exactly_once_subscription_tells_that_an_ack_came_too_late(server: PubsubServer) -> None:
    server.declare("pubsub_q", exactly_once=True)
    async with opened(server) as backend:  # whose next renewal is a minute away
        server.publish("pubsub_q", b"x")
        delivery = await take(await backend.consumer(ref()))
        server.expire("pubsub_q")
        before = server.calls().get("Acknowledge", 0)
        assert await delivery.ack() is False
        assert server.calls()["Acknowledge"] == before + 1, "asked once: it cannot get better"
        assert delivery.lost.is_set()
        assert server.ready("pubsub_q") == 1


async def test_a_message_that_is_held_here_and_comes_again_is_lost_to_its_first_holder(
    server: PubsubServer,
) -> None:
    """Else the second copy would be taken for a spare one, and its ack would be the message's end."""
    server.declare("pubsub_q")
    async with opened(server) as backend:
        consumer = await backend.consumer(ref())
        server.publish("pubsub_q", b"x")
        first = await take(consumer)
        assert not first.redelivered
        server.expire("pubsub_q")
        second = await take(consumer)
        assert first.lost.is_set()
        assert second.redelivered
        assert await first.ack() is False
        assert await first.requeue() is False
        assert server.held("pubsub_q") == 1
        assert await second.ack()


async def test_the_same_bytes_published_anew_are_no_redelivery(server: PubsubServer) -> None:
    server.declare("pubsub_q")
    async with opened(server) as backend:
        consumer = await backend.consumer(ref())
        for _ in range(2):
            server.publish("pubsub_q", b"same")
            delivery = await take(consumer)
            assert not delivery.redelivered
            assert await delivery.ack()


async def test_a_delay_keeps_the_message_away_also_when_this_account_is_closed(server: PubsubServer) -> None:
    server.declare("pubsub_q")
    async with opened(server, times=STEADY) as backend:
        server.publish("pubsub_q", b"x")
        assert await (await take(await backend.consumer(ref()))).requeue(delay_secs=9.2)
    assert (server.held("pubsub_q"), server.ready("pubsub_q")) == (1, 0)
    await until(lambda: server.ready("pubsub_q") == 1)


async def test_a_daemon_that_slept_past_its_lease_knows_that_it_lost_the_message(
    server: PubsubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pubsub_delivery, "LATE_SECS", 0.5)  # should it fall asleep in the middle of a renewal
    server.declare("pubsub_q")
    async with opened(server, times=QUICK) as backend:
        server.publish("pubsub_q", b"x")
        delivery = await take(await backend.consumer(ref()))
        await delivery._renewed.wait()  # type: ignore[attr-defined]
        subprocess.run(["sleep", "4"], check=True)  # the loop stands still
        await asyncio.wait_for(delivery.lost.wait(), LIMIT)
        assert delivery.superseded
        assert await delivery.ack() is False


async def test_a_daemon_that_slept_while_the_service_was_away_knows_it_too(
    server: PubsubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pubsub_delivery, "LATE_SECS", 0.5)
    server.declare("pubsub_q")
    async with opened(server, times=QUICK) as backend:
        server.publish("pubsub_q", b"x")
        delivery = await take(await backend.consumer(ref()))
        await delivery._renewed.wait()  # type: ignore[attr-defined]
        server.fail(ModifyAckDeadline="UNAVAILABLE")
        renewed = server.calls()["ModifyAckDeadline"]
        await until(lambda: server.calls()["ModifyAckDeadline"] > renewed)
        subprocess.run(["sleep", "3"], check=True)
        await asyncio.wait_for(delivery.lost.wait(), LIMIT)
        assert delivery.superseded


# -- what it costs ---------------------------------------------------------------------------------------------------


def test_google_library_is_not_loaded_before_an_account_is_opened() -> None:
    """It takes 50 MB and most of a second, and a daemon without Pub/Sub has no use for it."""
    code = """
import sys
import runner.cli.main
from runner.queues import pubsub, pubsub_account
pubsub.PubsubBackend(pubsub_account.PubsubAccount(label="x", project="x", emulator="127.0.0.1:1"))
sys.exit(" ".join(name for name in ("grpc", "google.pubsub_v1") if name in sys.modules) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
