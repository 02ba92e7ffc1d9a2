"""Every metric of the runner, in one file. Callers name events; only this module knows Prometheus.

Two sets stand side by side (DESIGN.md 5.10): the reference's names exactly as they are (INTEROP.md 9.4; untyped, for
dashboards that exist), and well-formed ones (`_total`, seconds, bytes). No label is unbounded: `experiment` is there only
while the experiment runs, `hash` never, and of queues and projects at most `MAX_SERIES` have series of their own.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, UnknownMetricFamily

import runner
from runner.telemetry.redact import redact_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Series of one reference name; further queues and projects are counted together under `OTHERS`.
MAX_SERIES = 2000
OTHERS = "_others"

#: What the reference calls the kinds of queues; its running and completed series say "rmq" for RabbitMQ.
_QUEUE_TYPE = {"rabbitmq": "rabbitMQ"}
_RUN_QUEUE_TYPE = {"rabbitmq": "rmq"}

_GPU_GAUGES = (
    ("slots", "Slots that a card has", "slots"),
    ("free_slots", "Slots of a card that could be given away; 0 while it is fenced", "free_slots"),
    ("memory_bytes", "Memory that a card has", "memory_bytes"),
    ("memory_used_bytes", "Memory of a card in use, by whomever", "used_bytes"),
    ("fenced", "1 for a card that has failed and is not used", "fenced"),
)

_STAGE_SECS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 3 * 3600, 12 * 3600, 48 * 3600)
_CORES = (0.1, 0.3, 0.6, 1, 2, 4, 8, 16, 32, 64, 128)
_BYTES = tuple(float(1 << power) for power in range(24, 44, 2))  # 16 MiB to 4 TiB
#: Figures of `Use.told` (runner.resources.usage) and the histograms that they go to.
_USED = {
    "cpu_cores": ("mean", "experiment_cpu_cores", "Cores that an experiment used, on average", _CORES),
    "memory_bytes": (
        "peak",
        "experiment_memory_peak_bytes",
        "Memory that an experiment used at most",
        _BYTES,
    ),
    "disk_bytes": ("peak", "experiment_disk_peak_bytes", "Disk that an experiment used at most", _BYTES),
    "gpu_memory_bytes": (
        "peak",
        "experiment_gpu_memory_peak_bytes",
        "GPU memory that an experiment used at most",
        _BYTES,
    ),
    "gpu_utilization": ("mean", "experiment_gpu_utilization", "GPUs that an experiment kept busy", _CORES),
}
_WAIT_SECS = (
    0.1,
    0.3,
    1,
    3,
    10,
    30,
    60,
    180,
    600,
    1800,
    3600,
    3 * 3600,
    12 * 3600,
    24 * 3600,
    72 * 3600,
    168 * 3600,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card, right now."""

    uuid: str
    name: str
    slots: int
    free_slots: int
    memory_bytes: int
    used_bytes: int
    fenced: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Free:
    """What the allocator could still give away, right now."""

    cores: int
    mem_bytes: int
    disk_bytes: int
    gpu_slots: int = 0
    gpus: Sequence[Gpu] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What identifies a running experiment in the metrics. `kind` is the backend's: rabbitmq, sqs, pubsub, local."""

    kind: str
    queue: str
    project: str
    experiment: str


def registry() -> CollectorRegistry:
    """A fresh one; a process has one, each test its own."""
    return CollectorRegistry()


class Metrics:
    """The runner's metrics in a registry of their own. All methods are thread-safe, cheap, and never raise."""

    def __init__(self, registry: CollectorRegistry, host: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a gauge beside each counter that nobody reads
        self.registry = registry
        self._reference = _Reference(host)
        registry.register(self._reference)
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        Gauge("runner_info", "Always 1; the labels tell the version", ["version"], registry=registry).labels(
            runner.__version__
        ).set(1)
        self._define(registry)

    def _define(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"runner_{name}", text, labels, registry=registry)

        self._refreshes = counter("queue_refreshes_total", "Discoveries of queues, by outcome", "outcome")
        self._checked = counter("queues_checked_total", "Queues asked for work", "queue_type")
        self._ignored = counter("queues_ignored_total", "Queues that the name filter left out", "queue_type")
        self._finished = counter("experiments_finished_total", "Experiments that ended", "status", "reason")
        self._attempts = counter("attempts_total", "Attempts that started and count against their message")
        self._dead = counter("dead_letters_total", "Messages that were dead-lettered", "reason")
        self._deliveries = counter("deliveries_total", "Deliveries that ended, by fate", "outcome")
        self._cache = counter("cache_requests_total", "Artifacts asked of the cache", "outcome")
        self._scraped = counter(
            "scrape_bytes_total", "Bytes of workloads' output that were read for metadata"
        )
        self._bad_lines = counter("scrape_skipped_total", "Directives of workloads that could not be applied")
        self._uploaded = counter("upload_bytes_total", "Bytes of artifacts that were uploaded")
        self._running = Gauge("runner_experiments_running", "Experiments that run now", registry=registry)
        self._troubled_queues = Gauge(
            "runner_queues_in_trouble",
            "Queues that are asked for work, and nothing can come",
            registry=registry,
        )
        self._troubled_accounts = Gauge(
            "runner_accounts_in_trouble", "Accounts from which nothing can come", registry=registry
        )
        self._stages = Histogram(
            "runner_stage_duration_seconds",
            "How long each stage of an experiment took",
            ["stage"],
            buckets=_STAGE_SECS,
            registry=registry,
        )
        self._waits = Histogram(
            "runner_queue_wait_seconds",
            "From the experiment's submission to its start here",
            buckets=_WAIT_SECS,
            registry=registry,
        )

        self._used = {
            name: (figure, Histogram(f"runner_{metric}", text, buckets=buckets, registry=registry))
            for name, (figure, metric, text, buckets) in _USED.items()
        }
        self._sampling = counter("sampling_cpu_seconds_total", "Processor time that measuring runs has cost")
        now = Gauge("runner_experiments_used", "What all runs use now", ["resource"], registry=registry)
        self._now = {name: now.labels(name) for name in ("cpu_cores", "memory_bytes", "disk_bytes")}

    def watch_troubles(self, queues: Callable[[], float], accounts: Callable[[], float]) -> None:
        """Ask at each scrape how many queues, and accounts, are such that nothing can come. They must not block or raise."""
        self._troubled_queues.set_function(queues)
        self._troubled_accounts.set_function(accounts)

    def watch_use(self, use: Callable[[], tuple[float, float, float]]) -> None:
        """Ask `use` for the cores, bytes of memory and bytes of disk that runs use, at each scrape. It must not block or raise."""
        for place, gauge in enumerate(self._now.values()):
            gauge.set_function(lambda place=place: use()[place])  # type: ignore[misc]  # bound to each

    def used(self, told: Mapping[str, Any]) -> None:
        """What an experiment has used, peak and mean of each figure (`Use.told`)."""
        for name, (figure, histogram) in self._used.items():
            if name in told:
                histogram.observe(told[name][figure])

    def sampled(self, cpu_secs: float) -> None:
        """Measuring has cost so much processor time."""
        self._sampling.inc(cpu_secs)

    def render(self) -> bytes:
        """All of it in Prometheus's text format 0.0.4 (`CONTENT_TYPE`).

        Not OpenMetrics: there a counter `x_total` and an untyped `x` are one family, and both names are needed.
        """
        return generate_latest(self.registry)

    def watch_free(self, free: Callable[[], Free]) -> None:
        """Ask `free` for the machine's free resources at each scrape. It must not block and must not raise."""
        self._reference.free = free

    def refresh(self, account: str, ok: bool) -> None:
        """One discovery of an account's queues went well, or did not."""
        self._refreshes.labels("success" if ok else "fail").inc()
        self._reference.refreshes[ok].add((redact_text(account),))

    def checked(self, kind: str, queue: str) -> None:
        """A queue was asked for work (consumed from, polled)."""
        queue_type = _QUEUE_TYPE.get(kind, kind)
        self._checked.labels(queue_type).inc()
        self._reference.checked.add((queue_type, queue))

    def ignored(self, kind: str, queue: str) -> None:
        """A queue was seen and left out by `--queue-match` or `--queue-mismatch`."""
        queue_type = _QUEUE_TYPE.get(kind, kind)
        self._ignored.labels(queue_type).inc()
        self._reference.ignored.add((queue_type, queue))

    def queue_gone(self, kind: str, queue: str) -> None:
        """A queue exists no more: its own series end."""
        queue_type = _QUEUE_TYPE.get(kind, kind)
        self._reference.checked.forget((queue_type, queue))
        self._reference.ignored.forget((queue_type, queue))

    def experiment_started(self, run: Run, *, wait_secs: float | None = None) -> None:
        """An experiment took its resources; `wait_secs` since its submission, where the message tells."""
        self._running.inc()
        self._reference.running.add(_run_labels(run))
        if wait_secs is not None:
            self._waits.observe(max(wait_secs, 0.0))

    def experiment_finished(self, run: Run, *, status: str, reason: str) -> None:
        """The experiment of one `experiment_started` ended. `status` and `reason` are from closed lists."""
        self._running.dec()
        labels = _run_labels(run)
        self._reference.running.subtract(labels)
        self._reference.completed.add(labels[:3])
        self._finished.labels(status, reason).inc()

    def stage(self, name: str, secs: float) -> None:
        """A stage of an experiment (download, environment, run, upload, ...: a closed list) took so long."""
        self._stages.labels(name).observe(secs)

    def attempt(self) -> None:
        """An attempt started."""
        self._attempts.inc()

    def dead_letter(self, reason: str) -> None:
        """A message was dead-lettered, for a reason from the closed list."""
        self._dead.labels(reason).inc()

    def delivery(self, outcome: str) -> None:
        """A delivery ended: ack, requeue, reject, or lost."""
        self._deliveries.labels(outcome).inc()

    def cache_hit(self) -> None:
        """An immutable artifact was in the cache."""
        self._cache.labels("hit").inc()
        self._reference.hits.add(())

    def cache_miss(self) -> None:
        """An immutable artifact had to be fetched."""
        self._cache.labels("miss").inc()
        self._reference.misses.add(())

    def scraped(self, size_bytes: int) -> None:
        """So much output was read for metadata."""
        self._scraped.inc(size_bytes)

    def bad_directive(self, count: int = 1) -> None:
        """Lines of a workload asked for what cannot be done, and were skipped."""
        self._bad_lines.inc(count)

    def uploaded(self, size_bytes: int) -> None:
        """So many bytes of artifacts reached their store."""
        self._uploaded.inc(size_bytes)


def _run_labels(run: Run) -> tuple[str, ...]:
    kind = _RUN_QUEUE_TYPE.get(run.kind, run.kind)
    return (kind, run.queue, redact_text(run.project), redact_text(run.experiment))


class _Tally:
    """A number per label tuple, for at most `MAX_SERIES` of them; what comes later is counted under `OTHERS`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: collections.Counter[tuple[str, ...]] = collections.Counter()

    def add(self, labels: tuple[str, ...]) -> None:
        with self._lock:
            if labels not in self._counts and len(self._counts) >= MAX_SERIES:
                labels = (OTHERS,) * len(labels)
            self._counts[labels] += 1

    def subtract(self, labels: tuple[str, ...]) -> None:
        """Undo one `add`; at zero the series ends."""
        with self._lock:
            if labels not in self._counts:
                labels = (OTHERS,) * len(labels)
            self._counts[labels] -= 1
            if self._counts[labels] <= 0:
                del self._counts[labels]

    def forget(self, labels: tuple[str, ...]) -> None:
        with self._lock, contextlib.suppress(KeyError):
            del self._counts[labels]

    def items(self) -> list[tuple[tuple[str, ...], int]]:
        with self._lock:
            return list(self._counts.items())


class _Reference:
    """The reference's own names (INTEROP.md 9.4), which `Counter` would not give: it appends `_total`."""

    def __init__(self, host: str) -> None:
        self._host = host
        self.free: Callable[[], Free] | None = None
        self.refreshes = {True: _Tally(), False: _Tally()}
        self.checked = _Tally()
        self.ignored = _Tally()
        self.running = _Tally()
        self.completed = _Tally()
        self.hits = _Tally()
        self.misses = _Tally()

    def describe(self) -> Iterator[Metric]:
        """No `collect` at registration."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        queue = ("queue_type", "queue_name")
        yield self._untyped(
            "queue_refresh_success", "Discoveries that went well", ("project",), self.refreshes[True]
        )
        yield self._untyped(
            "queue_refresh_fail", "Discoveries that failed", ("project",), self.refreshes[False]
        )
        yield self._untyped("queue_checked", "Times that a queue was asked for work", queue, self.checked)
        yield self._untyped("queue_ignored", "Times that a queue was left out", queue, self.ignored)
        yield self._untyped(
            "project_completed", "Experiments that ended", (*queue, "project"), self.completed
        )
        yield self._untyped("cache_hits", "Artifacts that were in the cache", (), self.hits)
        yield self._untyped("cache_misses", "Artifacts that were not in the cache", (), self.misses)
        running = GaugeMetricFamily(
            "runner_project_running", "Experiments that run", labels=("host", *queue, "project", "experiment")
        )
        for labels, count in self.running.items():
            running.add_metric((self._host, *labels), count)
        yield running
        if self.free is not None:
            yield from self._resources(self.free())

    def _untyped(self, name: str, text: str, labels: Sequence[str], tally: _Tally) -> Metric:
        family = UnknownMetricFamily(f"runner_{name}", text, labels=("host", *labels))
        for values, count in tally.items():
            family.add_metric((self._host, *values), count)
        return family

    def _resources(self, free: Free) -> Iterator[Metric]:
        for name, text, value in (
            ("cpu_free_slots", "Cores not promised", free.cores),
            ("cpu_ram_free_bytes", "Memory not promised", free.mem_bytes),
            ("disk_free_bytes", "Disk not promised", free.disk_bytes),
            ("gpu_free_slots", "GPU slots not promised", free.gpu_slots),
        ):
            family = GaugeMetricFamily(f"runner_resource_{name}", text, labels=("host",))
            family.add_metric((self._host,), value)
            yield family
        for name, text, attribute in _GPU_GAUGES:
            family = GaugeMetricFamily(f"runner_gpu_{name}", text, labels=("gpu", "name"))
            for gpu in free.gpus:  # as many as the machine has
                family.add_metric((gpu.uuid, gpu.name), getattr(gpu, attribute))
            yield family
