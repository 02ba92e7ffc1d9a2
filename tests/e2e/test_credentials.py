"""`--certs-dir` with a real daemon: accounts come and go without a restart."""

from __future__ import annotations

import json
import urllib.error
from typing import TYPE_CHECKING

import pytest

from tests.e2e import messages

if TYPE_CHECKING:
    from tests.servers.daemon import Daemon, MakeDaemon
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
