"""One long experiment on a RabbitMQ queue of its own, and daemons that serve only that queue."""

from __future__ import annotations

import json
import tarfile
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from pika import exceptions

from tests.e2e import messages

if TYPE_CHECKING:
    import pathlib

    from tests.servers.daemon import Daemon, MakeDaemon
    from tests.servers.rabbitmq import RabbitmqServer

#: Counts its starts, and goes on until it is told to end.
SCRIPT = """
import os, pathlib, time
with open({starts!r}, "a") as file:
    file.write(str(os.getpid()) + "\\n")
print("begun", flush=True)
while not pathlib.Path({go!r}).exists():
    time.sleep(0.05)
pathlib.Path("../modeldir/model").write_text("trained")
print("done", flush=True)
"""


class Work:
    """One experiment on directory storage that hosts share."""

    def __init__(self, root: pathlib.Path) -> None:
        self.storage = root / "storage"
        self.storage.mkdir(parents=True)
        self._starts = root / "starts"
        self._go = root / "go"
        script = SCRIPT.format(starts=str(self._starts), go=str(self._go))
        self.body = messages.on_directory(self.storage, script, "k")
        self.queue = f"rmq_{uuid.uuid4().hex[:12]}"

    def publish(
        self, server: RabbitmqServer, kind: str = "classic", *, durable: bool = True, again: bool = False
    ) -> None:
        """`again`: somebody had it before and gave it back, so that it gets its lease before its work starts."""
        server.declare(self.queue, durable=durable, arguments={"x-queue-type": kind})
        server.publish(self.queue, self.body, persistent=durable)
        if again:
            with server.channel() as channel:
                method, _, _ = channel.basic_get(self.queue)
                channel.basic_nack(method.delivery_tag, requeue=True)

    @property
    def starts(self) -> int:
        return len(self._starts.read_text().splitlines()) if self._starts.exists() else 0

    def end(self) -> None:
        self._go.touch()

    def documents(self) -> list[dict[str, Any]]:
        paths = sorted(self.storage.glob("metadata/scrape-host-*.json"))
        return [json.loads(path.read_text()) for path in paths]

    def statuses(self) -> list[str]:
        return sorted(each["studioml"]["status"] for each in self.documents())

    def output(self) -> str:
        with tarfile.open(self.storage / "experiments/k/output.tar") as archive:
            member = archive.extractfile("output")
            assert member is not None
            return member.read().decode()


@pytest.fixture
def work(tmp_path: pathlib.Path) -> Work:
    return Work(tmp_path / "work")


def serve(
    daemons: MakeDaemon, server: RabbitmqServer, *works: Work, options: tuple[str, ...] = (), **env: str
) -> Daemon:
    """A daemon that takes those works and nothing else."""
    return daemons(
        f"--amqp-mgt-url={server.management_url}",
        "--queue-refresh=1s",
        f"--queue-match=^({'|'.join(work.queue for work in works)})$",
        *options,
        env={"AMQP_URL": server.amqp_url} | env,
    )


def depth(server: RabbitmqServer, queue: str) -> int | None:
    """Messages that wait; None when there is no such queue."""
    try:
        return server.depth(queue)
    except exceptions.ChannelClosedByBroker:
        return None


def leases(server: RabbitmqServer, work: Work) -> list[str]:
    return [
        each["name"]
        for each in server.api("GET", "/api/queues/%2F")[1]
        if each["name"].startswith("studio-runner.lease.")
        and each.get("arguments", {}).get("x-dead-letter-routing-key") == work.queue
    ]


def leased(daemon: Daemon, server: RabbitmqServer, work: Work) -> bool:
    """It runs, and its hand-over is over: only the lease holds its message."""
    handed_over = daemon.log("a message is held by its lease from now on")
    return bool(work.starts and handed_over and leases(server, work))


def settled(daemon: Daemon, server: RabbitmqServer, work: Work) -> None:
    """Nothing runs, waits or is leased."""
    daemon.until(lambda: not daemon.get("/api/runs")["running"])
    daemon.until(lambda: depth(server, work.queue) in {0, None})
    daemon.until(lambda: not leases(server, work))
