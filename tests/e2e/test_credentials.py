"""`--certs-dir` with a real daemon: accounts come and go without a restart."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
from typing import TYPE_CHECKING

import pytest

from tests.e2e import messages
from tests.e2e.hasty import done, running

if TYPE_CHECKING:
    from tests.servers.daemon import Daemon, MakeDaemon
    from tests.servers.moto_sqs import SqsServer
    from tests.servers.pubsub import PubsubServer
    from tests.servers.rabbitmq import RabbitmqServer


def accounts(daemon: Daemon) -> dict[str, str]:
    try:
        told = daemon.get("/readyz")
    except urllib.error.HTTPError as exc:
        told = json.loads(exc.read())
    found: dict[str, str] = told["accounts"]
    return found


def finished(daemon: Daemon) -> set[str]:
    return {run["experiment"] for run in daemon.runs() if run["stage"] == "done"}


@pytest.mark.service
def test_accounts_come_and_go_and_runs_go_on(daemons: MakeDaemon, rabbitmq: RabbitmqServer, tmp_path):
    certs, queues, go = tmp_path / "certs", tmp_path / "queues", tmp_path / "go"
    for directory in (certs, queues / "local_a"):
        directory.mkdir(parents=True)
    daemon = daemons(f"--certs-dir={certs}", "--queue-refresh=1s", ready=False)
    assert accounts(daemon) == {}

    (certs / "shared").write_text(str(queues))
    daemon.until(lambda: accounts(daemon).get("shared") == "ok")
    body = messages.on_directory(daemon.storage, messages.WAIT.format(go=str(go)), "waits")
    (queues / "local_a" / "m1").write_bytes(body)
    daemon.until(lambda: any(run["stage"] == "running" for run in daemon.runs()))

    rabbitmq.declare("rmq_certs", durable=True)
    rabbitmq.declare("rmq_other", durable=True)
    (certs / "broker.yaml").write_text(
        f"url: {rabbitmq.amqp_url}\nmanagement_url: {rabbitmq.management_url}\nmatch: certs$\n"
    )
    (certs / "nonsense").write_text("nonsense")
    daemon.until(lambda: accounts(daemon).get("broker.yaml") == "ok")
    daemon.until(lambda: "neither" in accounts(daemon).get("nonsense", ""))
    for queue in ("rmq_certs", "rmq_other"):
        rabbitmq.publish(queue, messages.on_directory(daemon.storage, "print(1)", queue), persistent=True)
    daemon.until(lambda: "rmq_certs" in finished(daemon))
    assert rabbitmq.depth("rmq_other") == 1  # does not match the account's own pattern

    (certs / "shared").unlink()
    daemon.until(lambda: "shared" not in accounts(daemon))
    (queues / "local_a" / "m2").write_bytes(messages.on_directory(daemon.storage, "print(2)", "late"))
    go.touch()
    daemon.until(lambda: "waits" in finished(daemon))  # what runs finishes, and is acknowledged
    daemon.until(lambda: [path.name for path in (queues / "local_a").iterdir()] == ["m2"])
    assert daemon.stop() == 0
    assert "late" not in {record.get("experiment") for record in daemon.log()}


@pytest.mark.service
def test_accounts_of_amazon_and_google_come_and_go_while_their_runs_go_on(
    daemons: MakeDaemon, sqs_server: SqsServer, pubsub: PubsubServer, tmp_path
):
    certs, go = tmp_path / "certs", tmp_path / "go"
    certs.mkdir()
    daemon = daemons(f"--certs-dir={certs}", env={"PUBSUB_EMULATOR_HOST": pubsub.address}, ready=False)
    sqs_server.create("sqs_certs")
    pubsub.declare("pubsub_certs")
    wait = messages.WAIT.format(go=str(go))
    sqs_server.send("sqs_certs", messages.on_directory(daemon.storage, wait, "amazon"))
    pubsub.publish("pubsub_certs", messages.on_directory(daemon.storage, wait, "google"))

    # Each appears whole: what is half written is said, too.
    (certs / ".torn").mkdir()
    for name in ("credentials", "config"):
        (certs / ".torn" / name).write_text("no profile")
    (certs / ".torn").rename(certs / "torn")
    (certs / ".half").mkdir()
    (certs / ".half" / "config").write_text("[default]\n")
    (certs / ".half").rename(certs / "half")
    (certs / "torn.json").write_text('{"type": "service_account"')
    sqs_server.drop_account(certs / "amazon")
    pubsub.drop_key(certs / "google.json")
    began = time.monotonic()
    daemon.until(lambda: running(daemon, "amazon") and running(daemon, "google"))
    print(f"both run after {time.monotonic() - began:.1f} s")
    daemon.until(lambda: len(accounts(daemon)) == 5 and "not asked yet" not in accounts(daemon).values())
    told = accounts(daemon)
    assert (told["amazon"], told["google.json"]) == ("ok", "ok")
    assert str(certs / "torn") in told["torn"]
    assert "without the file 'credentials'" in told["half"]
    assert "is not" in told["torn.json"]
    named = {record["name"] for record in daemon.log("credentials cannot be used")}
    assert named == {"half", "torn.json"}
    assert [record["account"] for record in daemon.log("account unavailable")] == ["torn"]

    shutil.rmtree(certs / "amazon")
    (certs / "google.json").unlink()
    daemon.until(lambda: not {"amazon", "google.json"} & accounts(daemon).keys())
    late = messages.on_directory(daemon.storage, "print(1)", "late")
    sqs_server.send("sqs_certs", late)
    pubsub.publish("pubsub_certs", late)
    go.touch()
    for key in ("amazon", "google"):
        (ended,) = daemon.until(lambda key=key: done(daemon, key))  # type: ignore[misc]
        assert (ended["status"], ended["fate"]) == ("completed", "ack")
    # The poll, or the stream, that was under way may have got it, and gives it back.
    daemon.until(lambda: sqs_server.depth("sqs_certs") == 1)
    daemon.until(lambda: (pubsub.ready("pubsub_certs"), pubsub.held("pubsub_certs")) == (1, 0))
    assert daemon.stop() == 0
    assert not done_or_started(daemon, "late")
    sqs_server.clear()
    pubsub.delete("pubsub_certs")


def done_or_started(daemon: Daemon, key: str) -> bool:
    return any(record.get("experiment") == key for record in daemon.log())
