"""The real StudioML client, in a virtual environment of its own (tools/client_env.py), with a home directory of its own.

Listed in `pytest_plugins` of tests/conftest.py. As a test uses it::

    client = account(client_interpreter, tmp_path / "home", client_broker, seaweedfs, bucket)
    client.submit(workspace, "--queue=rmq_x", "--experiment=one", "script.py", "--arg", "two words")
    with serving(tmp_path / "daemon", rabbitmq, client_environments, match="^rmq_x$") as daemon:
        run = ended(daemon, "one")
    client.fetch("one", "output", "modeldir")                          # read by the client's own code
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import pytest

from tests.servers.daemon import Daemon
from tests.servers.proxy import proxy
from tests.servers.seaweedfs import ADMIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.rabbitmq import RabbitmqServer
    from tests.servers.seaweedfs import SeaweedFs

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
MAKER = CHECKOUT / "tools" / "client_env.py"
NO_PYTHON = 3
#: How long one command of the client may take: it imports half a cloud, and other tests may share the machine.
PATIENCE_SECS = 250
#: Class and method of AMQP's frames that confirm.
BASIC_ACK = b"\x00\x3c\x00\x50"


@dataclasses.dataclass(frozen=True)
class StudiomlClient:
    """An experimenter's account: a home directory, a configuration, and the client."""

    interpreter: pathlib.Path
    home: pathlib.Path
    config: pathlib.Path

    def submit(self, workspace: pathlib.Path, *arguments: str) -> str:
        """`studio-run` in a workspace; what it printed. Returns when the broker has confirmed the message."""
        return self._run(["studio-run", f"--config={self.config}", *arguments], cwd=workspace)

    def python(self, program: str, *arguments: str) -> Any:
        """Runs a program in the client's environment, in the home directory; the last line it prints, as JSON."""
        printed = self._run(["python", "-c", program, *arguments], cwd=self.home)
        return json.loads(printed.splitlines()[-1])

    def fetch(self, key: str, *tags: str) -> dict[str, Any]:
        """`{tag: {name: text}}`, or `{tag: text}` of a single file: results as the client's own code gets them from its storage."""
        found: dict[str, Any] = self.python(FETCH, str(self.config), key, *tags)
        return found

    def _env(self) -> dict[str, str]:
        return {
            "PATH": f"{self.interpreter.parent}{os.pathsep}{os.defpath}{os.pathsep}/usr/local/bin",
            "HOME": str(self.home),
            "TMPDIR": str(self.home),
            "LANG": "C.UTF-8",
            "GIT_CEILING_DIRECTORIES": "/",  # a workspace is no repository, wherever the tests' directory is
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _run(self, argv: list[str], cwd: pathlib.Path) -> str:
        argv = [str(self.interpreter.parent / argv[0]), *argv[1:]]
        ended = subprocess.run(
            argv, cwd=cwd, env=self._env(), capture_output=True, text=True, timeout=PATIENCE_SECS, check=False
        )
        assert ended.returncode == 0, f"{argv} ended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout


#: The client's database, its Artifact class and its untar: what `studio` itself reads results with. A directory of its own
#: for each, since the client takes a local copy for the newer one.
FETCH = """
import json, os, sys, tempfile
from studio import model
config, key, *tags = sys.argv[1:]
db = model.get_db_provider(model.get_config(config))
artifacts = db.get_experiment(key, getinfo=False).artifacts
found = {}
for tag in tags:
    place = db.get_artifact(artifacts[tag], local_path=os.path.join(tempfile.mkdtemp(), tag), only_newer=False)
    if place is None:
        found[tag] = None
    elif os.path.isdir(place):
        names = [os.path.join(where, name) for where, _, files in os.walk(place) for name in files]
        found[tag] = {os.path.relpath(name, place): open(name, errors="replace").read() for name in names}
    else:
        found[tag] = open(place, errors="replace").read()
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def client_interpreter() -> pathlib.Path:
    """The Python of the client's environment, made at the first use on a machine."""
    ended = subprocess.run([sys.executable, str(MAKER)], capture_output=True, text=True, check=False)
    if ended.returncode == NO_PYTHON and os.environ.get("CI") != "true":
        pytest.skip(ended.stderr.strip())
    assert ended.returncode == 0, ended.stderr
    return pathlib.Path(ended.stdout.strip())


@pytest.fixture(scope="session")
def client_broker(rabbitmq: RabbitmqServer) -> Iterator[str]:
    """The URL of the broker for clients: it answers as if it were on another machine.

    The client notes that it waits for a confirmation after it has published; one that is there before, as happens on
    loopback, ends its connection, and the submission fails although the message was published.
    """
    # It looks for the confirmation after a second.
    with proxy(rabbitmq.host, rabbitmq.port, delay=lambda answer: 0.9 * (BASIC_ACK in answer)) as distant:
        who = f"{rabbitmq.user}:{rabbitmq.password}@{rabbitmq.host}:{distant.port}"
        yield f"amqp://{who}/%2F?connection_attempts=3&retry_delay=.5&socket_timeout=5"


@pytest.fixture(scope="session")
def client_environments() -> pathlib.Path:
    """The runner's cache of environments for the client's messages, kept from one test run to the next.

    Each of them names all packages of the client's environment: some ten seconds to build.
    """
    folder = CHECKOUT / ".test-venvs" / "env-cache"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def account(
    interpreter: pathlib.Path,
    home: pathlib.Path,
    broker: str,
    seaweedfs: SeaweedFs,
    bucket: str,
    **changes: Any,
) -> StudiomlClient:
    """An experimenter who publishes at `broker` (`client_broker`) and whose results go to `bucket`.

    `changes` are members of the configuration.
    """
    home.mkdir(parents=True, exist_ok=True)
    seaweedfs.make_bucket(bucket)
    credentials = {"aws": {"access_key": ADMIN.access_key, "secret_access_key": ADMIN.secret_key}}
    storage = {
        "type": "s3",
        "endpoint": f"http://{seaweedfs.endpoint}",
        "bucket": bucket,
        "credentials": credentials,
    }
    config = {
        "database": storage | {"authentication": "none"},
        "storage": storage,
        "cloud": {"queue": {"rmq": broker}},
        "verbose": "error",
        "saveMetricsFrequency": "1m",
        "saveWorkspaceFrequency": "1m",
        "experimentLifetime": "30m",
        "sleep_time": 1,
        "env": {},
        "resources_needed": {"cpus": 1, "gpus": 0, "hdd": "1gb", "ram": "1gb"},
    }
    path = home / f"config-{time.monotonic_ns()}.yaml"
    path.write_text(json.dumps(config | changes))  # JSON is YAML
    return StudiomlClient(interpreter, home, path)


@contextlib.contextmanager
def serving(
    directory: pathlib.Path,
    rabbitmq: RabbitmqServer,
    environments: pathlib.Path,
    *arguments: str,
    match: str,
) -> Iterator[Daemon]:
    """A daemon that takes the work of the queues that match; drained at the end, when nothing may be left in them."""
    broker = (f"--amqp-url={rabbitmq.amqp_url}", f"--amqp-mgt-url={rabbitmq.management_url}")
    daemon = Daemon(
        directory,
        *broker,
        f"--queue-match={match}",
        "--queue-refresh=1s",
        *arguments,
        environments=environments,
    )
    try:
        daemon.start()
        yield daemon
        served = [one["queue"] for one in daemon.get("/api/queues")["queues"]]
        assert daemon.stop() == 0
        used = [
            queue for queue in served if rabbitmq.api("GET", f"/api/queues/%2F/{queue}")[0] == HTTPStatus.OK
        ]
        # What was not acknowledged is in its queue again, now that the connection is closed.
        assert {queue: rabbitmq.depth(queue) for queue in used} == dict.fromkeys(used, 0)
        for queue in used:
            rabbitmq.delete(queue)
    finally:
        daemon.kill()


def ended(daemon: Daemon, experiment: str, count: int = 1) -> dict[str, Any]:
    """What the daemon tells of an experiment that is over, of the last of `count` runs."""

    def over() -> list[dict[str, Any]]:
        recent = [one for one in daemon.get("/api/runs")["recent"] if one["experiment"] == experiment]
        return recent if len(recent) >= count else []

    return daemon.until(over, 200)[-1]  # it may have an environment to build
