"""How long a message that does not fit is held, and how rarely it is delivered."""

from __future__ import annotations

import time

import pytest

from runner.daemon import queuestate
from runner.daemon.queuestate import QueueState, keeping
from runner.queues.base import Delivery, QueueRef
from runner.queues.memory import MemoryBackend
from runner.request.model import Resources

WEEK_SECS = 7 * 24 * 3600.0
REF = QueueRef(account="a", name="rmq_a")


class Message(Delivery):
    """Nothing is done with it here."""

    async def ack(self) -> bool:
        return True

    async def requeue(self, delay_secs: float = 0) -> bool:
        return True

    async def extend(self, secs: float) -> None:
        return


def state() -> QueueState:
    return QueueState(ref=REF, backend=MemoryBackend())


@pytest.mark.parametrize("hosts", [1, 4])
async def test_a_week_of_crowding_costs_few_deliveries_where_the_broker_counts_them(hosts):
    """By turns on hosts that have no room for it."""
    states = [state() for _ in range(hosts)]
    message = Message(queue=REF, body=b"big")
    passed = 0.0
    while passed < WEEK_SECS:
        host = states[message.deliveries % hosts]
        held = host.park_secs(message)
        assert queuestate.PARK_SECS <= held <= queuestate.LAST_PARK_SECS
        passed += held + host.put_back(message, Resources(cpus=2))
        message.deliveries += 1
    assert message.deliveries <= 15


async def test_where_nobody_counts_it_is_offered_to_other_hosts_every_quarter_of_an_hour():
    host, message = state(), Message(queue=REF, body=b"big")
    held = 0.0
    for _ in range(50):
        held = host.park_secs(message)
        rest = host.put_back(message, Resources(cpus=2))
        assert rest == held * queuestate.REST
    assert held == queuestate.LAST_PARK_SECS
    host.found_room(message.digest)
    assert host.park_secs(message) == queuestate.PARK_SECS


@pytest.mark.parametrize("hosts", [1, 4])
async def test_what_no_host_can_run_is_not_delivered_until_its_broker_drops_it(hosts):
    """A queue that counts deliveries, and no leases, which would begin the count anew."""
    states, message, passed = [state() for _ in range(hosts)], Message(queue=REF, body=b"huge"), 0.0
    message.drops = True
    while passed < WEEK_SECS:
        host = states[message.deliveries % hosts]
        held = host.park_secs(message) if host.crowded(message.digest).put_backs else 0.0
        passed += held + host.leave(message, "too large")
        message.deliveries += 1
    assert message.deliveries <= 18


@pytest.mark.parametrize("drops", [True, False])
async def test_a_week_without_storage_is_survived_where_the_broker_drops_what_it_has_delivered_often(drops):
    """And elsewhere such a message does not close its queue for others."""
    host, message, passed = state(), Message(queue=REF, body=b"stranded"), 0.0
    message.drops = drops
    while passed < WEEK_SECS:
        held = host.park_secs(message)
        assert held <= queuestate.LAST_PARK_SECS
        host.endpoint = ""  # that wait is over
        host.strand(message, "storage")
        rest = host.endpoint_until - time.monotonic()
        passed += held + rest
        message.deliveries += 1
        assert drops or rest <= queuestate.STRANDED_SECS
    assert (message.deliveries <= 18) is drops


async def test_a_queue_that_waits_long_for_an_endpoint_is_not_opened_for_want_of_another():
    host, message = state(), Message(queue=REF, body=b"stranded")
    message.drops, message.deliveries = True, 10
    host.strand(message, "storage")
    until = host.endpoint_until
    host.wants("other")
    assert (host.endpoint, host.endpoint_until) == ("storage", until)


async def test_what_no_host_can_run_is_held_most_of_the_time_where_nothing_is_dropped():
    host, message, held = state(), Message(queue=REF, body=b"huge"), 0.0
    for _ in range(10):
        held, rest = host.park_secs(message), host.leave(message, "too large")
        message.deliveries += 1
        assert queuestate.ELSEWHERE_SECS <= rest <= queuestate.ELSEWHERE_SECS * 1.25
    assert held == queuestate.LAST_PARK_SECS


async def test_a_queue_that_is_left_to_other_hosts_stays_so_whatever_else_of_it_ends():
    host = state()
    host.leave(Message(queue=REF, body=b"huge"), "too large")
    until = host.closed_until
    host.back_off("an attempt failed")
    host.succeeded()
    assert (host.closed_until, host.failures) == (until, 0)
    host.left_until = 0.0
    host.succeeded()
    assert host.closed_until == 0.0


async def test_a_message_that_was_put_back_is_waited_for_until_its_rest_is_over():
    host, message = state(), Message(queue=REF, body=b"big")
    assert not host.waits_for_room
    host.put_back(message, Resources(cpus=2))
    assert host.waits_for_room
    host.ask_until = time.monotonic() - 1
    assert not host.waits_for_room
    host.put_back(message, Resources(cpus=2))
    host.remember(Resources(cpus=1))  # what has started is no reason to wait for room first
    assert not host.waits_for_room


async def test_only_so_many_crowded_messages_are_remembered():
    host = state()
    for number in range(10 * queuestate.MAX_CROWDED):
        host.put_back(Message(queue=REF, body=str(number).encode()), Resources(cpus=2))
    assert len(host._crowded) == queuestate.MAX_CROWDED


def test_room_is_kept_a_quarter_of_the_time_in_stretches_that_double():
    age, kept, longest = 0.0, 0.0, 0.0
    while age < WEEK_SECS:
        keeps, secs = keeping(age)
        assert secs > 0
        assert keeps is not keeping(age + secs + 1e-6)[0]
        if keeps:
            kept, longest = kept + secs, max(longest, secs)
        age += secs + 1e-6
    assert not keeping(0.0)[0]
    assert kept / age < 0.26
    assert longest > 12 * 3600
