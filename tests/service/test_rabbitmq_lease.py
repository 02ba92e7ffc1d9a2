"""Leases on a real broker: handed over, renewed, ended, given back; and what they cost those who need none."""

from __future__ import annotations

import asyncio

import pytest
import structlog
import structlog.testing

from runner.config import RmqLease
from runner.queues import base, rabbitmq_channels, rabbitmq_lease
from tests.service.rabbitmq_kit import LIMIT, name, ref, take, until
from tests.service.rabbitmq_lease_kit import (
    ARGUMENTS,
    LONG,
    TERMS,
    _patient,
    depth,
    either_type,
    host,
    in_thread,
    lease_name,
    leased,
    leases,
    peek,
    reaches,
    steady,
)

__all__ = ["_patient", "name", "steady"]  # fixtures

pytestmark = pytest.mark.service

BODY = b'{"experiment": {}}'


@either_type
async def test_a_message_held_for_long_moves_to_its_lease_and_leaves_nothing_behind(rabbitmq, name, kind):
    rabbitmq.declare(name, durable=True, arguments=ARGUMENTS[kind])
    rabbitmq.publish(name, BODY, persistent=True, headers={"mine": "kept"})
    async with host(rabbitmq, terms=LONG, owner="me") as one:
        held = await one.take(name)
        await held.began(1)
        where = await leased(rabbitmq, name, BODY)
        properties, body = peek(rabbitmq, where)
        assert body == BODY
        assert (properties.delivery_mode, properties.expiration) == (2, "600000")
        assert properties.headers["mine"] == "kept"
        assert (properties.headers["owner"], properties.headers["attempt"]) == ("me", 1)
        facts = rabbitmq.api("GET", f"/api/queues/%2F/{where}")[1]
        assert (facts["durable"], facts["type"]) == (True, kind)
        assert facts["arguments"]["x-expires"] == 6_000_000
        assert facts["arguments"]["x-dead-letter-routing-key"] == name
        # Its channel does not hold it any more: closing all connections brings nothing back.
        one.way.cut()
        await asyncio.sleep(0.3)
        assert depth(rabbitmq, name) == 0
        assert not held.lost.is_set()
        assert await held.ack() is True
        assert await held.ack() is False
        assert (depth(rabbitmq, where), depth(rabbitmq, name)) == (None, 0)


@either_type
async def test_a_lease_is_renewed_for_as_long_as_it_takes(rabbitmq, name, kind, steady):
    rabbitmq.declare(name, durable=True, arguments=ARGUMENTS[kind])
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq) as one, host(rabbitmq) as other:
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        await other.gets_nothing(name, 1.25 * TERMS.secs)
        assert not held.lost.is_set()
        await until(lambda: peek(rabbitmq, where)[0].headers["seq"] >= 3)
        assert await held.ack() is True
        assert depth(rabbitmq, where) is None


async def test_a_short_run_costs_no_connection_and_no_queue(rabbitmq, name):
    rabbitmq.declare(name)
    rabbitmq.publish(name, b"1", b"2")
    async with host(rabbitmq, terms=RmqLease()) as one:
        consumer = await one.backend.consumer(ref(one.backend, name))
        for number in (1, 2):
            delivery = await take(consumer)
            await delivery.began(1)
            assert await delivery.ack() is True
            assert one.way.connections == 1, number
        assert one.backend._leases["/"]._waiting == set()
        assert one.backend._leases["/"]._moved == {}


async def test_without_leases_everything_stays_on_its_channel(rabbitmq, name):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY)
    async with host(rabbitmq, terms=None) as one:
        held = await one.take(name)
        await held.began(1)
        await asyncio.sleep(1.0)
        assert depth(rabbitmq, lease_name(name, BODY)) is None
        assert await held.requeue()
        again = await one.take(name)
        assert (again.redelivered, again.attempts) == (True, 0)
        await again.began(2)
        assert depth(rabbitmq, lease_name(name, BODY)) is None
        assert await again.ack()
        assert one.way.connections == 1


@either_type
async def test_given_back_from_its_lease_it_is_there_at_once_with_its_attempts(rabbitmq, name, kind):
    rabbitmq.declare(name, durable=True, arguments=ARGUMENTS[kind])
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq, terms=LONG) as one, host(rabbitmq, terms=LONG) as other:
        held = await one.take(name)
        await held.began(1)
        where = await leased(rabbitmq, name, BODY)
        assert await held.requeue() is True
        assert depth(rabbitmq, where) is None
        again = await other.take(name)
        assert (again.body, again.redelivered, again.attempts) == (BODY, True, 1)
        assert await again.ack() is True
        assert depth(rabbitmq, name) == 0


@either_type
@pytest.mark.parametrize("ending", ["give_back", "finish"])
async def test_a_copy_that_somebody_looks_at_just_then_is_waited_for(
    rabbitmq, name, kind, ending, monkeypatch
):
    """To take the queue for empty, and remove it, would remove the message."""
    rabbitmq.declare(name, durable=True, arguments=ARGUMENTS[kind])
    rabbitmq.publish(name, BODY, persistent=True)
    loop, tried = asyncio.get_running_loop(), asyncio.Event()
    real = getattr(rabbitmq_lease, ending)

    async def end(*args):
        if not (done := await real(*args)):
            loop.call_soon_threadsafe(tried.set)
        return done

    monkeypatch.setattr(rabbitmq_lease, ending, end)
    async with host(rabbitmq, terms=LONG) as one:
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        with rabbitmq.channel() as looks:
            assert looks.basic_get(where)[0] is not None
            ended = asyncio.create_task(held.requeue() if ending == "give_back" else held.ack())
            await asyncio.wait_for(tried.wait(), LIMIT)
        assert await asyncio.wait_for(ended, LIMIT) is True
        await reaches(rabbitmq, name, 1 if ending == "give_back" else 0)
        await reaches(rabbitmq, where, None)


async def test_an_attempt_that_was_none_is_not_told(rabbitmq, name):
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq, terms=LONG) as one:
        held = await one.take(name)
        await held.began(1)
        await leased(rabbitmq, name, BODY)
        held.attempts = 0  # the runner was told to stop
        assert await held.requeue() is True
        again = await one.take(name)
        assert (again.redelivered, again.attempts) == (True, 0)
        assert await again.ack()


async def test_a_failed_attempt_is_told_to_other_hosts_however_short_it_was(rabbitmq, name):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY)
    async with host(rabbitmq, terms=RmqLease()) as one, host(rabbitmq, terms=RmqLease()) as other:
        for number, who in enumerate((one, other, one), start=1):
            delivery = await who.take(name)
            assert (delivery.attempts, delivery.redelivered) == (number - 1, number > 1)
            await delivery.began(number)
            assert await delivery.requeue() is True
        last = await other.take(name)
        assert last.attempts == 3
        assert await last.reject() is True
        assert depth(rabbitmq, lease_name(name, BODY)) is None


async def test_a_put_back_tells_of_no_attempt_and_opens_nothing(rabbitmq, name):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY)
    async with host(rabbitmq, terms=RmqLease()) as one:
        for number in range(4):
            delivery = await one.take(name)
            assert (delivery.attempts, delivery.redelivered) == (0, number > 0)
            assert await delivery.requeue() is True
        assert one.way.connections == 1
        assert depth(rabbitmq, lease_name(name, BODY)) is None


async def test_what_others_have_tried_is_leased_before_its_work_starts(rabbitmq, name):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY)
    async with host(rabbitmq, terms=RmqLease()) as one, host(rabbitmq, terms=RmqLease()) as other:
        await one.take(name)
        one.die()
        again = await other.take(name)
        assert again.redelivered
        await again.began(1)
        properties, _ = peek(rabbitmq, lease_name(name, BODY))
        assert properties.headers["attempt"] == 1
        await again.began(2)  # an attempt further, in the same lease
        properties, _ = peek(rabbitmq, lease_name(name, BODY))
        assert properties.headers["attempt"] == 2
        assert await again.ack() is True
        assert depth(rabbitmq, lease_name(name, BODY)) is None


async def test_the_same_bytes_published_twice_are_two_leases(rabbitmq, name, steady):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY, BODY)
    async with host(rabbitmq) as one, host(rabbitmq) as other:
        first, second = await one.take(name), await other.take(name)
        await reaches(rabbitmq, lease_name(name, BODY), 2)
        await asyncio.sleep(TERMS.secs + 2)
        assert not first.lost.is_set()
        assert not second.lost.is_set()
        assert await first.ack() is True
        await reaches(rabbitmq, lease_name(name, BODY), 1)  # for a moment none waits: it is being renewed
        assert await second.ack() is True
        assert depth(rabbitmq, lease_name(name, BODY)) is None


@pytest.mark.timeout(
    300
)  # thirty lease queues come and go, each written to a disk that other tests use as well
async def test_ending_while_the_hand_over_is_on_its_way(rabbitmq, name):
    rabbitmq.declare(name)
    async with host(rabbitmq, terms=RmqLease(secs=600, hand_over_secs=0.05)) as one:
        consumer = await one.backend.consumer(ref(one.backend, name))
        for number in range(30):
            body = b"%d" % number
            rabbitmq.publish(name, body)
            delivery = await take(consumer)
            await asyncio.sleep(0.04 + 0.001 * number)
            if number % 2:
                assert await delivery.requeue() is True
                delivery = await take(consumer)
                assert (delivery.body, delivery.redelivered) == (body, True)
            assert await delivery.ack() is True
            assert depth(rabbitmq, lease_name(name, body)) is None
        assert depth(rabbitmq, name) == 0


async def test_closing_the_account_gives_back_what_is_leased(rabbitmq, name, monkeypatch):
    monkeypatch.setattr("runner.queues.rabbitmq.CLOSE_SECS", LIMIT)
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq, terms=LONG) as one:
        held = await one.take(name)
        await leased(rabbitmq, name, BODY)
    assert held.lost.is_set()
    assert await held.ack() is False
    assert depth(rabbitmq, lease_name(name, BODY)) is None
    async with host(rabbitmq) as other:
        assert await (await other.take(name)).ack() is True


async def test_a_deleted_queue_is_seen_and_its_lease_goes_with_the_run(rabbitmq, name):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY)
    async with host(rabbitmq, terms=LONG) as one:
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        rabbitmq.delete(name)
        assert await one.backend.existence(held.queue) is base.Existence.GONE
        assert await held.ack() is True
        assert depth(rabbitmq, where) is None


async def test_giving_back_into_a_deleted_queue_ends_the_lease(rabbitmq, name):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY)
    async with host(rabbitmq, terms=LONG) as one:
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        rabbitmq.delete(name)
        assert isinstance(await held.requeue(), bool)
        assert depth(rabbitmq, where) is None


async def test_lease_queues_are_not_discovered(rabbitmq, name):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY)
    async with host(rabbitmq, terms=LONG) as one:
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        assert where not in [info.ref.name for info in await one.backend.discover()]
        assert where in leases(rabbitmq)
        assert await held.ack()


async def test_a_user_who_may_not_declare_keeps_holding(rabbitmq, name):
    rabbitmq.add_user(name, "secret", tags="management")
    least = {"configure": "^$", "write": "^$", "read": f"^{name}$"}
    rabbitmq.api("PUT", f"/api/permissions/%2F/{name}", least)
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, b"1", b"2", persistent=True)
    with structlog.testing.capture_logs() as told:
        await held_without_leases(rabbitmq, name, told)
    assert warnings(told) == 1


def warnings(told):
    event = "long runs cannot be leased and keep holding"
    return sum(each["event"].startswith(event) and each["log_level"] == "warning" for each in list(told))


async def held_without_leases(rabbitmq, name, told):
    async with host(rabbitmq, terms=TERMS, user=f"{name}:secret") as one:
        first, second = await one.take(name), await one.take(name)
        await until(lambda: warnings(told) > 0)
        assert not first.lost.is_set()
        assert not {lease_name(name, b"1"), lease_name(name, b"2")} & set(leases(rabbitmq))
        assert await first.ack() is True
        assert await one.backend.existence(first.queue) is base.Existence.HERE  # and so the ack was heard
        one.way.cut()
        await asyncio.wait_for(second.lost.wait(), LIMIT)
        again = await one.take(name)
        assert (again.body, again.redelivered) == (b"2", True)
        await again.began(1)
        assert await again.ack() is True


async def test_the_least_permissions_are_enough(rabbitmq, name):
    rabbitmq.add_user(name, "secret", tags="management")
    least = {
        "configure": r"^studio-runner\.lease\.",
        "write": r"^amq\.default$",
        "read": rf"^({name}$|studio-runner\.lease\.)",
    }
    rabbitmq.api("PUT", f"/api/permissions/%2F/{name}", least)
    rabbitmq.declare(name, durable=True)
    rabbitmq.publish(name, BODY, persistent=True)
    async with host(rabbitmq, terms=LONG, user=f"{name}:secret") as one:
        first = await one.take(name)
        await leased(rabbitmq, name, BODY)
        assert await first.requeue() is True
        again = await one.take(name)
        await again.began(1)
        await reaches(rabbitmq, lease_name(name, BODY), 1)
        assert await again.ack() is True
        assert depth(rabbitmq, lease_name(name, BODY)) is None


async def test_a_lease_queue_of_another_lease_time_is_replaced_when_it_is_empty(rabbitmq, name):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY)
    where = lease_name(name, BODY)
    with rabbitmq.channel() as channel:
        channel.queue_declare(where, durable=True, arguments={"x-expires": 60_000})
    async with host(rabbitmq, terms=LONG) as one:
        held = await one.take(name)
        await leased(rabbitmq, name, BODY)
        assert rabbitmq.api("GET", f"/api/queues/%2F/{where}")[1]["arguments"]["x-expires"] == 6_000_000
        assert await held.ack() is True


async def test_a_lease_queue_that_an_operator_deletes_is_made_again(rabbitmq, name, steady):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY)
    async with host(rabbitmq) as one:
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        rabbitmq.delete(where)
        await leased(rabbitmq, name, BODY)
        assert not held.lost.is_set()
        assert await held.ack() is True


async def test_what_is_short_of_its_limit_is_handed_over_sooner(rabbitmq, name):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY)
    async with host(rabbitmq, terms=RmqLease()) as one:
        held = await one.take(name)
        await in_thread(one.backend, lambda: one.backend._leases["/"].learn_limit(1.0))
        await leased(rabbitmq, name, BODY)
        assert await held.ack() is True


@pytest.mark.parametrize(
    ("version", "quorum", "passed"),
    [((4, 3, 1), True, True), ((4, 3, 1), False, False), ((3, 10, 8), True, False), ((), True, False)],
)
def test_brokers_that_heed_it_are_asked_for_more_time(version, quorum, passed):
    assert bool(rabbitmq_channels.consume_arguments(version, quorum=quorum)) == passed


async def test_the_time_that_is_asked_for_reaches_the_broker(rabbitmq, name, monkeypatch):
    """As if this broker were one that heeds it."""
    monkeypatch.setattr(rabbitmq_channels, "CONSUMER_TIMEOUT_FROM", (3,))
    rabbitmq.declare(name, durable=True, arguments=ARGUMENTS["quorum"])
    rabbitmq.publish(name, b"1", persistent=True)

    def asked() -> list[object]:
        consumers = rabbitmq.api("GET", "/api/consumers/%2F")[1]
        return [each["arguments"] for each in consumers if each["queue"]["name"] == name]

    async with host(rabbitmq) as one:
        consumer = await one.backend.consumer(ref(one.backend, name))
        assert await (await take(consumer)).ack()
        await until(lambda: one.backend._is_quorum("/", name))  # which is asked for beside the first message
        waiting = asyncio.create_task(consumer.next())
        await until(lambda: asked() == [{"x-consumer-timeout": rabbitmq_channels.CONSUMER_TIMEOUT_MS}])
        rabbitmq.publish(name, b"2", persistent=True)
        assert await (await asyncio.wait_for(waiting, LIMIT)).ack()


async def test_the_version_of_the_broker_is_known(rabbitmq, name):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY)
    async with host(rabbitmq) as one:
        assert await (await one.take(name)).ack()
        version = rabbitmq.api("GET", "/api/overview")[1]["rabbitmq_version"]
        assert ".".join(map(str, one.backend._consuming["/"].broker_version)) == version


async def test_a_reclaimed_lease_is_held_on(rabbitmq, name, steady):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY)
    async with host(rabbitmq, terms=LONG, owner="me") as one, host(rabbitmq, terms=TERMS, owner="me") as two:
        held = await one.take(name)
        await held.began(1)
        where = await leased(rabbitmq, name, BODY)
        one.die()
        again = await two.backend.reclaim(ref(two.backend, name), BODY)
        assert again is not None
        assert (again.body, again.redelivered, again.attempts) == (BODY, True, 1)
        await again.began(2)
        await until(lambda: peek(rabbitmq, where)[0].headers["attempt"] == 2)
        assert peek(rabbitmq, where)[0].expiration == str(round(TERMS.secs * 1000))
        await asyncio.sleep(TERMS.secs + 2)
        await reaches(rabbitmq, where, 1)  # for a moment none waits: it is being renewed
        assert not again.lost.is_set()
        assert await two.backend.reclaim(ref(two.backend, name), BODY) is None  # it is held
        assert await again.ack() is True
        assert depth(rabbitmq, where) is None


async def test_leases_of_others_are_not_reclaimed(rabbitmq, name):
    rabbitmq.declare(name)
    rabbitmq.publish(name, BODY)
    async with host(rabbitmq, terms=LONG, owner="me") as one, host(rabbitmq, owner="you") as two:
        assert await two.backend.reclaim(ref(two.backend, name), BODY) is None
        held = await one.take(name)
        where = await leased(rabbitmq, name, BODY)
        assert await two.backend.reclaim(ref(two.backend, name), BODY) is None
        await reaches(rabbitmq, where, 1)  # what the look had got is put back without a word
        assert await held.ack() is True


def test_the_name_is_that_of_every_runner():
    assert lease_name("rmq_a", b"{}") == "studio-runner.lease.7a2e38d7214c03a666bf165346b41852"
