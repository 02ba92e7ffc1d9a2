"""A real RabbitMQ with its management API, for the tests: started once, stopped by its own pids.

Listed in `pytest_plugins` of tests/conftest.py. RUNNER_TEST_AMQP_URL (and RUNNER_TEST_AMQP_MANAGEMENT_URL) name one that
runs already; tests that restart or reconfigure their broker skip then.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.parse
from typing import TYPE_CHECKING, Any

import pika
import pytest
from pika import exceptions

from tests.servers.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = pathlib.Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
EXCHANGE = "StudioML.topic"
START_SECS = 90.0
CALL_SECS = 60.0


class RabbitmqServer:
    """A broker in a directory of its own. `stop` and `start` keep its data; `amqp_url` stays the same."""

    def __init__(self, directory: pathlib.Path, *, extra: str = "", advanced: str = "") -> None:
        self.directory = directory
        self.port, self.management_port, self._dist_port, self._epmd_port = free_ports(4)
        self.user = self.password = "guest"
        self.host = "127.0.0.1"
        self._process: subprocess.Popen[bytes] | None = None
        (directory / "enabled_plugins").write_text("[rabbitmq_management].\n")
        (directory / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            "management.tcp.ip = 127.0.0.1\n"
            f"management.tcp.port = {self.management_port}\n"
            # A machine full of other tests must not look like a broker in need.
            "vm_memory_high_watermark.absolute = 2GB\ndisk_free_limit.absolute = 50MB\n" + extra
        )
        if advanced:
            (directory / "advanced.config").write_text(advanced)

    @property
    def amqp_url(self) -> str:
        return f"amqp://{self.user}:{self.password}@{self.host}:{self.port}/"

    @property
    def management_url(self) -> str:
        return f"http://{self.host}:{self.management_port}"

    @property
    def restartable(self) -> bool:
        return True

    def _environment(self) -> dict[str, str]:
        directory = str(self.directory)
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": directory,
            "RABBITMQ_NODENAME": f"t{self.port}@localhost",
            "RABBITMQ_MNESIA_BASE": f"{directory}/mnesia",
            "RABBITMQ_LOG_BASE": f"{directory}/log",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{directory}/enabled_plugins",
            "RABBITMQ_CONFIG_FILE": f"{directory}/rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{directory}/advanced.config",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
        }

    def start(self) -> None:
        """Start it and wait until both of its ports answer sensibly."""
        with (self.directory / "out.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(PROGRAM)], env=self._environment(), stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + START_SECS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(
                    f"RabbitMQ did not start:\n{(self.directory / 'out.log').read_text()[-4000:]}"
                )
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            if self.api("GET", "/api/overview")[0] != http.HTTPStatus.OK:
                return False
            self.connect().close()  # asked last: pika logs each failure at length
            return True
        except (exceptions.AMQPError, OSError, http.client.HTTPException):
            return False

    def stop(self) -> None:
        """An orderly stop; the data stays. The server's epmd goes as well."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Stop it without letting it say goodbye."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            # The script is a parent of the Erlang machine: its session is what has to go.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            until = time.monotonic() + 60
            while processes_with("RABBITMQ_MNESIA_BASE", f"{self.directory}/mnesia", but="epmd"):
                if time.monotonic() > until:
                    for pid in processes_with("RABBITMQ_MNESIA_BASE", f"{self.directory}/mnesia", but="epmd"):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
        for pid in processes_with("ERL_EPMD_PORT", str(self._epmd_port)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    # what tests ask of it, over plain pika and HTTP

    def connect(
        self, vhost: str = "/", *, user: str | None = None, password: str | None = None
    ) -> pika.BlockingConnection:
        return pika.BlockingConnection(
            pika.ConnectionParameters(
                self.host,
                self.port,
                vhost,
                pika.PlainCredentials(user or self.user, password or self.password),
                heartbeat=0,
                socket_timeout=CALL_SECS,
                stack_timeout=CALL_SECS,
            )
        )

    @contextlib.contextmanager
    def channel(self, vhost: str = "/") -> Iterator[Any]:
        connection = self.connect(vhost)
        try:
            yield connection.channel()
        finally:
            if connection.is_open:
                connection.close()

    def url(
        self, vhost: str = "/", *, user: str | None = None, password: str | None = None, query: str = ""
    ) -> str:
        quote = lambda text: urllib.parse.quote(text, safe="")
        who = f"{quote(user or self.user)}:{quote(password or self.password)}"
        return f"amqp://{who}@{self.host}:{self.port}/{quote(vhost)}{query}"

    def declare(
        self, queue: str, *, durable: bool = False, vhost: str = "/", arguments: dict[str, Any] | None = None
    ) -> None:
        """Exchange, queue and binding, as the captured ones."""
        until = time.monotonic() + START_SECS
        while True:
            try:
                with self.channel(vhost) as channel:
                    channel.exchange_declare(EXCHANGE, "topic", durable=True, auto_delete=True)
                    channel.queue_declare(queue, durable=durable, arguments=arguments)
                    channel.queue_bind(queue, EXCHANGE, f"StudioML.{queue}")
                return
            except exceptions.ConnectionClosedByBroker as error:
                # What a quorum queue is told on a disk that takes its time.
                if "cluster_not_formed" not in error.reply_text or time.monotonic() > until:
                    raise

    def publish(
        self, queue: str, *bodies: bytes, vhost: str = "/", persistent: bool = False, headers: Any = None
    ) -> None:
        with self.channel(vhost) as channel:
            channel.confirm_delivery()
            for body in bodies:
                properties = pika.BasicProperties(delivery_mode=2 if persistent else None, headers=headers)
                channel.basic_publish("", queue, body, properties, mandatory=True)

    def purge(self, queue: str, *, vhost: str = "/") -> None:
        with self.channel(vhost) as channel:
            channel.queue_purge(queue)

    def delete(self, queue: str, *, vhost: str = "/") -> None:
        with self.channel(vhost) as channel:
            channel.queue_delete(queue)

    def depth(self, queue: str, *, vhost: str = "/") -> int:
        """Messages that wait, exactly (not those that somebody holds)."""
        with self.channel(vhost) as channel:
            return int(channel.queue_declare(queue, passive=True).method.message_count)

    def consumers(self, queue: str, *, vhost: str = "/") -> int:
        with self.channel(vhost) as channel:
            return int(channel.queue_declare(queue, passive=True).method.consumer_count)

    def get(self, queue: str, *, vhost: str = "/") -> tuple[Any, Any, bytes | None]:
        """Take one message away: (method, properties, body), Nones when there is none."""
        with self.channel(vhost) as channel:
            answer: tuple[Any, Any, bytes | None] = channel.basic_get(queue, auto_ack=True)
            return answer

    def api(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request to the management API: (status, answer)."""
        connection = http.client.HTTPConnection(self.host, self.management_port, timeout=CALL_SECS)
        token = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        with contextlib.closing(connection):
            connection.request(
                method,
                path,
                None if body is None else json.dumps(body),
                {"Authorization": f"Basic {token}", "Content-Type": "application/json"},
            )
            response = connection.getresponse()
            raw = response.read()
            return response.status, json.loads(raw) if raw.startswith((b"{", b"[")) else raw

    def add_user(self, name: str, password: str, *, tags: str = "", vhost: str = "/") -> None:
        """A user with all rights on one vhost."""
        quoted = urllib.parse.quote(name, safe="")
        self.api("PUT", f"/api/users/{quoted}", {"password": password, "tags": tags})
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self.api("PUT", f"/api/permissions/{urllib.parse.quote(vhost, safe='')}/{quoted}", everything)

    def add_vhost(self, name: str) -> None:
        quoted = urllib.parse.quote(name, safe="")
        self.api("PUT", f"/api/vhosts/{quoted}")
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self.api("PUT", f"/api/permissions/{quoted}/{urllib.parse.quote(self.user, safe='')}", everything)

    def close_connections(self) -> int:
        """Make the broker close every client connection; how many there were."""
        with self.channel() as _:  # something to wait for: the list of connections lags behind
            names = [one["name"] for one in self.api("GET", "/api/connections")[1]]
        for name in names:
            self.api("DELETE", f"/api/connections/{urllib.parse.quote(name, safe='')}")
        return len(names)


class ForeignServer(RabbitmqServer):
    """One that somebody else started, and that is not ours to stop."""

    def __init__(self, url: str, management_url: str | None) -> None:
        parameters = pika.URLParameters(url)
        self.host, self.port = parameters.host, parameters.port
        self.user, self.password = parameters.credentials.username, parameters.credentials.password
        self.management_port = urllib.parse.urlsplit(management_url or "").port or 15672

    @property
    def restartable(self) -> bool:
        return False

    def start(self) -> None:
        self._not_ours()

    def stop(self) -> None:
        self._not_ours()

    def kill(self) -> None:
        self._not_ours()

    def _not_ours(self) -> None:
        pytest.skip("the broker of RUNNER_TEST_AMQP_URL is not ours to restart")


def processes_with(name: str, value: str, *, but: str | None = None) -> list[int]:
    """Processes whose environment has `name=value`, and that are no `but`."""
    wanted = f"{name}={value}".encode()
    found = []
    for directory in pathlib.Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (directory / "environ").read_bytes().split(b"\0") and (
                    but is None or (directory / "comm").read_text().strip() != but
                ):
                    found.append(int(directory.name))
    return found


@contextlib.contextmanager
def rabbitmq_server(*, extra: str = "", advanced: str = "") -> Iterator[RabbitmqServer]:
    """A running broker of one's own, gone afterwards. `extra` goes into rabbitmq.conf, `advanced` into advanced.config."""
    if not PROGRAM.exists():
        reason = "RabbitMQ is missing: apt-get install -y --no-install-recommends rabbitmq-server"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="rabbitmq-"))
    server = RabbitmqServer(directory, extra=extra, advanced=advanced)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitmqServer]:
    """The broker that the test run shares. Use queue names of your own."""
    if url := os.environ.get("RUNNER_TEST_AMQP_URL"):
        yield ForeignServer(url, os.environ.get("RUNNER_TEST_AMQP_MANAGEMENT_URL"))
        return
    with rabbitmq_server() as server:
        yield server


@pytest.fixture(scope="session")
def own_rabbitmq() -> Iterator[RabbitmqServer]:
    """A broker for tests that stop it; shared among those."""
    if os.environ.get("RUNNER_TEST_AMQP_URL"):
        pytest.skip("the broker of RUNNER_TEST_AMQP_URL is not ours to restart")
    with rabbitmq_server() as server:
        yield server
