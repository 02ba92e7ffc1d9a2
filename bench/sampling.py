"""What it costs to watch the runs: processes of all of them, and a large directory of one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from bench.figures import Bar, Figure, median
from runner.resources import disk, usage

if TYPE_CHECKING:
    from bench.lab import Lab

RUNS, WORKERS = 16, 8
FILES = 20_000
_FORKS = """
import os, signal, sys, time
for _ in range(int(sys.argv[1]) - 1):
    if os.fork() == 0:
        break
print("ready", flush=True)
signal.pause()
"""


def measure(lab: Lab) -> list[Figure]:
    """Processor time of a look at all processes, and of a measurement, as the share of a core that they come to."""
    rounds = 5 if lab.quick else 30
    parents = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _FORKS, str(WORKERS)],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        for _ in range(RUNS)
    ]
    try:
        for parent in parents:
            assert parent.stdout is not None
            for _ in range(WORKERS):
                assert parent.stdout.readline() == b"ready\n"
        looks = [_cost(lambda: usage.look([(parent.pid, 0) for parent in parents])) for _ in range(rounds)]
        processes = sum(name.isdigit() for name in os.listdir("/proc"))  # noqa: PTH208 - names
    finally:
        for parent in parents:
            os.killpg(parent.pid, 9)
            parent.wait()
    directory = lab.directory / "sampling"
    for number in range(FILES):
        place = directory / str(number % 200)
        place.mkdir(parents=True, exist_ok=True)
        (place / str(number)).touch()
    measurements = [_cost(lambda: disk.measure(directory)) for _ in range(rounds)]
    look, measured = median(looks), median(measurements)
    return [
        Figure(
            name="sampling of processes",
            value=look * 1e3,
            unit="ms",
            note=f"a look at {RUNS} runs of {WORKERS} processes, {processes} in all",
        ),
        Figure(
            name="share of a core",
            value=100 * look / max(usage.EVERY_SECS, usage.SHARE * look),
            unit="%",
            bar=Bar(limit=1),
            note=f"every {max(usage.EVERY_SECS, usage.SHARE * look):.1f} s",
        ),
        Figure(
            name="sampling of a directory",
            value=measured * 1e3,
            unit="ms",
            note=f"{FILES} files, every {max(usage.DISK_SECS, usage.DISK_SHARE * measured):.1f} s",
        ),
    ]


def _cost(what: object) -> float:
    assert callable(what)
    began = time.thread_time()
    what()
    return time.thread_time() - began
