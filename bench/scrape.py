"""How fast output is searched for JSON lines, and what a checkpoint costs as the output grows."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from bench.figures import Bar, Figure, median
from runner.metadata.document import Document, Subject
from runner.metadata.scrape import Scraper
from runner.process.tail import Tail

if TYPE_CHECKING:
    from pathlib import Path

    from bench.lab import Lab

CHUNK_BYTES = 1 << 20


def measure(lab: Lab) -> list[Figure]:
    """MB/s, and two checkpoints."""
    path = lab.directory / "typical.txt"
    size = (40 if lab.quick else 400) * 1_000_000
    _write(path, size)
    speeds, firsts = [], []
    for _ in range(3):
        run = _Scrape(path)
        began = time.process_time()
        run.checkpoint()
        speeds.append(path.stat().st_size / 1e6 / (time.process_time() - began))
        with path.open("ab") as file:
            file.write(_piece(0)[:CHUNK_BYTES])
        began = time.perf_counter()
        run.checkpoint()
        firsts.append(time.perf_counter() - began)
    start = lab.directory / "start.txt"
    start.write_bytes(_piece(0)[:CHUNK_BYTES])
    fresh = []
    for _ in range(9):
        run = _Scrape(start)
        began = time.perf_counter()
        run.checkpoint()
        fresh.append(time.perf_counter() - began)
    return [
        Figure(
            name="scrape",
            value=median(speeds),
            unit="MB/s",
            bar=Bar(limit=150, at_most=False),
            note="one core; progress bars, logs, a JSON line in every hundred",
        ),
        Figure(
            name=f"checkpoint of 1 MiB more, after {size // 1_000_000} MB",
            value=median(firsts) * 1000,
            unit="ms",
            baseline=median(fresh) * 1000,
            bar=Bar(limit=2),
            note="beside one of 1 MiB in all: what was scraped is not read again",
        ),
    ]


class _Scrape:
    """What `experiment.record` does with output, without its run."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)
        self._scraper = Scraper()
        subject = Subject(key="k", project="p", host="h", request={}, artifacts={})
        self._document = Document.begin(subject)

    def checkpoint(self) -> bytes:
        while data := self._tail.read_new(CHUNK_BYTES):
            for directive in self._scraper.feed(data):
                self._document.apply(directive)
        return self._document.to_bytes()


def _write(path: Path, size: int) -> None:
    with path.open("wb") as file:
        number = 0
        while file.tell() < size:
            file.write(_piece(number))
            number += 1


def _piece(number: int) -> bytes:
    """About 1.5 MB of what training runs print."""
    lines = []
    for step in range(150):
        loss = 2.0 / (1 + step + number)
        lines.append(json.dumps({"experiment": {"epoch": number, "step": step, "loss": loss}}))
        for batch in range(99):
            text = f"Epoch {number} [{batch:>3}/99] ====>.......... - ETA: {99 - batch}s - loss: {loss:.6f}"
            lines.append(f"{text} - accuracy: {1 - loss / 3:.4f} - {{'lr': 0.001}} [INFO] gpu 0")
    return "\n".join(lines).encode() + b"\n"
