"""What running experiments use, sampled: one look at /proc for all of them, in a thread, seldom enough to cost nothing.

Processor time and memory of a run are those of all processes below its supervisor, wherever they have gone; of a run in a container
of an engine, those of the container's first process and all below it, once it is known which that is. Memory is what would be free
without it: private pages, shared memory and swap; not the files that it has mapped, which the kernel gives back when it
must. Private pages that forks still share with each other are counted for each, so the sum is never too low; only when it is
above the run's limit is it asked how much of it is shared (PSS: the kernel walks all page tables for that), and the answer is what
decides. So a run is never ended for pages that it has once.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import os
import shutil
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from runner.resources import disk

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from runner.process.base import ProcessExit

log = structlog.get_logger(__name__)

EVERY_SECS = 2.0  #: between two looks at the processes
DISK_SECS = 5.0  #: between two measurements of one run's directory
#: How often a run that is elsewhere is looked for, each time after twice as long: it costs a process of the engine's client.
SEARCHES = 6
#: A look, or a measurement, may cost one part in so many of one core: what takes longer is done less often.
SHARE, DISK_SHARE = 200.0, 50.0
#: Of what a run may write: when it may have reached that, going by the free space, it is measured earlier.
EARLY = 0.8
#: Directories up to so many entries are measured at the end of a run that was too short to be sampled.
SMALL_ENTRIES = 2000
#: Over less than that the kernel's count of processor time (a hundredth of a second each) makes no rate.
MIN_SECS = 0.5
_TICKS = os.sysconf("SC_CLK_TCK")


class First(NamedTuple):
    """The first process of a run that is not below its supervisor: it and all below it are the run's."""

    pid: int
    started: int  #: in the kernel's ticks; another process may get its number later, and is none of the run's


class Cards(NamedTuple):
    """What a run's graphics cards tell of it. None: not all of them do."""

    memory_bytes: int | None
    utilization: float | None  #: of all its cards together, by whomever: 1.5 is one and a half


@dataclasses.dataclass(kw_only=True)
class Series:
    """The peak and the mean of a figure."""

    now: float = 0.0
    peak: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """One more sample."""
        self.now = value
        self.peak = max(self.peak, value)
        self.total += value
        self.count += 1

    @property
    def mean(self) -> float:
        """0 when there are none."""
        return self.total / self.count if self.count else 0.0


@dataclasses.dataclass(kw_only=True)
class Use:
    """What one run uses. Changes while it runs, in the daemon's loop."""

    cores: Series = dataclasses.field(default_factory=Series)
    memory: Series = dataclasses.field(default_factory=Series)
    disk: Series = dataclasses.field(default_factory=Series)
    card_memory: Series = dataclasses.field(default_factory=Series)
    card_utilization: Series = dataclasses.field(default_factory=Series)
    processes: int = 0
    disk_complete: bool = True  #: False: it hides some of what it writes, in places that cannot be measured

    def measure_small(self, directory: Path) -> None:
        """Of a run that was too short to be sampled: its directory as it is now, unless that is large. Blocking."""
        measured = disk.measure(directory, max_entries=SMALL_ENTRIES)
        if measured.complete:
            self.disk.add(measured.bytes)

    def told(self, ended: ProcessExit | None = None) -> dict[str, Any]:
        """For `runner` of the metadata document: peak and mean of each. `ended` tells of runs too short for samples."""
        cores, memory = self.cores, self.memory
        if ended is not None and ended.elapsed_secs > 0 and ended.max_rss_bytes:  # 0: nobody knows
            mean = (ended.user_secs + ended.system_secs) / ended.elapsed_secs
            cores = Series(peak=max(cores.peak, mean), total=mean, count=1)
            if not memory.count:
                memory = Series(peak=ended.max_rss_bytes, total=ended.max_rss_bytes, count=1)
        told: dict[str, Any] = {"samples": self.memory.count}
        for name, series, digits in (
            ("cpu_cores", cores, 3),
            ("memory_bytes", memory, None),
            ("disk_bytes", self.disk, None),
            ("gpu_memory_bytes", self.card_memory, None),
            ("gpu_utilization", self.card_utilization, 3),
        ):
            if series.count:
                told[name] = {"peak": round(series.peak, digits), "mean": round(series.mean, digits)}
        return told


@dataclasses.dataclass(kw_only=True, eq=False)
class _Watched:
    """A run that is watched. `use` and what follows it belong to the loop."""

    supervisor: int | None
    directory: Path
    ram_bytes: int
    hdd_bytes: int
    cards: tuple[str, ...]
    told: Callable[[Use], None]
    context: contextvars.Context
    search: Callable[[], Awaitable[First | None]] | None = None
    searches: int = 0
    began: float = dataclasses.field(default_factory=time.monotonic)
    first: First | None = None  #: what `search` has found
    use: Use = dataclasses.field(default_factory=Use)
    pids: tuple[int, ...] = ()
    cpu_secs: float = 0.0
    seen_at: float = dataclasses.field(default_factory=time.monotonic)
    exact_at: float = 0.0
    exact_secs: float = 0.0  #: what it costs to tell shared pages apart
    shared_bytes: int = 0  #: counted more than once, when that was done
    near: bool = False  #: it may have reached its limit since
    disk_at: float = 0.0
    disk_cost_secs: float = 0.0
    disk_free: int = 0  #: of the volume, when the directory was measured

    @property
    def top(self) -> int | First | None:
        """Where its processes are; None: nobody knows."""
        return self.first if self.supervisor is None else self.supervisor


class Sample(NamedTuple):
    """What one look tells of one run."""

    cpu_secs: float
    memory_bytes: int
    pids: tuple[int, ...]
    counted_bytes: int  #: the same, shared pages for each process that has them
    exact_secs: float = 0.0  #: what it has cost to tell them apart; 0: that was not done


class Sampler:
    """Watches all runs of a daemon. `run` is its service; it costs nothing while nothing runs."""

    def __init__(
        self,
        *,
        every_secs: float = EVERY_SECS,
        cards: Callable[[Sequence[str], Sequence[int]], Awaitable[Cards | None]] | None = None,
        cost: Callable[[float], None] = lambda _: None,
    ) -> None:
        """`cards` tells what the cards with these UUIDs do, and what of their memory these processes have; it may hang.

        `cost` is told of the processor time that sampling takes.
        """
        self._every_secs = every_secs
        self._cards = cards
        self._cost = cost
        self._watched: list[_Watched] = []
        self._some = asyncio.Event()

    @contextlib.contextmanager
    def watch(
        self,
        supervisor: int | None,
        directory: Path,
        *,
        ram_bytes: int = 0,
        hdd_bytes: int = 0,
        cards: tuple[str, ...] = (),
        search: Callable[[], Awaitable[First | None]] | None = None,
        told: Callable[[Use], None],
    ) -> Iterator[Use]:
        """Watch a run while the context is open. `told` is called in the loop, and in this context, after each sample.

        `supervisor` None: its processes are not below one. Then `search` is to say where they begin; until it does, and without
        it, only the directory and the cards are measured. It is asked now and then, may hang, and never raises.
        Above `ram_bytes` (0: no limit) memory is measured exactly; near `hdd_bytes` the directory is measured more often.
        """
        watched = _Watched(
            supervisor=supervisor,
            directory=directory,
            ram_bytes=ram_bytes,
            hdd_bytes=hdd_bytes,
            cards=cards,
            told=told,
            context=contextvars.copy_context(),
            search=search,
        )
        self._watched.append(watched)
        self._some.set()
        try:
            yield watched.use
        finally:
            self._watched.remove(watched)
            if not self._watched:
                self._some.clear()

    @property
    def now(self) -> tuple[float, float, float]:
        """Cores, memory and disk that all runs use now."""
        uses = [watched.use for watched in self._watched]
        return (
            sum(use.cores.now for use in uses),
            sum(use.memory.now for use in uses),
            sum(use.disk.now for use in uses),
        )

    async def run(self) -> None:
        """For ever: look, and tell."""
        async with asyncio.TaskGroup() as all_:
            all_.create_task(self._processes(), name="sample processes")
            all_.create_task(self._disks(), name="sample disks")
            all_.create_task(self._look_at_cards(), name="sample cards")
            all_.create_task(self._search(), name="sample elsewhere")

    async def _processes(self) -> None:
        while True:
            await asyncio.sleep(self._every_secs)
            await self._some.wait()
            runs = {run: top for run in self._watched if (top := run.top) is not None}
            if not runs:
                continue
            try:
                samples, looked_at, cost = await asyncio.to_thread(self._look, runs)
            except OSError as exc:  # out of descriptors, say: no reason to end the daemon
                log.warning("what runs use cannot be measured now", error=str(exc))
                continue
            self._cost(cost)
            for watched, sample in zip(runs, samples, strict=True):
                if watched in self._watched and sample.pids:
                    self._take(watched, sample, looked_at)
            # Runs whose pages cost much to tell apart are spared that by themselves; nobody else waits for it.
            cost -= sum(sample.exact_secs for sample in samples)
            await asyncio.sleep(max(0.0, SHARE * cost - self._every_secs))

    def _look(self, runs: Mapping[_Watched, int | First]) -> tuple[list[Sample], float, float]:
        """In a thread. When it looked is told as well: the loop may be busy, and hear of it seconds later."""
        began, now = time.thread_time(), time.monotonic()
        samples = look([(top, run.ram_bytes if _is_exact(run, now) else 0) for run, top in runs.items()])
        return samples, now, time.thread_time() - began

    async def _search(self) -> None:
        """Where runs are that are not below their supervisors. Apart from the rest, and one by one: an engine may hang."""
        while True:
            await asyncio.sleep(self._every_secs)
            await self._some.wait()
            for watched in list(self._watched):
                if watched.search is None or watched.first is not None or watched.searches >= SEARCHES:
                    continue
                age = time.monotonic() - watched.began
                if watched in self._watched and age >= self._every_secs * 2**watched.searches:
                    watched.searches += 1
                    watched.first = await watched.search()

    async def _look_at_cards(self) -> None:
        """Apart from the rest: a driver that hangs must not keep anybody from measuring memory."""
        while self._cards is not None:
            await asyncio.sleep(self._every_secs)
            await self._some.wait()
            for watched in [run for run in self._watched if run.cards]:
                card = await self._cards(watched.cards, watched.pids)
                if card is None or watched not in self._watched:
                    continue
                if (
                    card.memory_bytes is not None and watched.pids
                ):  # whose memory it is, is known once they were seen
                    watched.use.card_memory.add(card.memory_bytes)
                if card.utilization is not None:
                    watched.use.card_utilization.add(card.utilization)

    def _take(self, watched: _Watched, sample: Sample, now: float) -> None:
        use = watched.use
        if (secs := now - watched.seen_at) >= MIN_SECS:
            use.cores.add(max(0.0, sample.cpu_secs - watched.cpu_secs) / secs)
            watched.cpu_secs, watched.seen_at = max(watched.cpu_secs, sample.cpu_secs), now
        use.memory.add(_memory(watched, sample, now))
        use.processes, watched.pids = len(sample.pids), sample.pids
        watched.context.run(watched.told, use)

    async def _disks(self) -> None:
        while True:
            await asyncio.sleep(self._every_secs)
            await self._some.wait()
            for watched in await asyncio.to_thread(_due, list(self._watched)):
                if watched in self._watched:
                    began = time.monotonic()
                    measured, free, cost = await asyncio.to_thread(_measure, watched.directory)
                    self._cost(cost)
                    watched.disk_at, watched.disk_free = time.monotonic(), free
                    # A cold directory costs reads from the disk, rather than processor time.
                    watched.disk_cost_secs = max(cost, (watched.disk_at - began) / 5)
                    if watched in self._watched and measured.entries:
                        watched.use.disk.add(measured.bytes)
                        watched.use.disk_complete = measured.complete
                        watched.context.run(watched.told, watched.use)


def _is_exact(watched: _Watched, now: float) -> bool:
    """Whether its pages may be told apart again: the more that costs the seldomer, earlier when it may be over its limit."""
    share = SHARE / 10 if watched.near else SHARE
    return now - watched.exact_at >= share * watched.exact_secs


def _memory(watched: _Watched, sample: Sample, now: float) -> int:
    """What it uses; when its pages were not told apart though they should be, by the last time, and then never over its limit."""
    if sample.exact_secs:
        watched.exact_at, watched.exact_secs, watched.near = now, sample.exact_secs, False
        watched.shared_bytes = max(0, sample.counted_bytes - sample.memory_bytes)
    elif watched.exact_secs and len(sample.pids) > 1 and sample.counted_bytes > watched.ram_bytes:
        memory = max(0, sample.counted_bytes - watched.shared_bytes)
        watched.near = memory > watched.ram_bytes
        return min(memory, watched.ram_bytes)
    return sample.memory_bytes


def _due(runs: Sequence[_Watched]) -> list[_Watched]:
    return [each for each in runs if _is_due(each)]


def _is_due(watched: _Watched) -> bool:
    """By the clock: the longer it takes the seldomer. Earlier, when so much of the volume has gone meanwhile that it may matter."""
    since = time.monotonic() - watched.disk_at
    if since >= max(DISK_SECS, DISK_SHARE * watched.disk_cost_secs):
        return True
    if not watched.hdd_bytes or since < DISK_SHARE / 10 * watched.disk_cost_secs:
        return False
    grown = watched.disk_free - _free(watched.directory)
    return watched.use.disk.now + grown >= EARLY * watched.hdd_bytes and grown > 0


def _measure(directory: Path) -> tuple[disk.Measured, int, float]:
    began = time.thread_time()
    free = _free(directory)
    measured = disk.measure(directory)
    return measured, free, time.thread_time() - began


def _free(directory: Path) -> int:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return 0


# -- /proc


class _Process(NamedTuple):
    parent: int
    own_ticks: int
    ended_ticks: int  #: of children that have ended, and theirs
    started: int


def first(pid: int) -> First | None:
    """The process that has that number now, told from all that may have it later; None when there is none. Blocking."""
    process = _process(f"/proc/{pid}/stat")
    return None if process is None else First(pid, process.started)


def look(runs: Sequence[tuple[int | First, int]], proc: str = "/proc") -> list[Sample]:
    """What is below each supervisor: `runs` are their process ids, and the memory above which it is measured exactly. Blocking.

    Of a run that is not below one, its first process, which counts as well.
    """
    processes: dict[int, _Process] = {}
    children: dict[int, list[int]] = {}
    for name in os.listdir(proc):  # noqa: PTH208 - thousands of them
        if name.isdigit() and (process := _process(f"{proc}/{name}/stat")) is not None:
            processes[int(name)] = process
            children.setdefault(process.parent, []).append(int(name))
    return [_sample(top, ram, processes, children, proc) for top, ram in runs]


def _sample(
    top: int | First,
    ram_bytes: int,
    processes: dict[int, _Process],
    children: dict[int, list[int]],
    proc: str,
) -> Sample:
    below: list[int] = []
    waiting: list[int] = []
    ticks = 0
    own = processes.get(top.pid if isinstance(top, First) else top)
    if not isinstance(top, First):
        ticks = 0 if own is None else own.ended_ticks
        waiting = [top]
    elif own is not None and own.started == top.started:
        below, waiting = [top.pid], [top.pid]
    while waiting:
        found = children.get(waiting.pop(), [])
        below += found
        waiting += found
    ticks += sum(processes[pid].own_ticks + processes[pid].ended_ticks for pid in below)
    parts = [_fields(f"{proc}/{pid}/status", _STATUS) for pid in below]
    private = sum(part.get(b"RssAnon", 0) + part.get(b"VmSwap", 0) for part in parts)
    shared = [part.get(b"RssShmem", 0) for part in parts]
    memory, counted = private + max(shared, default=0), private + sum(shared)
    exact_secs = 0.0
    if ram_bytes and len(below) > 1 and counted > ram_bytes:
        began = time.thread_time()
        memory = _exact(below, proc) or memory
        exact_secs = time.thread_time() - began
    return Sample(ticks / _TICKS, memory, tuple(below), counted, exact_secs)


_STATUS = (b"RssAnon", b"RssShmem", b"VmSwap")
_ROLLUP = (b"Pss", b"Pss_Anon", b"Pss_Shmem", b"SwapPss")


def _exact(pids: Sequence[int], proc: str) -> int:
    """Each shared page counts once. 0 when the kernel does not tell."""
    total, told = 0, False
    for pid in pids:
        part = _fields(f"{proc}/{pid}/smaps_rollup", _ROLLUP)
        if not part:  # it has ended; or it lets nobody look into it, and then all it has is its own
            part = _fields(f"{proc}/{pid}/status", _STATUS)
            total += part.get(b"RssAnon", 0) + part.get(b"VmSwap", 0)
            continue
        told = True
        resident = part.get(b"Pss_Anon", 0) + part.get(b"Pss_Shmem", 0)
        total += (resident if b"Pss_Anon" in part else part.get(b"Pss", 0)) + part.get(b"SwapPss", 0)
    return total if told else 0


def _process(path: str) -> _Process | None:
    text = _read(path)
    # The second field is the program's name in brackets, and may hold anything, also spaces and brackets.
    fields = text[text.rfind(b")") + 2 :].split(None, 20)
    if len(fields) < 20:  # noqa: PLR2004 - proc(5)
        return None
    return _Process(
        parent=int(fields[1]),
        own_ticks=int(fields[11]) + int(fields[12]),
        ended_ticks=max(0, int(fields[13])) + max(0, int(fields[14])),
        started=int(fields[19]),
    )


def _fields(path: str, names: tuple[bytes, ...]) -> dict[bytes, int]:
    """Those of a table of `Name:   123 kB`, in bytes."""
    found = {}
    for line in _read(path).splitlines():
        name, _, value = line.partition(b":")
        if name in names:
            found[name] = int(value.split()[0]) * 1024
    return found


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 1 << 14)
    except OSError:
        return b""
    finally:
        os.close(fd)
