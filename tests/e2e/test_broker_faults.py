"""A whole daemon whose RabbitMQ goes away, is cut off, falls silent, forgets its user, or loses a queue: runs go on, each ends once.

What the adapter alone survives is shown in tests/service/test_rabbitmq_faults.py. DESIGN.md rules 1, 5, 11; docs/leases.md.
"""

from __future__ import annotations

import time
import urllib.error
from typing import TYPE_CHECKING

import pytest

from tests.e2e import messages
from tests.e2e.work import Work, depth, leased, serve, settled, work
from tests.servers.proxy import proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.daemon import Daemon
    from tests.servers.proxy import Proxy
    from tests.servers.rabbitmq import RabbitmqServer

__all__ = ["work"]  # fixtures

pytestmark = [pytest.mark.service, pytest.mark.slow, pytest.mark.timeout(400)]

LOST = "the message of a run in progress was lost; the run goes on and waits for it"
ADOPTED = "adopted the redelivered message of a run in progress"
DOWN = "broker connection is down"
#: A connection that says nothing is given up after twice the heartbeat and five seconds (docs/leases.md). Not shorter: the broker
#: gives up one whose daemon has stalled for one to two of these.
HEARTBEAT_SECS = 6
NOTICED_SECS = 2 * (HEARTBEAT_SECS + 5)


@pytest.fixture
def wire(rabbitmq: RabbitmqServer) -> Iterator[Proxy]:
    with proxy(rabbitmq.host, rabbitmq.port) as one:
        yield one


def through(wire: Proxy, query: str = "") -> str:
    return f"amqp://guest:guest@127.0.0.1:{wire.port}/{query}"


def until_over(daemon: Daemon, secs: float) -> None:
    """An outage lasts so long, at least."""
    begun = time.monotonic()
    daemon.until(lambda: time.monotonic() - begun > secs, secs + 10)


def ran_once(daemon: Daemon, server: RabbitmqServer, work: Work) -> None:
    """One start, one document, its results; and nothing of its message is left anywhere."""
    settled(daemon, server, work)
    completed_once(daemon, work)


def completed_once(daemon: Daemon, work: Work) -> None:
    assert (work.starts, work.statuses()) == (1, ["completed"])
    assert work.output() == "begun\ndone\n"
    assert work.documents()[0]["runner"]["attempt"] == 1
    assert not daemon.dead_letters()


def serves_again(daemon: Daemon, server: RabbitmqServer, work: Work, key: str) -> None:
    """Another message of its queue runs."""
    server.publish(work.queue, messages.on_directory(work.storage, "print('next')", key), persistent=True)
    daemon.until((work.storage / f"experiments/{key}/output.tar").exists)
    daemon.until(lambda: not daemon.get("/api/runs")["running"] and depth(server, work.queue) == 0)


@pytest.mark.parametrize("lease", ["off", "auto"])
def test_cut_off_while_waiting_while_running_and_while_the_acknowledgement_is_due(
    daemons, rabbitmq: RabbitmqServer, wire: Proxy, work: Work, lease
):
    rabbitmq.declare(work.queue, durable=True)
    daemon = serve(daemons, rabbitmq, work, options=(f"--rmq-lease={lease}",), AMQP_URL=through(wire))
    # waiting
    daemon.until(lambda: rabbitmq.consumers(work.queue) == 1)
    assert wire.cut() >= 1
    rabbitmq.publish(work.queue, work.body, persistent=True)
    daemon.until(lambda: work.starts)
    # running
    assert wire.cut() >= 1
    daemon.until(lambda: daemon.log(ADOPTED))
    if lease == "auto":  # what was delivered before is leased
        daemon.until(lambda: leased(daemon, rabbitmq, work))
    # ending: the acknowledgement is sent into nothing, and then the connection breaks
    wire.blackhole()
    work.end()
    daemon.until(lambda: daemon.log("experiment finished"))
    wire.cut()
    wire.resume()
    if lease == "off":
        daemon.until(lambda: daemon.log("acknowledged a redelivery of what finished here"))
    ran_once(daemon, rabbitmq, work)
    serves_again(daemon, rabbitmq, work, "next")
    assert daemon.stop() == 0


def test_a_connection_that_has_fallen_silent_is_noticed_and_its_run_adopted(
    daemons, rabbitmq: RabbitmqServer, wire: Proxy, work: Work
):
    work.publish(rabbitmq)
    daemon = serve(daemons, rabbitmq, work, AMQP_URL=through(wire, f"?heartbeat={HEARTBEAT_SECS}"))
    daemon.until(lambda: work.starts)
    before = len(daemon.log(LOST))  # a machine that stalls breaks connections as well
    wire.blackhole()  # no RST, no FIN, in neither direction
    silent = time.monotonic()
    daemon.until(lambda: len(daemon.log(LOST)) > before)
    noticed = time.monotonic() - silent
    print(f"noticed after {noticed:.1f} s")
    assert noticed < NOTICED_SECS + 20  # the machine may be busy
    assert daemon.log(DOWN)
    daemon.until(lambda: depth(rabbitmq, work.queue) == 1)  # the broker has noticed as well
    assert work.starts == 1
    adopted = len(daemon.log(ADOPTED))
    wire.resume()
    daemon.until(lambda: len(daemon.log(ADOPTED)) > adopted)
    work.end()
    ran_once(daemon, rabbitmq, work)
    assert len(daemon.log(ADOPTED)) <= len(daemon.log(LOST))  # once for each time that it was lost
    serves_again(daemon, rabbitmq, work, "next")
    assert daemon.stop() == 0


@pytest.mark.parametrize("ends", ["while-away", "afterwards"])
def test_the_user_is_deleted_in_mid_run_and_comes_back(daemons, rabbitmq: RabbitmqServer, work: Work, ends):
    user = work.queue
    rabbitmq.add_user(user, "secret", tags="management")
    work.publish(rabbitmq)
    daemon = serve(daemons, rabbitmq, work, AMQP_URL=rabbitmq.url(user=user, password="secret"))
    daemon.until(lambda: work.starts)
    assert rabbitmq.api("DELETE", f"/api/users/{user}")[0] == 204
    daemon.until(lambda: daemon.log(LOST))
    daemon.until(lambda: depth(rabbitmq, work.queue) == 1)  # and nobody takes it
    if ends == "while-away":
        work.end()
        daemon.until(lambda: work.statuses() == ["completed"] and not daemon.get("/api/runs")["running"])
        assert depth(rabbitmq, work.queue) == 1
    daemon.until(lambda: unready(daemon))
    told = unready(daemon)
    assert "401" in told or "refused" in told.lower()
    (account,) = daemon.get(f"/api/queues?queue={work.queue}")["accounts"]
    assert account["unavailable_since"]
    assert account["error"]
    refused = daemon.until(lambda: [each for each in daemon.log(DOWN) if "ACCESS_REFUSED" in each["error"]])
    assert "secret" not in daemon.log_text()
    assert refused
    assert len([each for each in daemon.log(DOWN) if each["level"] == "warning"]) <= 4  # said once for each
    rabbitmq.add_user(user, "secret", tags="management")
    if ends == "afterwards":
        daemon.until(lambda: daemon.log(ADOPTED))
        work.end()
    ran_once(daemon, rabbitmq, work)
    daemon.until(lambda: not unready(daemon))
    serves_again(daemon, rabbitmq, work, "next")
    assert daemon.stop() == 0
    rabbitmq.api("DELETE", f"/api/users/{user}")


def unready(daemon: Daemon) -> str:
    """What /readyz says is wrong; nothing when it is ready."""
    try:
        daemon.get("/readyz")
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()
    return ""


def test_deleting_the_queues_of_runs_that_are_not_leased_cancels_them(
    daemons, rabbitmq: RabbitmqServer, tmp_path
):
    works = {durable: Work(tmp_path / f"durable-{durable}") for durable in (True, False)}
    for durable, one in works.items():
        one.publish(rabbitmq, durable=durable)
    daemon = serve(daemons, rabbitmq, *works.values(), options=("--rmq-lease=off",))
    for one in works.values():
        daemon.until(lambda one=one: one.starts)  # type: ignore[misc]
    deleted = time.monotonic()
    for one in works.values():
        rabbitmq.delete(one.queue)
    daemon.until(lambda: not daemon.get("/api/runs")["running"])
    print(f"stopped after {time.monotonic() - deleted:.1f} s")
    assert time.monotonic() - deleted < 60 + 20  # the machine may be busy
    for one in works.values():
        (document,) = one.documents()
        assert (document["studioml"]["status"], document["studioml"]["reason"]) == (
            "stopped",
            "queue-deleted",
        )
        assert one.output().startswith("begun\nstudio-runner: ")
        assert depth(rabbitmq, one.queue) is None  # and nobody has made it again
    assert not daemon.dead_letters()
    assert daemon.stop() == 0


def test_a_broker_that_is_away_for_five_seconds(daemons, own_rabbitmq: RabbitmqServer, work: Work):
    broker = own_rabbitmq
    work.publish(broker)
    daemon = serve(daemons, broker, work)
    daemon.until(lambda: work.starts)
    broker.stop()
    work.end()  # while it is away
    until_over(daemon, 5)
    daemon.until(lambda: work.statuses() == ["completed"])
    broker.start()
    ran_once(daemon, broker, work)
    # and once more, while nothing runs
    broker.stop()
    until_over(daemon, 5)
    broker.start()
    returned = time.monotonic()
    daemon.until(lambda: broker.consumers(work.queue) == 1)
    took = time.monotonic() - returned
    print(f"asked for work {took:.1f} s after the broker's return")
    assert took < 30  # the longest pause is five seconds; the rest is for a busy machine
    serves_again(daemon, broker, work, "next")
    assert daemon.stop() == 0


def test_a_broker_that_is_away_for_longer_than_every_patience(
    daemons, own_rabbitmq: RabbitmqServer, tmp_path
):
    """Than heartbeats (6 s), the lease (30 s), all pauses between retries (30 s); and one of the queues is lost with it."""
    broker = own_rabbitmq
    durable, transient = Work(tmp_path / "durable"), Work(tmp_path / "transient")
    durable.publish(broker, again=True)
    transient.publish(broker, durable=False, again=True)
    daemon = serve(
        daemons,
        broker,
        durable,
        transient,
        options=("--rmq-lease=30",),  # with much less than that a stall looks like a machine that slept
        AMQP_URL=broker.url(query=f"?heartbeat={HEARTBEAT_SECS}"),
    )
    held = lambda: {each["queue"] for each in daemon.log("a message is held by its lease from now on")}
    daemon.until(lambda: held() == {durable.queue, transient.queue})
    broker.stop()
    until_over(daemon, 60)
    assert unready(daemon)
    assert {run["stage"] for run in daemon.get("/api/runs")["running"]} == {"running"}
    broker.start()
    daemon.until(lambda: daemon.log(ADOPTED))
    until_over(daemon, 40)  # the lost queue is looked for twice, and cancels nothing
    assert {run["stage"] for run in daemon.get("/api/runs")["running"]} == {"running"}
    assert len(daemon.get("/api/runs")["running"]) == 2
    for one in (durable, transient):
        one.end()
    ran_once(daemon, broker, durable)
    completed_once(daemon, transient)
    assert depth(broker, transient.queue) is None
    assert not daemon.log("acknowledged a second copy of a message that runs here")
    serves_again(daemon, broker, durable, "next")
    assert daemon.stop() == 0
