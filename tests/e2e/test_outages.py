"""Unreachable is not failed: storage and brokers go away and come back (DESIGN.md rules 3, 5; INTEROP.md 10)."""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e import messages
from tests.servers.proxy import proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.daemon import Daemon, MakeDaemon
    from tests.servers.proxy import Proxy
    from tests.servers.rabbitmq import RabbitmqServer
    from tests.servers.seaweedfs import SeaweedFs

pytestmark = [pytest.mark.service, pytest.mark.timeout(300)]


@pytest.fixture
def storage(seaweedfs: SeaweedFs) -> Iterator[Proxy]:
    """SeaweedFS behind a proxy, so that it can go away for one test."""
    host, _, port = seaweedfs.endpoint.partition(":")
    with proxy(host, int(port)) as between:
        yield between


def request(server: SeaweedFs, between: Proxy, bucket: str, script: str, key: str) -> bytes:
    body = messages.on_s3(server, bucket, script, key)
    return body.replace(server.endpoint.encode(), f"127.0.0.1:{between.port}".encode())


def serve(daemons: MakeDaemon, broker: RabbitmqServer) -> Daemon:
    return daemons(
        "--queue-match=^rmq_(outage|staging|durable|transient|two|refused_.+)$",  # other tests leave queues behind
        f"--amqp-mgt-url={broker.management_url}",
        "--queue-refresh=1s",
        "--max-cores=2",
        env={"AMQP_URL": broker.amqp_url},
    )


def stage(daemon: Daemon, name: str) -> bool:
    return any(run["stage"] == name for run in daemon.get("/api/runs")["running"])


def documents(server: SeaweedFs, bucket: str) -> list[dict[str, Any]]:
    client = server.client()
    names = [each.object_name for each in client.list_objects(bucket, "metadata/scrape-", recursive=True)]
    return [json.loads(client.get_object(bucket, name).read()) for name in sorted(names)]


def output(server: SeaweedFs, bucket: str, key: str) -> str:
    data = server.client().get_object(bucket, f"experiments/{key}/output.tar").read()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.extractfile("output")
        assert member is not None
        return member.read().decode()


def test_results_wait_on_disk_for_storage_and_survive_the_daemon(
    daemons, rabbitmq: RabbitmqServer, seaweedfs: SeaweedFs, storage: Proxy, tmp_path
):
    bucket, go = seaweedfs.make_bucket("outage-results"), tmp_path / "go"
    rabbitmq.declare("rmq_outage", durable=True)
    daemon = serve(daemons, rabbitmq)
    body = request(seaweedfs, storage, bucket, messages.WAIT.format(go=str(go)), "k")
    rabbitmq.publish("rmq_outage", body, persistent=True)
    daemon.until(lambda: stage(daemon, "running"))
    storage.refuse()
    storage.cut()
    go.touch()
    daemon.until(lambda: daemon.log("results cannot be stored yet, trying again"))
    daemon.kill()
    daemon.start()
    daemon.until(lambda: stage(daemon, "uploading"))  # resumed, not run again
    storage.listen()
    daemon.until(lambda: rabbitmq.depth("rmq_outage") == 0 and not daemon.get("/api/runs")["running"])
    (document,) = documents(seaweedfs, bucket)
    assert document["studioml"]["status"] == "completed"
    assert output(seaweedfs, bucket, "k").count("begun") == 1
    assert daemon.stop() == 0
    assert rabbitmq.depth("rmq_outage") == 0
    assert not daemon.dead_letters()


def test_a_storage_outage_empties_no_queue_into_the_dead_letters(
    daemons, rabbitmq: RabbitmqServer, seaweedfs: SeaweedFs, storage: Proxy
):
    bucket = seaweedfs.make_bucket("outage-staging")
    rabbitmq.declare("rmq_staging", durable=True)
    daemon = serve(daemons, rabbitmq)
    bodies = [request(seaweedfs, storage, bucket, f"print({n})", f"k{n}") for n in range(5)]
    storage.refuse()
    rabbitmq.publish("rmq_staging", *bodies, persistent=True)
    daemon.until(lambda: daemon.log("endpoint does not answer; what needs it waits"))
    daemon.until(lambda: rabbitmq.depth("rmq_staging") == 5)
    put_back = len(daemon.log("experiment goes back to its queue"))
    assert put_back <= 4  # the first ones that ran into it; the others were never taken
    storage.listen()

    def found() -> list[dict[str, Any]]:
        return [each for each in documents(seaweedfs, bucket) if each["studioml"]["status"] == "completed"]

    daemon.until(lambda: len(found()) == 5)
    daemon.until(lambda: not daemon.get("/api/runs")["running"])
    completed = found()
    assert len(completed) == 5
    assert rabbitmq.depth("rmq_staging") == 0
    assert {each["runner"]["attempt"] for each in completed} == {1}
    assert not daemon.dead_letters()
    assert daemon.stop() == 0


def test_a_broker_restart_neither_kills_nor_repeats_a_run(
    daemons, own_rabbitmq: RabbitmqServer, seaweedfs: SeaweedFs, tmp_path
):
    broker = own_rabbitmq
    bucket, go = seaweedfs.make_bucket("outage-broker"), tmp_path / "go"
    for queue, durable in (("rmq_durable", True), ("rmq_transient", False)):
        broker.declare(queue, durable=durable)
    daemon = serve(daemons, broker)
    for queue in ("rmq_durable", "rmq_transient"):
        body = messages.on_s3(seaweedfs, bucket, messages.WAIT.format(go=str(go)), queue)
        broker.publish(queue, body, persistent=queue == "rmq_durable")
    daemon.until(
        lambda: len([run for run in daemon.get("/api/runs")["running"] if run["stage"] == "running"]) == 2
    )
    broker.restart()
    daemon.until(lambda: daemon.log("adopted the redelivered message of a run in progress"))
    go.touch()
    daemon.until(lambda: not daemon.get("/api/runs")["running"] and broker.depth("rmq_durable") == 0)
    found = documents(seaweedfs, bucket)
    assert sorted(each["studioml"]["experiment"] for each in found) == ["rmq_durable", "rmq_transient"]
    assert {each["studioml"]["status"] for each in found} == {"completed"}
    # Consumption is back.
    go.touch()
    broker.publish("rmq_durable", messages.on_s3(seaweedfs, bucket, "print('next')", "next"), persistent=True)
    daemon.until(lambda: len(documents(seaweedfs, bucket)) == 3)
    assert daemon.stop() == 0


def test_two_daemons_share_a_queue_and_the_work_of_a_killed_one(
    daemons, rabbitmq: RabbitmqServer, seaweedfs: SeaweedFs, tmp_path
):
    bucket, go = seaweedfs.make_bucket("two-daemons"), tmp_path / "go"
    rabbitmq.declare("rmq_two", durable=True)
    first, second = (serve(daemons, rabbitmq) for _ in range(2))
    rabbitmq.publish(
        "rmq_two", messages.on_s3(seaweedfs, bucket, messages.WAIT.format(go=str(go)), "k"), persistent=True
    )
    first.until(lambda: stage(first, "running") or stage(second, "running"))
    killed, other = (first, second) if stage(first, "running") else (second, first)
    # Documents are named by host and second, and these two daemons are one host.
    killed.until(lambda: killed.get("/api/runs")["running"][0]["elapsed_secs"] > 1.1)
    killed.kill()
    other.until(lambda: stage(other, "running"))
    go.touch()
    other.until(lambda: not other.get("/api/runs")["running"] and rabbitmq.depth("rmq_two") == 0)
    killed.start()  # and it neither runs it again nor touches the results
    statuses = lambda: sorted(each["studioml"]["status"] for each in documents(seaweedfs, bucket))
    killed.until(lambda: statuses() == ["completed", "failed"])  # one of each daemon
    for daemon in (killed, other):
        assert daemon.stop() == 0
        assert not daemon.dead_letters()
    assert statuses() == ["completed", "failed"]
    assert len([run for run in other.log("experiment finished") if run["acknowledged"]]) == 1
    assert not killed.log("experiment finished")
    assert output(seaweedfs, bucket, "k").count("begun") == 1
    assert output(seaweedfs, bucket, "k").count("done") == 1
    assert rabbitmq.depth("rmq_two") == 0


@pytest.mark.parametrize("missing", ["bucket", "secret", "object"])
def test_what_storage_refuses_has_its_reason_and_bounded_attempts(
    daemons, rabbitmq: RabbitmqServer, seaweedfs: SeaweedFs, missing
):
    bucket = seaweedfs.make_bucket(f"refused-{missing}")
    queue = f"rmq_refused_{missing}"
    rabbitmq.declare(queue, durable=True)
    daemon = serve(daemons, rabbitmq)
    body = json.loads(messages.on_s3(seaweedfs, bucket, "print(1)", "k"))
    workspace = body["experiment"]["artifacts"]["workspace"]
    if missing == "bucket":
        workspace["qualified"] = workspace["qualified"].replace(bucket, "no-such-bucket")
    elif missing == "object":
        workspace["qualified"] += "x"
    else:
        body["config"]["storage"]["credentials"]["aws"]["secret_access_key"] = "canary-wrong"
    rabbitmq.publish(queue, json.dumps(body).encode(), persistent=True)
    (letter,) = daemon.until(daemon.dead_letters)
    assert (letter["reason"], letter["attempts"]) == ("artifact", 3)
    assert "canary" not in json.dumps(letter)
    assert "canary" not in daemon.log_text()
    daemon.until(lambda: rabbitmq.depth(queue) == 0)
