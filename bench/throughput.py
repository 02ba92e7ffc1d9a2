"""No-op experiments a second, two at a time, artifacts included, beside two bare consumers; rounds in turn."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bench import bare
from bench.figures import Bar, Figure, median
from bench.lab import NOOP, Finished, cpu_secs, wait

if TYPE_CHECKING:
    from bench.lab import Lab

PAUSE_SECS = 0.005  #: between two looks; the processor is wanted elsewhere


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
            used = cpu_secs(daemon)
            ours.append(jobs / _ours(lab, bodies))
            cpu.append((cpu_secs(daemon) - used) / jobs)
            theirs.append(bare_jobs / _theirs(lab, baseline, bare_jobs))
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


def _ours(lab: Lab, bodies: list[bytes]) -> float:
    """Seconds until the last one has finished."""
    daemon = lab.shared_daemon
    finished = Finished(daemon)
    began = time.monotonic()
    lab.broker.publish(lab.queue, *bodies)
    what = f"the end of {len(bodies)} experiments"
    wait(lambda: finished.look() >= len(bodies), what, daemon, pause_secs=PAUSE_SECS)
    return time.monotonic() - began


def _theirs(lab: Lab, baseline: bare.Bare, count: int) -> float:
    """Seconds until the last one has printed."""
    jobs = [baseline.job() for _ in range(count)]
    began = time.monotonic()
    lab.broker.publish(baseline.queue, *(job.body for job in jobs))
    for job in jobs:
        wait(job.stamp.exists, f"the first line of {job.key}", pause_secs=PAUSE_SECS)
    return time.monotonic() - began
