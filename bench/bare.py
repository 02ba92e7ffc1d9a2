"""Starts the baseline's consumers."""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING

from bench.lab import BUCKET, NOOP, Job

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.lab import Lab


class Bare:
    """Consumers of one queue, each with one `python` at a time."""

    def __init__(self, lab: Lab, queue: str) -> None:
        self.queue = queue
        self._stamps = lab.stamps

    def job(self) -> Job:
        """A message for it."""
        key = f"bare-{uuid.uuid4().hex[:12]}"
        return Job(key=key, stamp=self._stamps / key, body=str(self._stamps / key).encode())


@contextlib.contextmanager
def consumers(lab: Lab, count: int, python: str) -> Iterator[Bare]:
    """So many, while it is open."""
    queue = f"bare_{uuid.uuid4().hex[:8]}"
    lab.broker.declare(queue, durable=True)
    script = lab.directory / "noop.py"
    script.write_text(NOOP)
    program = pathlib.Path(__file__).with_name("baseline.py")
    processes: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, str(program), lab.broker.amqp_url, queue, python, str(script)],
                stdout=subprocess.PIPE,
                text=True,
            )
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "consuming\n"
        yield Bare(lab, queue)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        lab.broker.delete(queue)


def interpreter(lab: Lab) -> str:
    """The interpreter that the daemon has chosen for the workloads, from the document of its first run.

    Where packages beside it slow its start (start-up hooks), it is one in an empty environment: the runs have none either.
    """
    lab.shared_daemon  # noqa: B018 - it has made that run
    client = lab.store.client()
    for item in client.list_objects(BUCKET, prefix="metadata/scrape-host-", recursive=True):
        with contextlib.closing(client.get_object(BUCKET, str(item.object_name))) as answer:
            chosen = str(json.loads(answer.read())["runner"]["environment"]["python_path"])
        empty = lab.directory / "plain"
        subprocess.run([chosen, "-m", "venv", "--without-pip", "--clear", str(empty)], check=True)
        return min(chosen, str(empty / "bin" / "python"), key=_start_secs)
    raise SystemExit("the daemon has left no document")


def _start_secs(python: str) -> float:
    def once() -> float:
        began = time.perf_counter()
        subprocess.run([python, "-c", "pass"], check=True)
        return time.perf_counter() - began

    return min(once() for _ in range(15))
