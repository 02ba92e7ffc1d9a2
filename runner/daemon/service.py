"""The daemon as a whole: what is opened in which order, what runs beside what, and how it ends.

::

    working directory locked -> ledger, dead letters, run states (sweep) -> nursery -> HTTP port -> accounts opened
      -> ready: catalog refreshes | dispatcher | existence of queues | limits | watchdog
    first signal: no new work, runs finish (or get --grace), accounts closed, exit 0
    second signal: at once, exit 128 + signal
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import shutil
import socket
import time
from typing import TYPE_CHECKING

import structlog
from prometheus_client import CollectorRegistry

from runner import __version__, errors, units
from runner.daemon import lock, memoryroom, reading, runstate, troubles
from runner.daemon.accounts import Accounts
from runner.daemon.api import Api
from runner.daemon.attempts import Ledger
from runner.daemon.deadletters import DeadLetters
from runner.daemon.diskroom import Cache, DiskRoom
from runner.daemon.dispatch import Dispatcher
from runner.daemon.endpoints import Endpoints
from runner.daemon.interrupted import Interrupted
from runner.daemon.runs import Runs
from runner.daemon.stop import Stop
from runner.daemon.troubles import Troubles
from runner.experiment import runas, workspace
from runner.experiment.tools import Tools
from runner.process import cgroups
from runner.process.spawner import Spawner
from runner.queues.catalog import Added, Catalog
from runner.resources import cards, probe
from runner.resources.allocator import Allocator
from runner.resources.gpupool import GpuPool
from runner.resources.gpus import Nvml
from runner.resources.gpuwatch import GpuWatch
from runner.resources.usage import Cards, Sampler
from runner.telemetry import metrics as telemetry
from runner.telemetry.http import HttpServer
from runner.telemetry.notify import Notifier

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from pathlib import Path

    from runner.config import Config
    from runner.credentials.accounts import Account
    from runner.credentials.watch import Watch
    from runner.executors.base import Executor
    from runner.process.base import User
    from runner.queues.base import QueueBackend
    from runner.queues.catalog import Change
    from runner.storage.cache import ArtifactCache
    from runner.storage.registry import Stores
    from runner.telemetry.http import Readiness

log = structlog.get_logger(__name__)

#: Worker threads for transfers, packing and other blocking work.
THREADS = 32
#: How long a forced stop waits for runs to let go.
FORCE_SECS = 8.0
#: How often it is looked for what is kept for later runs and none has used for long.
TIDY_SECS = 3600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The concrete parts, chosen by the composition root (`cli.serve`)."""

    backends: Sequence[QueueBackend]  #: the accounts that options name
    watches: Sequence[Watch] = ()  #: directories of credentials
    backend: Callable[[Account], QueueBackend] | None = None  #: what an account of theirs is served by
    executor: Callable[[Spawner], Executor]
    stores: Stores
    cache: Callable[[telemetry.Metrics], ArtifactCache | None]


def private_directory(path: Path, option: str) -> Path:
    """Make a directory that only this user may enter.

    Raises:
        errors.UsageError: it cannot be made, or it belongs to somebody else.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner, maker = path.stat().st_uid, path.lstat().st_uid  # a link is as good as who has made it
    except OSError as exc:
        raise errors.UsageError(f"{option} {path}: cannot be used: {exc.strerror}") from exc
    if strangers := {owner} - {os.geteuid()} | {maker} - {os.geteuid(), 0}:
        raise errors.UsageError(
            f"{option} {path}: belongs to user {min(strangers)}, not to {os.geteuid()}; name a directory of your own"
        )
    return path


def _free(allocator: Allocator) -> telemetry.Free:
    free = allocator.free
    return telemetry.Free(
        cores=free.cpus,
        mem_bytes=free.ram_bytes,
        disk_bytes=free.hdd_bytes,
        gpu_slots=free.gpus,
        gpus=[
            telemetry.Gpu(
                uuid=state.card.uuid,
                name=state.card.name,
                slots=state.slots,
                free_slots=state.free_slots,
                memory_bytes=state.card.memory_bytes,
                used_bytes=state.used_bytes,
                fenced=bool(state.fenced),
            )
            for state in allocator.gpus.cards()
        ],
    )


async def _cards_in_use(gpus: GpuWatch, uuids: Sequence[str], pids: Sequence[int]) -> Cards | None:
    """What a run makes of its cards; None when the driver does not tell of all of them."""
    told = await gpus.usage(uuids, pids)
    if len(told) < len(uuids):
        return None
    memory = [use.memory_bytes for use in told.values() if use.memory_bytes is not None]
    rates = [use.utilization for use in told.values() if use.utilization is not None]
    return Cards(
        memory_bytes=sum(memory) if len(memory) == len(told) else None,
        utilization=sum(rates) if len(rates) == len(told) else None,
    )


async def _tidying(executor: Executor) -> None:
    """For ever."""
    while True:
        await executor.tidy()
        await asyncio.sleep(TIDY_SECS)


class Service:
    """One daemon. `run` is its whole life."""

    def __init__(self, config: Config, parts: Parts, stop: Stop | None = None) -> None:
        self._config = config
        self._parts = parts
        self._host = socket.gethostname()
        self._metrics = telemetry.Metrics(CollectorRegistry(), self._host)
        self.stop = stop or Stop()
        self._notifier = Notifier()
        self._began = time.monotonic()

    async def run(self) -> int:
        """Serve until told to stop; the exit code.

        Raises:
            errors.UsageError: it cannot start like this.
        """
        paths = self._config.paths
        asyncio.get_running_loop().set_default_executor(
            concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="worker")
        )
        user = runas.resolve(self._config.runs.run_as)
        with self.stop.on_signals(), lock.sole_daemon(paths.working_dir):
            state_dir, runs_dir = self._directories(user)
            async with contextlib.AsyncExitStack() as stack:
                stack.enter_context(lock.state_held(paths.working_dir, state_dir))
                ledger = Ledger(state_dir / "ledger.sqlite")
                stack.callback(ledger.close)
                states = runstate.RunStates(state_dir / "runs")
                undelivered, interrupted = await asyncio.to_thread(
                    runstate.sweep, states, runs_dir, keep=paths.keep_runs
                )
                left_behind = await asyncio.to_thread(runstate.messages, [*undelivered, *interrupted])
                interrupted = runstate.correct(ledger, states, interrupted)
                self._temporary_cache(stack)
                spawner = Spawner()
                await spawner.open()
                stack.push_async_callback(spawner.aclose)
                tools = await self._tools(spawner, await self._groups(), user)
                tools.gpus.on_fenced = lambda fenced: runs.gpus_failed(fenced)  # noqa: PLW0108 - made below
                stack.callback(self._parts.stores.close)
                endpoints = Endpoints(lambda: dispatcher.notify())  # noqa: PLW0108 - made below
                stack.push_async_callback(endpoints.aclose)
                dead_letters = DeadLetters(state_dir / "dead-letter")
                left = Interrupted(tools, states, interrupted)
                runs = Runs(
                    config=self._config,
                    tools=tools,
                    ledger=ledger,
                    dead_letters=dead_letters,
                    states=states,
                    undelivered=undelivered,
                    interrupted=interrupted,
                    unrecorded=left.add,
                    endpoints=endpoints,
                )
                disk = self._disk(tools)
                tools.allocator.closed = lambda: disk.why_not
                dispatcher = Dispatcher(
                    allocator=tools.allocator,
                    gpus=tools.gpus,
                    runs=runs,
                    ledger=ledger,
                    endpoints=endpoints,
                    metrics=self._metrics,
                    left_behind=left_behind,
                )
                await disk.look()
                catalog = self._catalog(dispatcher)
                accounts = Accounts(
                    catalog=catalog, runs=runs, watches=self._parts.watches, backend=self._parts.backend
                )
                stack.push_async_callback(accounts.aclose)
                api = Api(runs, dispatcher, catalog, dead_letters, problems=lambda: accounts.problems)
                trouble = Troubles(lambda: dispatcher.queues)
                await self._listen(stack, self._health(catalog, accounts, disk, trouble), api)
                for backend in self._parts.backends:
                    await backend.open()
                    stack.push_async_callback(backend.aclose)
                services = self._of_the_machine(tools) | {
                    "catalog": catalog.run(self._config.queues.refresh_secs),
                    "credentials": accounts.run(),
                    "disk": disk.run(),
                    "existence": dispatcher.watch_existence(),
                    "interrupted": left.run(),
                    "limits": self._limits(runs),
                    "troubles": trouble.run(),
                }
                return await self._serve(services, dispatcher, runs)

    def _catalog(self, dispatcher: Dispatcher) -> Catalog:
        return Catalog(
            self._config.queues,
            counters=self._metrics,
            changed=lambda changes: self._changed(dispatcher, changes),
            backends=self._parts.backends,
        )

    def _of_the_machine(self, tools: Tools) -> dict[str, Coroutine[object, object, None]]:
        """The services that know nothing of messages."""
        return {
            "gpus": tools.gpus.run(),
            "leftovers": tools.executor.reap(),
            "memory": memoryroom.follow(
                tools.allocator, lambda: probe.memory_available(self._config.machine)
            ),
            "reading": reading.prepare(),
            "sampler": tools.sampler.run(),
            "tidying": _tidying(tools.executor),
            "watchdog": self._notifier.watchdog(),
        }

    def _directories(self, user: User | None) -> tuple[Path, Path]:
        """That of the state, and that of the runs. Raises errors.UsageError."""
        paths = self._config.paths
        state_dir = private_directory(paths.state_dir, "--state-dir")
        runs_dir = private_directory(paths.working_dir / "runs", "--working-dir")
        runs_dir.chmod(0o700)  # an earlier daemon may have opened it for others
        if user is not None:
            runas.open_up(runs_dir, user)
        workspace.spread(runs_dir)
        return state_dir, runs_dir

    def _temporary_cache(self, stack: contextlib.AsyncExitStack) -> None:
        """--cache-create: the directory is made now and removed at exit, unless it was there before."""
        cache = self._config.cache
        if cache.temporary and cache.directory is not None and not cache.directory.exists():
            private_directory(cache.directory, "--cache-dir")
            stack.callback(shutil.rmtree, cache.directory, ignore_errors=True)

    async def _groups(self) -> cgroups.Groups | None:
        """How limits are seen to: by control groups, or (None) by measuring."""
        try:
            groups = await asyncio.to_thread(cgroups.Groups.find)
        except cgroups.Unavailable as exc:
            log.info("limits", mechanism="measured", why=str(exc))
            return None
        log.info("limits", mechanism=str(groups))
        return groups

    def _disk(self, tools: Tools) -> DiskRoom:
        paths = self._config.paths
        caches = [Cache(directory=self._config.environments.cache_dir, make_room=tools.executor.make_room)]
        if (cache := tools.cache) is not None and (directory := self._config.cache.directory) is not None:
            # What is fetched again costs less than what is built again.
            caches.insert(
                0, Cache(directory=directory, make_room=lambda needed: asyncio.to_thread(cache.evict, needed))
            )
        return DiskRoom([paths.working_dir, paths.state_dir], caches, changed=tools.allocator.reconsider)

    async def _tools(self, spawner: Spawner, groups: cgroups.Groups | None, user: User | None) -> Tools:
        volume = self._config.paths.working_dir
        gpus = await self._gpus()
        machine = probe.machine(self._config.machine, volume)
        if machine.ram_bytes < self._config.machine.max_mem_bytes:
            log.warning(
                "less memory than --max-mem is available now; more is given away when it is",
                max_mem=units.format_bytes(self._config.machine.max_mem_bytes),
                available=units.format_bytes(machine.ram_bytes),
            )
        allocator = Allocator(machine, lambda: probe.disk_free(volume), gpus.pool)
        gpus.changed = allocator.reconsider
        allocator.on_change(gpus.wake)
        self._metrics.watch_free(lambda: _free(allocator))
        sampler = Sampler(cards=functools.partial(_cards_in_use, gpus), cost=self._metrics.sampled)
        self._metrics.watch_use(lambda: sampler.now)
        return Tools(
            config=self._config,
            host=self._host,
            spawner=spawner,
            executor=self._parts.executor(spawner),
            stores=self._parts.stores,
            cache=self._parts.cache(self._metrics),
            metrics=self._metrics,
            allocator=allocator,
            gpus=gpus,
            sampler=sampler,
            groups=groups,
            user=user,
        )

    async def _gpus(self) -> GpuWatch:
        """The cards that may be used; with --cpu-only nobody looks for any. Raises errors.UsageError for the operator's table."""
        machine = self._config.machine
        table = cards.load(machine.gpu_cards)
        pool = GpuPool(None if machine.cpu_only else table.slots)
        gpus = GpuWatch(pool, None if machine.cpu_only else Nvml(), table, os.environ)
        await gpus.look()
        return gpus

    def _health(
        self, catalog: Catalog, accounts: Accounts, disk: DiskRoom, trouble: Troubles
    ) -> Callable[[], Readiness]:
        """What /readyz tells."""

        def readiness() -> Readiness:
            problems = dict(accounts.problems) | ({"disk": disk.why_not} if disk.why_not else {})
            open_ = not self.stop.drain.is_set() and not disk.why_not
            return troubles.readiness(catalog.status(), trouble, problems, open_=open_)

        self._metrics.watch_troubles(
            lambda: trouble.queues, lambda: troubles.silent(catalog.status(), trouble)
        )
        return readiness

    async def _listen(
        self, stack: contextlib.AsyncExitStack, readiness: Callable[[], Readiness], api: Api
    ) -> None:
        server = HttpServer(
            self._config.http,
            render_metrics=self._metrics.render,
            readiness=readiness,
            routes=api.routes(),
        )
        address = await server.start()
        stack.push_async_callback(server.stop)
        lock.announce(self._config.paths.working_dir, address)
        log.info("listening", address=f"{address[0]}:{address[1]}")

    async def _serve(
        self, services: Mapping[str, Coroutine[object, object, None]], dispatcher: Dispatcher, runs: Runs
    ) -> int:
        sides = [asyncio.create_task(service, name=name) for name, service in services.items()]
        log.info(
            "serving",
            version=__version__,
            host=self._host,
            accounts=[backend.account for backend in self._parts.backends],
            certs=[str(watch.path) for watch in self._parts.watches],
            queue_match=self._config.queues.match.pattern,
            working_dir=str(self._config.paths.working_dir),
            state_dir=str(self._config.paths.state_dir),
            start_secs=round(time.monotonic() - self._began, 3),
        )
        self._notifier.ready("serving")
        try:
            await self._first(self.stop.drain.wait(), *sides)
            self._notifier.stopping("draining")
            return await self._stop(dispatcher, runs)
        finally:
            for side in sides:
                side.cancel()
            await asyncio.gather(*sides, return_exceptions=True)
            # Before anything is closed under them: a run whose process is ended by that must not take it for its own end.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FORCE_SECS):
                    await dispatcher.drain()
                    await runs.abort()

    def _changed(self, dispatcher: Dispatcher, changes: Sequence[Change]) -> None:
        for change in changes:
            if isinstance(change, Added):
                dispatcher.serve(change.queue, change.backend)
            else:
                dispatcher.forget(change.queue)
                self._metrics.queue_gone(change.backend.kind, str(change.queue))

    async def _first(self, stopped: Coroutine[object, object, object], *sides: asyncio.Task[None]) -> None:
        """Wait for the stop. A service that fails ends the daemon, loudly: half a daemon would be worse."""
        waiting = asyncio.create_task(stopped)
        pending = {waiting, *sides}
        try:
            while not waiting.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            waiting.cancel()

    async def _stop(self, dispatcher: Dispatcher, runs: Runs) -> int:
        """Drain, or be forced; the exit code. What still runs is left to the caller."""
        began = time.monotonic()
        ending = asyncio.create_task(self._drain(dispatcher, runs), name="drain")
        forced = asyncio.create_task(self.stop.force.wait(), name="forced")
        await asyncio.wait({ending, forced}, return_when=asyncio.FIRST_COMPLETED)
        forced.cancel()
        if not ending.done():
            ending.cancel()
            return 128 + self.stop.signal
        ending.result()
        log.info("drained", secs=round(time.monotonic() - began, 1))
        return 0

    async def _drain(self, dispatcher: Dispatcher, runs: Runs) -> None:
        await dispatcher.drain()
        grace_secs = self._config.runs.grace_secs
        log.info("takes no more work", running=len(runs), grace_secs=grace_secs)
        finished = asyncio.create_task(runs.finished(), name="runs finished")
        if grace_secs is not None:
            signalled = asyncio.create_task(self.stop.signalled.wait(), name="signalled")
            await asyncio.wait({finished, signalled}, return_when=asyncio.FIRST_COMPLETED)
            signalled.cancel()
            runs.stop_all(errors.Reason.DRAINED, "the runner was told to stop", grace_secs)
        await finished

    async def _limits(self, runs: Runs) -> None:
        """End the daemon after so many tasks, or after so long without one (INTEROP.md 8.6)."""
        limits = self._config.limits
        if not limits.tasks and not limits.idle_secs:
            return
        while True:
            if limits.tasks and runs.started_total >= limits.tasks:
                log.info("task limit reached", tasks=runs.started_total)
                break
            if limits.idle_secs and not len(runs) and time.monotonic() - runs.idle_since >= limits.idle_secs:
                log.info("idle limit reached", idle_secs=limits.idle_secs)
                break
            await asyncio.sleep(limits.interval_secs)
        self.stop.ask()
