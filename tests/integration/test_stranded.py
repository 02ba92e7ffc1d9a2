"""Messages that need a storage server that does not answer: they wait for it, and nobody else does (DESIGN.md rule 3)."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from runner.daemon import dispatch, endpoints, queuestate
from runner.experiment import results
from runner.storage import transport
from tests.integration.harness import Daemon, daemon
from tests.integration.test_fairness import Counting, ended, explained
from tests.servers.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "RECONSUME_SECS", 0.05)
    monkeypatch.setattr(endpoints, "LAST_PROBE_SECS", 1.0)
    monkeypatch.setattr(queuestate, "STRANDED_SECS", 0.2)
    monkeypatch.setattr(queuestate, "PARK_SECS", 600.0)
    one_try = functools.partial(transport.Patience, attempts=1)
    monkeypatch.setattr(transport, "Patience", one_try)


@pytest.fixture
def queue() -> Counting:
    return Counting()


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


@contextlib.contextmanager
def web_server(port: int, directory: Path) -> Iterator[None]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield
        server.shutdown()


async def submit(it: Daemon, *keys: str, needs: int | None = None) -> None:
    """Experiments; `needs`: with an input from that port of this machine."""
    for key in keys:
        message = json.loads(it.message("print()", key))
        if needs is not None:
            data = {"mutable": False, "unpack": False, "qualified": f"http://127.0.0.1:{needs}/data.txt"}
            message["experiment"]["artifacts"]["data"] = data
        it.queue.declare("rmq_a")
        await it.queue.publish(it.queue.ref("rmq_a"), json.dumps(message).encode())


async def test_a_wrong_address_stops_only_the_messages_that_have_it(
    tmp_path: Path, queue: Counting, port: int
):
    async with daemon(tmp_path, queue) as it:
        await submit(it, "lost0", "lost1", "lost2", needs=port)
        await submit(it, "good0", "good1")
        await it.until(lambda: set(ended(it)) == {"good0", "good1"})
        told = await explained(it, "rmq_a", lambda told: (told["parked"] or "").startswith("3 messages"))
        said = f"3 messages are parked for want of an endpoint: 127.0.0.1:{port} does not answer (for "
        assert told["parked"].startswith(said)
        assert told["closed_because"] is None
        (tmp_path / "web").mkdir()
        (tmp_path / "web/data.txt").write_text("here")
        with web_server(port, tmp_path / "web"):
            await it.settled()
        assert len(ended(it)) == 5
        # One, or the two that ran beside each other, had to find out; from then on all were held.
        assert sum(queue.delivered.values()) in {6, 7}
        assert queue.delivered["good0"] == queue.delivered["good1"] == 1
        assert not it.dead()


async def test_results_with_a_wrong_address_do_not_close_their_queue(
    tmp_path: Path, queue: Counting, port: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(results, "FIRST_RETRY_SECS", 0.05)
    monkeypatch.setattr(results, "LAST_RETRY_SECS", 0.05)
    async with daemon(tmp_path, queue, runs={"grace_secs": 0.0}) as it:
        message = json.loads(it.message("print()", "lost"))
        output = message["experiment"]["artifacts"]["output"]
        output |= {
            "qualified": f"s3://127.0.0.1:{port}/bucket/output.tar",
            "bucket": "bucket",
            "key": "output.tar",
        }
        it.queue.declare("rmq_a")
        await it.queue.publish(it.queue.ref("rmq_a"), json.dumps(message).encode())
        away = f"127.0.0.1:{port} has not answered for"
        await explained(it, "rmq_a", lambda told: (told["closed_because"] or "").startswith(away))
        await submit(it, "good")
        await it.until(lambda: ended(it) == ["good"])
        it.service.stop.ask(signal.SIGTERM)  # what waits is left to the next daemon


async def test_what_is_held_for_that_is_bounded_and_put_back(
    tmp_path: Path, queue: Counting, port: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(queuestate, "MAX_STRANDED", 2)
    async with daemon(tmp_path, queue) as it:
        await submit(it, "lost0", "lost1", "lost2", needs=port)
        await submit(it, "good")
        told = await explained(it, "rmq_a", lambda told: (told["parked"] or "").startswith("2 messages"))
        assert told["closed_because"] == told["parked"]
        assert queue.most_held == 2
        assert not ended(it)
    assert queue.depth("rmq_a") == 4  # drained: all of it is back

    monkeypatch.setattr(queuestate, "PARK_SECS", 0.3)
    monkeypatch.setattr(queuestate, "MAX_STRANDED", 3)
    async with daemon(tmp_path, again := Counting()) as it:
        await submit(it, "lost", needs=port)
        await it.until(lambda: again.returned["lost"] >= 3)  # put back, held again for longer
        await submit(it, "good")
        await it.until(lambda: ended(it) == ["good"])
        told = await explained(it, "rmq_a", lambda told: told["parked"] or told["closed_because"])
        assert f"127.0.0.1:{port}" in (told["parked"] or told["closed_because"])
        assert not it.dead()
