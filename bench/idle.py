"""The daemon at rest: RabbitMQ with a hundred queues, S3 in use before; and how soon it is ready."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bench.figures import Bar, Figure, median
from bench.lab import NOOP, Finished, family, resident_bytes, wait

if TYPE_CHECKING:
    import psutil

    from bench.lab import Lab

QUEUES = 100


def measure(lab: Lab) -> list[Figure]:
    """Start, memory, processor."""
    secs, starts = (3, 2) if lab.quick else (25, 5)
    names = [f"rmq_idle_{number}" for number in range(QUEUES)]
    for name in names:
        lab.broker.declare(name, durable=True)
    daemon = lab.daemon("idle", "--queue-match=^rmq_idle_", env=lab.account(), start=False)
    ready = []
    for _ in range(starts):
        began = time.monotonic()
        daemon.start()
        ready.append(time.monotonic() - began)
        daemon.stop()
    daemon.start()
    finished = Finished(daemon)
    lab.broker.publish(names[0], lab.job(NOOP).body)
    wait(finished.look, "the end of an experiment", daemon)
    wait(lambda: lab.broker.consumers(names[-1]) == 1, "all consumers", daemon)
    time.sleep(2)  # what follows a run is over
    before = _cpu(family(daemon))
    began = time.monotonic()
    time.sleep(secs)
    used = (_cpu(family(daemon)) - before) / (time.monotonic() - began)
    memory = resident_bytes(daemon)
    daemon.stop()
    for name in names:
        lab.broker.delete(name)
    return [
        Figure(
            name="start to ready", value=median(ready), unit="s", bar=Bar(limit=1.5), note=f"{QUEUES} queues"
        ),
        Figure(
            name="memory at rest",
            value=memory / 1e6,
            unit="MB",
            bar=Bar(limit=120),
            note=f"resident, daemon and nursery; {QUEUES} queues on RabbitMQ, S3 was in use",
        ),
        Figure(name="processor at rest", value=used * 100, unit="% of a core", bar=Bar(limit=1)),
    ]


def _cpu(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)
