"""Memory of the daemon: as runs go by, and while a workload prints a great deal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.figures import Bar, Figure
from bench.lab import NOOP, Finished, forget_peak, peak_bytes, resident_bytes, wait
from runner import units

if TYPE_CHECKING:
    from bench.lab import Lab

#: Prints so many bytes in lines of 100, as fast as it can.
PRINTER = """
import sys
line = b"step 17 of 99, loss 0.12345, accuracy 0.9876, and some more words to make it a line of output\\n".rjust(100)
for _ in range(int(sys.argv[1]) // 1_000_000):
    sys.stdout.buffer.write(line * 10_000)
"""
MB = 1_000_000


def measure(lab: Lab) -> list[Figure]:
    """Growth, each beside what it was before."""
    daemon = lab.shared_daemon

    def run(count: int, script: str = NOOP, arguments: tuple[str, ...] | None = None) -> None:
        finished = Finished(daemon)
        lab.broker.publish(lab.queue, *(lab.job(script, arguments=arguments).body for _ in range(count)))
        wait(lambda: finished.look() >= count, f"the end of {count} experiments", daemon, secs=900)

    warm, many = (10, 20) if lab.quick else (100, 400)
    run(warm)
    before = resident_bytes(daemon)
    run(many)
    after = resident_bytes(daemon)
    peaks, lasting = [], []
    for size in (MB, lab.output_bytes):
        forget_peak(daemon)
        run(1, PRINTER, (str(size),))
        peaks.append(peak_bytes(daemon))
        lasting.append(resident_bytes(daemon))
    return [
        Figure(
            name=f"memory after {many} more runs",
            value=after / MB,
            unit="MB",
            baseline=before / MB,
            bar=Bar(limit=1.1),
            note=f"daemon and nursery; beside after the first {warm}",
        ),
        Figure(
            name=f"peak memory while a workload prints {units.format_bytes(lab.output_bytes)}",
            value=peaks[1] / MB,
            unit="MB",
            baseline=peaks[0] / MB,
            note="the daemon; beside one that prints 1 MB. Uploads have up to four parts of 16 MiB in memory",
            bar=Bar(limit=3),
        ),
        Figure(
            name="memory after that",
            value=lasting[1] / MB,
            unit="MB",
            baseline=lasting[0] / MB,
            bar=Bar(limit=1.1),
            note="daemon and nursery; what an upload needed goes back to the system",
        ),
    ]
