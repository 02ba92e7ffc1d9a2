"""publish -> first line of the workload, beside the bare consumer, one after the other."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pika

from bench import bare
from bench.figures import Bar, Figure, percentile
from bench.lab import NOOP, Finished, wait

if TYPE_CHECKING:
    from bench.lab import Job, Lab


def measure(lab: Lab) -> list[Figure]:
    """p50 and p95 of both."""
    count, warm = (8, 3) if lab.quick else (60, 10)
    daemon = lab.shared_daemon
    ours: list[float] = []
    theirs: list[float] = []
    with (
        bare.consumers(lab, 1, bare.interpreter(lab)) as baseline,
        lab.broker.channel() as channel,
    ):
        for number in range(count + warm):
            finished = Finished(daemon)
            one = _latency(channel, lab.queue, lab.job(NOOP))
            wait(finished.look, "the end of an experiment", daemon)
            other = _latency(channel, baseline.queue, baseline.job())
            time.sleep(0.02)  # acknowledged by then
            if number >= warm:
                ours.append(one)
                theirs.append(other)
    return [
        Figure(
            name=f"publish to first line, p{percent}",
            value=percentile(ours, percent),
            unit="ms",
            baseline=percentile(theirs, percent),
            bar=Bar(limit=3, aim=1.5),
            note="beside a bare pika consumer that starts the same python" if percent == 50 else "",
        )
        for percent in (50, 95)
    ]


def _latency(channel: Any, queue: str, job: Job) -> float:
    """Milliseconds."""
    published = time.time_ns()
    channel.basic_publish("", queue, job.body, pika.BasicProperties(delivery_mode=2))
    wait(job.stamp.exists, f"the first line of {job.key}")
    return (int(job.stamp.read_text()) - published) / 1e6
