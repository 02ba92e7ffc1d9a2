"""Runs that outlast their broker's patience, on a real broker whose patience is seconds: they run once, and nothing is lost.

docs/leases.md; DESIGN.md rules 2, 3, 4, 5, 11 and 5.3.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.e2e.work import Work, depth, leased, leases, serve, settled, work
from tests.servers.rabbitmq import rabbitmq_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.rabbitmq import RabbitmqServer

__all__ = ["work"]  # fixtures

pytestmark = [pytest.mark.service, pytest.mark.slow, pytest.mark.timeout(300)]

#: With a lease of as many seconds, hand-over and renewal each have half of it to spare: disks are slow at times.
LIMIT_SECS = 12.0
#: Where the lease is to run out. A daemon that does not run for half of it is taken for frozen: a stall must not look like that.
LEASE_SECS = 12
LEASE = f"--rmq-lease={LEASE_SECS}"
#: One that is frozen in the middle of a renewal holds the copy until the broker misses its heartbeats (docs/leases.md).
ALERT = "?heartbeat=10"


@pytest.fixture(scope="module")
def impatient() -> Iterator[RabbitmqServer]:
    """A broker that takes a message back after 12 to 14 seconds."""
    limit = f"consumer_timeout = {LIMIT_SECS * 1000:.0f}\n"
    with rabbitmq_server(extra=limit, advanced="[{rabbit, [{channel_tick_interval, 2000}]}].") as server:
        yield server


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_run_several_times_longer_than_the_limit_runs_once(daemons, impatient, work: Work, kind):
    work.publish(impatient, kind, again=True)
    first, second = (
        serve(daemons, impatient, work, options=(f"--rmq-lease={LIMIT_SECS:.0f}",)) for _ in range(2)
    )
    first.until(lambda: work.starts)
    begun = time.monotonic()
    first.until(lambda: leases(impatient, work))
    first.until(lambda: time.monotonic() - begun > 3.5 * LIMIT_SECS)
    assert work.starts == 1
    work.end()
    settled(first, impatient, work)
    settled(second, impatient, work)
    assert (work.starts, work.statuses()) == (1, ["completed"])
    assert work.output() == "begun\ndone\n"
    for daemon in (first, second):
        assert not daemon.log("the message of a run in progress was lost; the run goes on and waits for it")
        assert daemon.stop() == 0


def test_without_being_told_the_limit_is_learned(daemons, impatient, work: Work):
    work.publish(impatient)
    daemon = serve(daemons, impatient, work)
    daemon.until(lambda: leases(impatient, work))
    daemon.until(lambda: daemon.log("adopted the redelivered message of a run in progress"))
    daemon.until(lambda: daemon.log("the broker's limit on holding a message is short: leases begin sooner"))
    work.end()
    settled(daemon, impatient, work)
    assert (work.starts, work.statuses()) == (1, ["completed"])
    assert daemon.stop() == 0


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_the_work_of_a_killed_runner_comes_back_within_the_lease_time(daemons, impatient, work: Work, kind):
    work.publish(impatient, kind, again=True)
    killed = serve(daemons, impatient, work, options=(LEASE,))
    killed.until(lambda: leased(killed, impatient, work))
    other = serve(daemons, impatient, work, options=(LEASE,))
    killed.kill()
    other.until(lambda: work.starts == 2, LEASE_SECS + 40)  # the machine may be busy
    assert other.get("/api/runs")["running"][0]["attempt"] == 2  # counted by the lease
    work.end()
    settled(other, impatient, work)
    assert work.statuses()[0] == "completed"
    assert other.stop() == 0


def test_a_restarted_runner_does_not_wait_for_its_own_lease(daemons, rabbitmq, work: Work):
    work.publish(rabbitmq, again=True)
    daemon = serve(daemons, rabbitmq, work, options=("--rmq-lease=600",))
    daemon.until(lambda: leased(daemon, rabbitmq, work))
    daemon.kill()
    daemon.start()
    daemon.until(lambda: work.starts == 2)
    assert daemon.log("reclaimed a lease of before the restart")
    assert daemon.get("/api/runs")["running"][0]["attempt"] == 2
    work.end()
    settled(daemon, rabbitmq, work)
    daemon.until(lambda: work.statuses() == ["completed", "failed"])
    assert daemon.stop() == 0


def test_a_runner_that_was_frozen_past_its_lease_stops_its_copy(daemons, impatient, work: Work):
    work.publish(impatient, again=True)
    frozen = serve(daemons, impatient, work, options=(LEASE,), AMQP_URL=impatient.url(query=ALERT))
    frozen.until(lambda: leased(frozen, impatient, work))
    other = serve(daemons, impatient, work, options=(LEASE,))
    frozen.signal(signal.SIGSTOP)
    try:
        other.until(lambda: work.starts == 2)
    finally:
        frozen.signal(signal.SIGCONT)
    (told,) = frozen.until(
        lambda: [run for run in frozen.get("/api/runs")["recent"] if run["reason"] == "lease-lost"]
    )
    assert (told["status"], told["final"]) == ("superseded", False)
    frozen.until(lambda: not frozen.get("/api/runs")["running"])
    assert not (work.storage / "experiments/k/output.tar").exists()  # no results of the frozen one
    work.end()
    settled(other, impatient, work)
    other.until(lambda: work.statuses() == ["completed", "superseded"])
    assert work.starts == 2
    assert work.output() == "begun\ndone\n"
    for daemon in (frozen, other):
        assert daemon.stop() == 0


def test_a_runner_that_was_frozen_alone_runs_it_again(daemons, impatient, work: Work):
    work.publish(impatient, again=True)
    daemon = serve(daemons, impatient, work, options=(LEASE,), AMQP_URL=impatient.url(query=ALERT))
    daemon.until(lambda: leased(daemon, impatient, work))
    daemon.signal(signal.SIGSTOP)
    try:
        daemon.until(lambda: depth(impatient, work.queue) == 1)
    finally:
        daemon.signal(signal.SIGCONT)
    daemon.until(lambda: work.starts == 2)
    work.end()
    settled(daemon, impatient, work)
    assert work.statuses() == ["completed", "superseded"]
    assert daemon.stop() == 0


def test_deleting_the_queue_of_a_leased_run_cancels_it(daemons, rabbitmq, work: Work):
    work.publish(rabbitmq, durable=False, again=True)
    daemon = serve(daemons, rabbitmq, work, options=("--rmq-lease=600",))
    daemon.until(lambda: leased(daemon, rabbitmq, work))
    rabbitmq.delete(work.queue)
    daemon.until(lambda: not daemon.get("/api/runs")["running"])
    settled(daemon, rabbitmq, work)
    (document,) = work.documents()
    assert (document["studioml"]["status"], document["studioml"]["reason"]) == ("stopped", "queue-deleted")
    assert work.output().startswith("begun\nstudio-runner: ")
    assert daemon.stop() == 0


def test_a_broker_restart_during_a_lease_loses_and_repeats_nothing(daemons, own_rabbitmq, work: Work):
    """One that is shorter than the lease; tests/e2e/test_broker_faults.py has one that is longer."""
    work.publish(own_rabbitmq, again=True)
    daemon = serve(daemons, own_rabbitmq, work, options=("--rmq-lease=600",))
    daemon.until(lambda: leased(daemon, own_rabbitmq, work))
    own_rabbitmq.restart()
    daemon.until(lambda: leases(own_rabbitmq, work))
    work.end()
    settled(daemon, own_rabbitmq, work)
    assert (work.starts, work.statuses()) == (1, ["completed"])
    assert daemon.stop() == 0


def test_without_the_permission_a_long_run_is_adopted_time_and_again(daemons, impatient, work: Work):
    user = work.queue
    impatient.add_user(user, "secret", tags="management")
    least = {"configure": "^$", "write": "^$", "read": f"^{work.queue}$"}
    impatient.api("PUT", f"/api/permissions/%2F/{user}", least)
    work.publish(impatient)
    daemon = serve(
        daemons,
        impatient,
        work,
        options=("--rmq-lease=4",),
        AMQP_URL=impatient.url(user=user, password="secret"),
    )
    adopted = "adopted the redelivered message of a run in progress"
    daemon.until(lambda: len(daemon.log(adopted)) >= 2, 120)
    work.end()
    settled(daemon, impatient, work)
    assert (work.starts, work.statuses()) == (1, ["completed"])
    refused = daemon.log(
        "long runs cannot be leased and keep holding their messages: the user lacks a permission"
    )
    assert [each["level"] for each in refused].count("warning") == 1
    assert daemon.stop() == 0


def test_a_drained_runner_gives_its_leased_message_back_uncounted(daemons, rabbitmq, work: Work):
    work.publish(rabbitmq, again=True)
    daemon = serve(
        daemons,
        rabbitmq,
        work,
        options=(
            "--rmq-lease=600",
            "--grace=0s",
        ),
    )
    daemon.until(lambda: leased(daemon, rabbitmq, work))
    assert daemon.stop() == 0
    assert depth(rabbitmq, work.queue) == 1
    assert not leases(rabbitmq, work)
    other = serve(daemons, rabbitmq, work, options=("--rmq-lease=600",))
    other.until(lambda: work.starts == 2)
    assert other.get("/api/runs")["running"][0]["attempt"] == 1
    work.end()
    settled(other, rabbitmq, work)
    assert other.stop() == 0


def test_short_runs_open_no_lease(daemons, rabbitmq, work: Work):
    work.end()
    work.publish(rabbitmq)
    daemon = serve(daemons, rabbitmq, work)
    settled(daemon, rabbitmq, work)
    daemon.until(lambda: work.statuses() == ["completed"])
    links = {each.get("link", "") for each in daemon.log("broker connection is up")}
    assert not any(link.endswith("lease") for link in links)
    assert daemon.stop() == 0
