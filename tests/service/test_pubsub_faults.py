"""What the Pub/Sub backend survives: cuts, silence, refusals, a service that is away."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from runner import errors
from runner.queues import base, pubsub_delivery
from runner.queues.pubsub_account import PubsubTimes
from tests.service.pubsub_kit import LIMIT, QUICK, STEADY, opened, ref, server, stopped, take, until, way

if TYPE_CHECKING:
    from tests.servers.proxy import Proxy
    from tests.servers.pubsub import PubsubServer

__all__ = ["server", "way"]  # fixtures

pytestmark = pytest.mark.service


async def test_a_cut_loses_nothing(server: PubsubServer, way: Proxy) -> None:
    server.declare("pubsub_q")
    async with opened(server, port=way.port) as backend:
        consumer = await backend.consumer(ref())
        server.publish("pubsub_q", b"held")
        held = await take(consumer)
        for number in range(5):
            waiting = asyncio.create_task(consumer.next())
            await until(lambda: server.streams() >= 1)
            assert way.cut() >= 1
            server.publish("pubsub_q", b"%d" % number)
            delivery = await asyncio.wait_for(waiting, LIMIT)
            assert await delivery.ack()
        assert not held.lost.is_set()
        assert await held.ack()
        assert server.ready("pubsub_q") == 0


async def test_a_service_that_is_away_at_the_start_is_used_when_it_comes(
    server: PubsubServer, way: Proxy
) -> None:
    server.declare("pubsub_q")
    way.refuse()
    async with opened(server, port=way.port) as backend:
        waiting = asyncio.create_task((await backend.consumer(ref())).next())
        with pytest.raises(errors.QueueUnavailable):
            await asyncio.wait_for(backend.discover(), LIMIT)
        with pytest.raises(errors.QueueUnavailable):
            await asyncio.wait_for(backend.publish(ref(), b"x"), LIMIT)
        assert await backend.existence(ref()) is base.Existence.UNKNOWN
        way.listen()
        server.publish("pubsub_q", b"x")
        assert await (await asyncio.wait_for(waiting, LIMIT)).ack()
        assert [info.ref for info in await backend.discover()] == [ref()]


async def test_an_outage_of_half_a_lease_is_survived(
    server: PubsubServer, way: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.declare("pubsub_q", exactly_once=True)
    async with opened(server, times=PubsubTimes(lease_secs=24, call_secs=2), port=way.port) as backend:
        server.publish("pubsub_q", b"x")
        delivery = await take(await backend.consumer(ref()))
        failed = asyncio.Event()
        client = delivery._client  # type: ignore[attr-defined]
        hold = client.hold

        async def held(*arguments: Any) -> None:
            try:
                await hold(*arguments)
            except Exception:
                failed.set()
                raise

        monkeypatch.setattr(client, "hold", held)
        way.refuse()
        way.cut()
        await asyncio.wait_for(failed.wait(), LIMIT)  # the renewal, twelve seconds later
        assert await backend.existence(ref()) is base.Existence.UNKNOWN
        renewed = server.calls()["ModifyAckDeadline"]
        way.listen()
        await until(lambda: server.calls()["ModifyAckDeadline"] > renewed)
        assert not delivery.lost.is_set()
        assert await delivery.ack()


async def test_a_longer_outage_loses_the_hold_and_the_message_comes_again(
    server: PubsubServer, way: Proxy
) -> None:
    server.declare("pubsub_q")
    async with opened(server, times=STEADY, port=way.port) as backend:
        consumer = await backend.consumer(ref())
        server.publish("pubsub_q", b"x")
        first = await take(consumer)
        way.refuse()
        way.cut()
        await asyncio.wait_for(first.lost.wait(), LIMIT)
        assert not first.superseded, "an outage kills no run"
        await until(lambda: server.ready("pubsub_q") == 1)
        way.listen()
        again = await take(consumer)
        assert again.redelivered
        assert await again.ack()


async def test_a_silent_connection_is_noticed(server: PubsubServer, way: Proxy) -> None:
    """Half-open: no answer and no reset. The keepalive ends it after ten seconds, and a new one is made."""
    server.declare("pubsub_q")
    async with opened(server, times=STEADY, port=way.port) as backend:
        waiting = asyncio.create_task((await backend.consumer(ref())).next())
        await until(lambda: server.streams() == 1)
        way.blackhole()
        made = way.connections
        server.publish("pubsub_q", b"x")
        await until(lambda: way.connections > made)
        assert not waiting.done()
        way.resume()
        assert await (await asyncio.wait_for(waiting, LIMIT)).ack()


async def test_calls_to_a_silent_service_end_in_time(server: PubsubServer, way: Proxy) -> None:
    server.declare("pubsub_q")
    async with opened(server, times=PubsubTimes(call_secs=1), port=way.port) as backend:
        server.publish("pubsub_q", b"x")
        consumer = await backend.consumer(ref())
        await take(consumer)
        way.blackhole()
        async with asyncio.timeout(LIMIT):
            with pytest.raises(errors.QueueUnavailable, match="DEADLINE_EXCEEDED"):
                await backend.discover()
            with pytest.raises(errors.QueueUnavailable, match="DEADLINE_EXCEEDED"):
                await backend.publish(ref(), b"x")
            assert await backend.existence(ref()) is base.Existence.UNKNOWN
            await consumer.close()
            await backend.aclose()
        way.resume()


async def test_streams_that_the_service_ends_are_opened_again(server: PubsubServer) -> None:
    server.declare("pubsub_q")
    async with opened(server) as backend:
        waiting = asyncio.create_task((await backend.consumer(ref())).next())
        await until(lambda: server.streams() == 1)
        server.fail(StreamingPull="UNAVAILABLE")
        await until(lambda: server.streams() == 0)
        server.fail()
        server.publish("pubsub_q", b"x")
        assert await (await asyncio.wait_for(waiting, LIMIT)).ack()


async def test_streams_that_end_without_a_word_are_not_opened_in_a_loop(server: PubsubServer) -> None:
    server.declare("pubsub_q")
    async with opened(server) as backend:
        server.fail(StreamingPull="ENDED")
        waiting = asyncio.create_task((await backend.consumer(ref())).next())
        before = server.calls().get("StreamingPull", 0)
        await asyncio.sleep(1)
        assert server.calls()["StreamingPull"] - before < 10  # hundreds, without a pause between them
        server.fail()
        server.publish("pubsub_q", b"x")
        assert await (await asyncio.wait_for(waiting, LIMIT)).ack()


async def test_an_ack_that_the_service_cannot_take_now_is_sent_again(server: PubsubServer) -> None:
    server.declare("pubsub_q")
    async with opened(server, times=STEADY) as backend:
        server.publish("pubsub_q", b"x")
        delivery = await take(await backend.consumer(ref()))
        server.fail(Acknowledge="UNAVAILABLE")
        acking = asyncio.create_task(delivery.ack())
        await until(lambda: server.calls().get("Acknowledge", 0) > 1)
        renewed = server.calls()["ModifyAckDeadline"]
        await until(lambda: server.calls()["ModifyAckDeadline"] > renewed)  # held beside it
        assert not acking.done()
        server.fail()
        assert await asyncio.wait_for(acking, LIMIT) is True
        assert (server.held("pubsub_q"), server.ready("pubsub_q")) == (0, 0)


async def test_an_ack_that_is_never_taken_is_given_up(
    server: PubsubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pubsub_delivery, "TELL_SECS", 2.0)
    server.declare("pubsub_q")
    async with opened(server, times=QUICK) as backend:
        server.publish("pubsub_q", b"x")
        delivery = await take(await backend.consumer(ref()))
        server.fail(Acknowledge="INTERNAL")
        assert await asyncio.wait_for(delivery.ack(), LIMIT) is False
        assert delivery.lost.is_set()
        await until(lambda: server.ready("pubsub_q") == 1)  # it is not renewed for ever


async def test_cancelling_an_ack_does_not_undo_it(server: PubsubServer) -> None:
    server.declare("pubsub_q")
    async with opened(server) as backend:
        server.publish("pubsub_q", b"x")
        delivery = await take(await backend.consumer(ref()))
        acking = asyncio.create_task(delivery.ack())
        await asyncio.sleep(0)
        acking.cancel()
        await until(lambda: server.held("pubsub_q") == 0)
        assert server.ready("pubsub_q") == 0


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNAUTHENTICATED"])
async def test_a_refusal_is_waited_out(server: PubsubServer, code: str) -> None:
    server.declare("pubsub_q")
    server.fail(all=code)
    async with opened(server) as backend:
        with pytest.raises(errors.QueueUnavailable, match=code):
            await backend.discover()
        assert await backend.existence(ref()) is base.Existence.UNKNOWN
        before = server.calls().get("StreamingPull", 0)
        waiting = asyncio.create_task((await backend.consumer(ref())).next())
        await until(lambda: server.calls().get("StreamingPull", 0) > before)
        server.fail()
        server.publish("pubsub_q", b"x")
        assert await (await asyncio.wait_for(waiting, LIMIT)).ack()


async def test_losing_the_right_to_look_is_no_proof_that_a_queue_is_gone(server: PubsubServer) -> None:
    async with opened(server) as backend:
        assert await backend.existence(ref("pubsub_none")) is base.Existence.GONE
        server.fail(GetSubscription="PERMISSION_DENIED")
        assert await backend.existence(ref("pubsub_none")) is base.Existence.UNKNOWN


async def test_a_queue_deleted_while_its_message_is_held(server: PubsubServer) -> None:
    server.declare("pubsub_q")
    async with opened(server, times=QUICK) as backend:
        server.publish("pubsub_q", b"x")
        delivery = await take(await backend.consumer(ref()))
        server.delete("pubsub_q")
        await asyncio.wait_for(delivery.lost.wait(), LIMIT)
        assert await delivery.ack() is False
        assert await backend.existence(ref()) is base.Existence.GONE


async def test_closing_ends_every_wait(server: PubsubServer) -> None:
    server.declare("pubsub_q")
    async with opened(server) as backend:
        waiting = asyncio.create_task((await backend.consumer(ref())).next())
        await until(lambda: server.streams() == 1)
        await backend.aclose()
        with pytest.raises(errors.QueueUnavailable):
            await asyncio.wait_for(waiting, LIMIT)
        with pytest.raises(errors.QueueUnavailable):
            await backend.discover()
        assert await backend.existence(ref()) is base.Existence.UNKNOWN
        await until(lambda: server.streams() == 0)


async def test_a_project_without_work_costs_no_requests(server: PubsubServer) -> None:
    server.declare("pubsub_q")
    async with opened(server, times=QUICK) as backend:
        waiting = asyncio.create_task((await backend.consumer(ref())).next())
        await until(lambda: server.streams() == 1)
        before = server.calls()
        await asyncio.wait((waiting,), timeout=3)
        assert server.calls() == before
        await stopped(waiting)
