"""Runs from SQS, by a real daemon with an account in `--certs-dir` (INTEROP.md 2.5, DESIGN.md rules 1 to 4 and 11)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e import messages
from tests.e2e.hasty import HOLD_SECS, documents, done, hasty, lost, running

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator

    from tests.servers.daemon import Daemon, MakeDaemon
    from tests.servers.moto_sqs import SqsServer

# Several starts of a daemon, on a machine that may be busy: each wait has a limit of its own.
pytestmark = [pytest.mark.service, pytest.mark.usefixtures(hasty.__name__), pytest.mark.timeout(300)]
__all__ = ["hasty"]


@pytest.fixture
def server(sqs_server: SqsServer) -> Iterator[SqsServer]:
    yield sqs_server
    sqs_server.clear()


def serve(daemons: MakeDaemon, server: SqsServer, certs: pathlib.Path, *arguments: str) -> Daemon:
    server.drop_account(certs / "amazon")
    return daemons(f"--certs-dir={certs}", "--queue-refresh=1s", *arguments)


def test_one_queue_is_deleted_and_the_run_of_another_outlives_its_receipt_and_runs_once(
    daemons, server: SqsServer, tmp_path
):
    daemon = serve(daemons, server, tmp_path / "certs")
    go = tmp_path / "go"
    for key, queue in (("gone", "sqs_a"), ("stays", "sqs_a_2.fifo")):  # names that a look may mix up
        server.create(queue)
        server.send(queue, messages.on_directory(daemon.storage, messages.WAIT.format(go=str(go)), key))
    daemon.until(lambda: running(daemon, "gone") and running(daemon, "stays"))

    server.delete("sqs_a")
    (cancelled,) = daemon.until(lambda: done(daemon, "gone"))
    assert (cancelled["status"], cancelled["reason"]) == ("stopped", "queue-deleted")
    (document,) = documents(daemon.storage, "gone")
    assert document["studioml"]["status"] == "stopped"

    daemon.until(lambda: (run := running(daemon, "stays")) and run["elapsed_secs"] > HOLD_SECS + 2)
    assert (server.depth("sqs_a_2.fifo"), server.held("sqs_a_2.fifo")) == (0, 1)
    go.touch()
    (completed,) = daemon.until(lambda: done(daemon, "stays"))
    assert (completed["status"], completed["attempt"], completed["fate"]) == ("completed", 1, "ack")
    assert server.depth("sqs_a_2.fifo") + server.held("sqs_a_2.fifo") == 0
    assert len(documents(daemon.storage, "stays")) == 1
    assert daemon.stop() == 0
    assert not lost(daemon, "stays")


def test_a_killed_daemon_costs_an_attempt_and_a_drained_one_none(daemons, server: SqsServer, tmp_path):
    server.create("sqs_b")
    daemon = serve(daemons, server, tmp_path / "certs", "--grace=1s")
    go = tmp_path / "go"
    server.send("sqs_b", messages.on_directory(daemon.storage, messages.WAIT.format(go=str(go)), "k"))
    daemon.until(lambda: running(daemon, "k"))
    daemon.kill()
    daemon.start()
    daemon.until(lambda: (run := running(daemon, "k")) and run["attempt"] == 2)

    assert daemon.stop() == 0
    assert server.depth("sqs_b") == 1  # at once, not when its time would have been over
    go.touch()
    daemon.start()
    (completed,) = daemon.until(lambda: done(daemon, "k"))
    assert (completed["status"], completed["attempt"]) == ("completed", 2)
    assert server.depth("sqs_b") + server.held("sqs_b") == 0
    assert daemon.stop() == 0
    assert not daemon.dead_letters()
