"""A Pub/Sub service in a process of its own, for the tests: ours (`pubsub_server.py`), or Google's emulator where it is.

Listed in `pytest_plugins` of tests/conftest.py.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.servers.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PROGRAM = pathlib.Path(__file__).with_name("pubsub_server.py")
EMULATOR = pathlib.Path("/usr/lib/google-cloud-sdk/platform/pubsub-emulator/lib")
START_SECS = 60.0
CALL_SECS = 30.0


class PubsubServer:
    """The other side of one project: what experimenters, and accidents, do to it."""

    host = "127.0.0.1"

    def __init__(self, port: int, *, project: str = "project") -> None:
        self.port = port
        self.project = project
        # Here, because this module is loaded with every test run, and Google's library takes most of a second.
        import grpc
        from google.pubsub_v1 import PublisherClient, SubscriberClient
        from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
        from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._ready = grpc.channel_ready_future(self._channel)
        self.publisher = PublisherClient(transport=PublisherGrpcTransport(channel=self._channel))
        self.subscriber = SubscriberClient(transport=SubscriberGrpcTransport(channel=self._channel))

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def wait(self) -> None:
        self._ready.result(timeout=START_SECS)

    def close(self) -> None:
        self._channel.close()

    def topic(self, name: str) -> str:
        return f"projects/{self.project}/topics/{name}"

    def subscription(self, name: str) -> str:
        return f"projects/{self.project}/subscriptions/{name}_sub"

    def declare(self, name: str, *, exactly_once: bool = False, counted: bool = False) -> None:
        """As a StudioML client: the topic, then the subscription. `counted`: with a dead-letter policy."""
        self.publisher.create_topic(name=self.topic(name), timeout=CALL_SECS)
        policy = {"dead_letter_topic": self.topic(name), "max_delivery_attempts": 100}
        self.subscriber.create_subscription(
            request={
                "name": self.subscription(name),
                "topic": self.topic(name),
                "ack_deadline_seconds": 20,
                "enable_exactly_once_delivery": exactly_once,
                "dead_letter_policy": policy if counted else None,
            },
            timeout=CALL_SECS,
        )

    def delete(self, name: str) -> None:
        """As a StudioML client, which cancels by it."""
        self.publisher.delete_topic(topic=self.topic(name), timeout=CALL_SECS)
        self.subscriber.delete_subscription(subscription=self.subscription(name), timeout=CALL_SECS)

    def drop_key(self, path: pathlib.Path) -> None:
        """A service account's file, as an operator drops it. It appears whole."""
        path.parent.mkdir(exist_ok=True)
        made = path.with_name(f".{path.name}")
        made.write_text(json.dumps({"type": "service_account", "project_id": self.project}))
        made.rename(path)

    def publish(self, name: str, body: bytes, attributes: Mapping[str, str] | None = None) -> None:
        message: Any = {"data": body, "attributes": dict(attributes or {})}
        self.publisher.publish(topic=self.topic(name), messages=[message], timeout=CALL_SECS)

    def order(self, do: str, **arguments: Any) -> Any:
        """What only our own server can: its `do_*` methods."""
        call = self._channel.unary_unary("/test.Control/Do")
        return json.loads(call(json.dumps({"do": do, **arguments}).encode(), timeout=CALL_SECS))

    def ready(self, name: str) -> int:
        """How many messages wait."""
        return int(self.order("ready", subscription=self.subscription(name)))

    def held(self, name: str) -> int:
        """How many messages are leased."""
        return int(self.order("held", subscription=self.subscription(name)))

    def expire(self, name: str) -> None:
        """All leases run out, now."""
        self.order("expire", subscription=self.subscription(name))

    def fail(self, **faults: str) -> None:
        """Methods (`all` for every one) and the status code that each fails with, from now on."""
        self.order(
            "fault", faults={"" if method == "all" else method: code for method, code in faults.items()}
        )

    def calls(self) -> dict[str, int]:
        """How often each method was called so far."""
        return dict(self.order("calls"))

    def streams(self) -> int:
        """How many streams stand."""
        return int(self.order("streams"))


@contextlib.contextmanager
def running(argv: Sequence[str], port: int, log: pathlib.Path) -> Iterator[PubsubServer]:
    """A program that serves Pub/Sub on that port, until the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT)
    try:
        server = PubsubServer(port)
        with contextlib.closing(server):
            server.wait()
            yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def pubsub_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PubsubServer]:
    (port,) = free_ports(1)
    log = tmp_path_factory.mktemp("pubsub") / "log"
    with running([sys.executable, str(PROGRAM), str(port)], port, log) as server:
        yield server


@pytest.fixture
def pubsub(pubsub_process: PubsubServer) -> Iterator[PubsubServer]:
    """Our server, without faults; a test uses names, or a project, of its own."""
    yield pubsub_process
    pubsub_process.fail()


@pytest.fixture(scope="session")
def pubsub_emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PubsubServer]:
    """Google's emulator. It is not a package that everybody can have, so that missing it is no failure anywhere."""
    jars = sorted(EMULATOR.glob("cloud-pubsub-emulator-*.jar"))
    java = shutil.which("java")
    if java is None or not jars:
        pytest.skip("Google's Pub/Sub emulator needs java and the package google-cloud-cli-pubsub-emulator")
    (port,) = free_ports(1)
    argv = [java, "-Xmx256m", "-jar", str(jars[-1]), "--host=127.0.0.1", f"--port={port}"]
    with running(argv, port, tmp_path_factory.mktemp("emulator") / "log") as server:
        yield server
