"""A message that does not fit for long, on a real broker that counts deliveries and drops what was delivered too often."""

from __future__ import annotations

import math
import sys
import time
import uuid
from typing import TYPE_CHECKING

import pytest

from tests.e2e import messages
from tests.servers import daemon as daemon_module

if TYPE_CHECKING:
    import pathlib

    from tests.servers.daemon import MakeDaemon
    from tests.servers.rabbitmq import RabbitmqServer

pytestmark = [pytest.mark.service, pytest.mark.timeout(300)]

#: For how long the program of this test parks a message first, instead of 45 seconds.
PARK_SECS = 0.2
LIMIT = 16
CHANGES = 20
_SCRIPT = f"""#!{sys.executable}
import sys
from runner.cli import main
from runner.daemon import queuestate

queuestate.PARK_SECS = {PARK_SECS}
sys.exit(main.main())
"""


def test_a_crowded_quorum_queue_does_not_lose_its_message_to_the_delivery_limit(
    rabbitmq: RabbitmqServer,
    daemons: MakeDaemon,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = tmp_path / "studio-runner"
    program.write_text(_SCRIPT)
    program.chmod(0o755)
    monkeypatch.setattr(daemon_module, "PROGRAM", program)
    name = uuid.uuid4().hex[:12]
    busy, crowded, dead = f"rmq_{name}_a", f"rmq_{name}_b", f"dead_{name}"
    limited = {
        "x-queue-type": "quorum",
        "x-delivery-limit": LIMIT,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dead,
    }
    rabbitmq.declare(busy, durable=True)
    rabbitmq.declare(dead, durable=True)
    rabbitmq.declare(crowded, durable=True, arguments=limited)
    it = daemons(
        f"--amqp-mgt-url={rabbitmq.management_url}",
        "--queue-refresh=1s",
        f"--queue-match=^rmq_{name}_",
        "--rmq-lease=off",
        "--max-cores=2",
        env={"AMQP_URL": rabbitmq.amqp_url},
    )
    go = tmp_path / "go"

    def publish(queue: str, key: str, script: str, cpus: int = 1) -> None:
        body = messages.on_directory(it.storage, script, key, resources_needed={"cpus": cpus})
        rabbitmq.publish(queue, body, persistent=True)

    def ended() -> set[str]:
        return {each["experiment"] for each in it.get("/api/runs")["recent"] if each["status"] == "completed"}

    publish(busy, "long", messages.WAIT.format(go=str(go)))
    it.until(lambda: it.get("/api/runs")["running"])
    since = time.monotonic()
    publish(crowded, "big", "print()", cpus=2)
    for number in range(CHANGES):  # a core is taken and given back, by turns from both queues
        publish((busy, crowded)[number % 2], f"small{number}", "print()")
    it.until(lambda: len(ended()) == CHANGES, 200)

    def put_back() -> int:
        return sum("2 cores are asked for" in each["lacking"] for each in it.log("put back for want of room"))

    it.until(lambda: put_back() >= 3)
    deliveries = put_back() + 1
    assert deliveries <= math.log2((time.monotonic() - since) / PARK_SECS) + 2 <= LIMIT
    go.touch()
    it.until(lambda: "big" in ended(), 120)
    assert rabbitmq.depth(dead) == 0
    assert len(it.log("experiment started")) == CHANGES + 2
    it.until(lambda: rabbitmq.depth(crowded) == 0)
