"""The whole daemon in the test's loop: real processes and real files, the memory queue, and no environment to build."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
import tarfile
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from runner import config, errors
from runner.credentials.watch import Watch
from runner.daemon.service import Parts, Service
from runner.daemon.stop import Stop
from runner.executors.base import Executor, Prepared, RunSpec
from runner.experiment import lifecycle
from runner.queues.memory import MemoryBackend
from runner.storage.registry import Stores
from runner.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    import pytest

    from runner.credentials.accounts import Account

LIMIT_SECS = 100.0  #: for any wait: generous, since nothing here is about speed


class ThisPython(Executor):
    """Runs workloads with the interpreter of the tests: environments have tests of their own."""

    @contextlib.asynccontextmanager
    async def prepare(self, spec: RunSpec, log: Path) -> AsyncIterator[Prepared]:
        yield Prepared(argv=(sys.executable, spec.filename or "", *spec.args), env=spec.env)

    def check(self, engine: str | None) -> None:
        if engine is not None:
            raise errors.NoEngine(f"it wants a {engine} image")


class Daemon:
    """A running daemon and its surroundings."""

    def __init__(self, root: Path, queue: MemoryBackend, service: Service, settings: config.Config) -> None:
        self.root = root
        self.queue = queue
        self.service = service
        self.config = settings
        self.storage = root / "storage"
        self.began = time.time()
        self.task = asyncio.create_task(service.run())

    def message(self, script: str, key: str = "exp", **experiment: Any) -> bytes:
        """A request for that script, in the form of the client, on directory storage."""
        workspace = self.root / f"ws-{key}"
        workspace.mkdir(exist_ok=True)
        (workspace / "main.py").write_text(script)
        self.storage.mkdir(exist_ok=True)
        with tarfile.open(self.storage / f"{key}-ws.tar", "w") as archive:
            archive.add(workspace / "main.py", "main.py")
        artifacts = {"workspace": {"mutable": False, "unpack": True, "key": f"{key}-ws.tar"}} | {
            tag: {"mutable": True, "unpack": True, "key": f"experiments/{key}/{tag}.tar"}
            for tag in ("modeldir", "output", "retval", "_metadata")
        }
        for artifact in artifacts.values():
            artifact["qualified"] = f"file://{self.storage}/{artifact['key']}"
        settings = experiment.pop("config", {})
        base = {"key": key, "filename": "main.py", "args": [], "artifacts": artifacts}
        return json.dumps({"experiment": base | experiment, "config": settings}).encode()

    async def submit(self, script: str, key: str = "exp", queue: str = "rmq_a", **experiment: Any) -> bytes:
        """Declare the queue and publish a request."""
        body = self.message(script, key, **experiment)
        self.queue.declare(queue)
        await self.queue.publish(self.queue.ref(queue), body)
        return body

    async def until(self, claim: Callable[[], Any]) -> Any:
        """Wait until it is true; what it gave."""
        async with asyncio.timeout(LIMIT_SECS):
            while True:
                if self.task.done():
                    self.task.result()
                with contextlib.suppress(FileNotFoundError):
                    if found := claim():
                        return found
                await asyncio.sleep(0.02)

    async def listening(self, *queues: str) -> None:
        """Wait until the daemon asks all of these for their next message."""
        wanted = {f"next {self.queue.ref(queue)}" for queue in queues}
        await self.until(lambda: wanted <= {task.get_name() for task in asyncio.all_tasks()})

    def came_back(self, queue: str = "rmq_a") -> bool:
        """Whether a message was put back: it waits, or is held back for a while."""
        waiting = self.queue.broker.queues[queue].ready
        return bool(self.queue._delayed) or any(message.redelivered for message in waiting)

    async def settled(self, queue: str = "rmq_a") -> None:
        """Wait until no message waits or is held, and nothing runs."""
        await self.until(
            lambda: (
                not self.queue.depth(queue)
                and not self.queue.held
                and not self.queue._delayed
                and not self.runs
            )
        )

    @property
    def runs(self) -> list[Path]:
        """Directories of runs."""
        folder = self.config.paths.working_dir / "runs"
        return list(folder.iterdir()) if folder.exists() else []

    def printed(self) -> bytes:
        """What the only run in progress has printed so far."""
        return b"".join(
            path.read_bytes() for run in self.runs for path in run.glob("experiments/*/output/output")
        )

    def documents(self) -> list[dict[str, Any]]:
        """The metadata documents in storage, oldest first."""
        return [
            json.loads(path.read_text()) for path in sorted(self.storage.glob("metadata/scrape-host-*.json"))
        ]

    def output(self, key: str = "exp") -> str:
        """The stored output."""
        with tarfile.open(self.storage / "experiments" / key / "output.tar") as archive:
            assert archive.getnames() == ["output"]
            member = archive.extractfile("output")
            assert member is not None
            return member.read().decode()

    async def get(self, path: str) -> tuple[int, Any]:
        """What the daemon answers to that on its HTTP port: status and JSON."""
        return await self._answer("GET", path)

    async def post(self, path: str) -> tuple[int, Any]:
        """The same, of something that it is to do."""
        return await self._answer("POST", path)

    async def _answer(self, method: str, path: str) -> tuple[int, Any]:
        address = json.loads((self.config.paths.working_dir / "studio-runner.json").read_text())["address"]
        request = urllib.request.Request(f"http://{address}{path}", method=method)

        def exchange() -> tuple[int, Any]:
            try:
                with urllib.request.urlopen(request, timeout=LIMIT_SECS) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as refused:
                with refused:
                    return refused.code, json.load(refused)

        return await asyncio.to_thread(exchange)

    def dead(self) -> list[dict[str, Any]]:
        """The dead letters."""
        return [
            json.loads(path.read_text()) for path in self.config.paths.state_dir.glob("dead-letter/*/*.json")
        ]


@contextlib.asynccontextmanager
async def daemon(
    root: Path,
    queue: MemoryBackend | None = None,
    *,
    certs: dict[str, MemoryBackend] | None = None,
    drain: bool = True,
    **changes: Any,
) -> AsyncIterator[Daemon]:
    """A daemon that serves. On exit it is drained, unless the test has ended it.

    With `certs` it does not serve `queue`, but whatever lies in the directory `certs`: each file opens an account of the same
    broker, which is put into `certs` under its name.
    """
    queue = queue or MemoryBackend()
    settings = configuration(root)
    for part, values in changes.items():
        settings = dataclasses.replace(
            settings, **{part: dataclasses.replace(getattr(settings, part), **values)}
        )
    logs.configure(dataclasses.replace(settings.logs, level="debug", format="json"), sys.stderr)

    def opened(account: Account) -> MemoryBackend:
        assert certs is not None
        certs[account.label] = MemoryBackend(account.label, broker=queue.broker)
        return certs[account.label]

    parts = Parts(
        backends=[queue] if certs is None else [],
        watches=[] if certs is None else [Watch(root / "certs")],
        backend=opened,
        executor=lambda _: ThisPython(),
        stores=Stores(settings.s3),
        cache=lambda _: None,
    )
    service = Service(settings, parts, Stop())
    running = Daemon(root, queue, service, settings)
    try:
        yield running
    finally:
        if not running.task.done():
            if not drain:
                service.stop.force.set()
            service.stop.drain.set()
        async with asyncio.timeout(LIMIT_SECS):
            await running.task
        logs.flush()
        await queue.aclose()


def not_before_it_printed(it: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose time is over is ended as soon as it has printed something: it may be slow to start."""
    loop, stop = asyncio.get_running_loop(), lifecycle.Experiment.stop

    def later(*args: Any, **more: Any) -> None:
        if it.printed():
            stop(*args, **more)
        else:
            loop.call_later(0.02, functools.partial(later, *args, **more))

    monkeypatch.setattr(lifecycle.Experiment, "stop", later)


def configuration(root: Path) -> config.Config:
    """Discovery often, a free port, everything below `root`."""
    work = root / "work"
    return config.Config(
        paths=config.Paths(working_dir=work, state_dir=work / "state"),
        queues=config.Queues(match=re.compile("^rmq_"), refresh_secs=0.05),
        machine=config.Machine(max_cores=min(2, os.cpu_count() or 1)),
        cache=config.ArtifactCache(),
        environments=config.Environments(cache_dir=work / "environments"),
        containers=config.Containers(),
        s3=config.S3(),
        http=config.Http(host="127.0.0.1", port=0),
        images=config.Images(cache_dir=work / "images"),
        logs=config.Logs(),
        runs=config.Runs(),
        limits=config.Limits(interval_secs=0.05),
    )
