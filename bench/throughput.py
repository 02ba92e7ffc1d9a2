"""No-op experiments a second, two at a time, artifacts included, beside two bare consumers; rounds in turn."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bench import bare
from bench.figures import Bar, Figure, median
from bench.lab import NOOP, Finished, cpu_secs, wait

if TYPE_CHECKING:
    from bench.lab import Lab


def measure(lab: Lab) -> list[Figure]:
    """Rates, and what a run costs the daemon."""
    rounds, jobs, bare_jobs = (1, 10, 20) if lab.quick else (5, 60, 120)
    daemon = lab.shared_daemon
    ours: list[float] = []
    theirs: list[float] = []
    cpu: list[float] = []
    with bare.consumers(lab, 2, bare.interpreter(lab)) as baseline:
        for _ in range(rounds):
            bodies = [lab.job(NOOP).body for _ in range(jobs)]
            finished, used = Finished(daemon), cpu_secs(daemon)
            began = time.monotonic()
            lab.broker.publish(lab.queue, *bodies)
            wait(lambda finished=finished: finished.look() >= jobs, f"the end of {jobs} experiments", daemon)
            ours.append(jobs / (time.monotonic() - began))
            cpu.append((cpu_secs(daemon) - used) / jobs)
            messages = [baseline.job() for _ in range(bare_jobs)]
            began = time.monotonic()
            lab.broker.publish(baseline.queue, *(message.body for message in messages))
            wait(lambda messages=messages: all(message.stamp.exists() for message in messages), "the bare ones")
            theirs.append(bare_jobs / (time.monotonic() - began))
    return [
        Figure(
            name="no-op experiments, two at a time",
            value=median(ours),
            unit="/s",
            baseline=median(theirs),
            bar=Bar(limit=0.3, aim=0.6, at_most=False),
            note="artifacts included; beside two bare consumers",
        ),
        Figure(
            name="processor time of the daemon per no-op experiment",
            value=median(cpu) * 1000,
            unit="ms",
            note="daemon, nursery and supervisors, user and system",
        ),
    ]
