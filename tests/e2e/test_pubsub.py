"""Runs from Pub/Sub, by a real daemon with a key in `--certs-dir` (INTEROP.md 2.6, DESIGN.md rules 1 to 4 and 11)."""

from __future__ import annotations

import contextlib
import subprocess
import uuid
from typing import TYPE_CHECKING

import pytest

from tests.e2e import messages
from tests.e2e.hasty import HOLD_SECS, documents, done, hasty, lost, running
from tests.servers.daemon import PROGRAM, clean_environment
from tests.servers.pubsub import PubsubServer

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator

    from tests.servers.daemon import Daemon, MakeDaemon

pytestmark = [pytest.mark.service, pytest.mark.timeout(300)]
__all__ = ["hasty"]


@pytest.fixture
def server(pubsub: PubsubServer) -> Iterator[PubsubServer]:
    """A project of the test's own."""
    with contextlib.closing(PubsubServer(pubsub.port, project=f"p-{uuid.uuid4().hex[:12]}")) as own:
        yield own


def serve(daemons: MakeDaemon, server: PubsubServer, certs: pathlib.Path, *arguments: str) -> Daemon:
    server.drop_key(certs / "google.json")
    env = {"PUBSUB_EMULATOR_HOST": server.address}
    return daemons(f"--certs-dir={certs}", "--queue-refresh=1s", *arguments, env=env)


@pytest.mark.usefixtures("hasty")
def test_one_queue_is_deleted_and_the_run_of_another_outlives_its_deadline_and_runs_once(
    daemons, server: PubsubServer, tmp_path
):
    daemon = serve(daemons, server, tmp_path / "certs")
    go = tmp_path / "go"
    for key, queue in (("gone", "pubsub_a"), ("stays", "pubsub_a_2")):
        server.declare(queue, exactly_once=key == "stays")
        server.publish(queue, messages.on_directory(daemon.storage, messages.WAIT.format(go=str(go)), key))
    daemon.until(lambda: running(daemon, "gone") and running(daemon, "stays"))

    server.delete("pubsub_a")
    (cancelled,) = daemon.until(lambda: done(daemon, "gone"))
    assert (cancelled["status"], cancelled["reason"]) == ("stopped", "queue-deleted")
    (document,) = documents(daemon.storage, "gone")
    assert document["studioml"]["status"] == "stopped"

    daemon.until(lambda: (run := running(daemon, "stays")) and run["elapsed_secs"] > HOLD_SECS + 2)
    assert (server.ready("pubsub_a_2"), server.held("pubsub_a_2")) == (0, 1)
    go.touch()
    (completed,) = daemon.until(lambda: done(daemon, "stays"))
    assert (completed["status"], completed["attempt"], completed["fate"]) == ("completed", 1, "ack")
    assert server.ready("pubsub_a_2") + server.held("pubsub_a_2") == 0
    assert len(documents(daemon.storage, "stays")) == 1
    assert daemon.stop() == 0
    assert not lost(daemon, "stays")


@pytest.mark.usefixtures("hasty")
def test_a_killed_daemon_costs_an_attempt_and_a_drained_one_none(daemons, server: PubsubServer, tmp_path):
    server.declare("pubsub_b")
    daemon = serve(daemons, server, tmp_path / "certs", "--grace=1s")
    go = tmp_path / "go"
    server.publish("pubsub_b", messages.on_directory(daemon.storage, messages.WAIT.format(go=str(go)), "k"))
    daemon.until(lambda: running(daemon, "k"))
    daemon.kill()
    daemon.start()
    daemon.until(lambda: (run := running(daemon, "k")) and run["attempt"] == 2)

    assert daemon.stop() == 0
    assert server.ready("pubsub_b") == 1  # at once, not when its lease would have been over
    go.touch()
    daemon.start()
    (completed,) = daemon.until(lambda: done(daemon, "k"))
    assert (completed["status"], completed["attempt"]) == ("completed", 2)
    assert server.ready("pubsub_b") + server.held("pubsub_b") == 0
    assert daemon.stop() == 0
    assert not daemon.dead_letters()


def test_the_command_that_the_reference_prints_works(daemons, server: PubsubServer, tmp_path):
    """`GOOGLE_APPLICATION_CREDENTIALS=key.json runner --cache-dir=... --cache-size=1000000000`, all else by default."""
    server.drop_key(tmp_path / "key.json")
    server.declare("pubsub_reference")
    daemon = daemons(start=False)
    server.publish("pubsub_reference", messages.on_directory(daemon.storage, "print('hello')", "k"))
    env = {"GOOGLE_APPLICATION_CREDENTIALS": "key.json", "PUBSUB_EMULATOR_HOST": server.address}
    # What concerns the machine that the test runs on: not /tmp, and not a port that may be taken.
    env |= {"TMPDIR": str(daemon.working_dir), "PROM_ADDRESS": "127.0.0.1:0"}
    argv = [str(PROGRAM.with_name("runner")), "--cache-dir=cache", "--cache-size=1000000000"]
    with (daemon.working_dir / "daemon.log").open("wb") as log:
        daemon.process = subprocess.Popen(
            argv, env=clean_environment() | env, cwd=tmp_path, stdout=log, stderr=log
        )
    daemon.until((daemon.working_dir / "studio-runner.json").exists)
    (completed,) = daemon.until(lambda: done(daemon, "k"))
    assert completed["status"] == "completed"
    assert server.ready("pubsub_reference") + server.held("pubsub_reference") == 0
    assert (tmp_path / "cache").is_dir()
    assert daemon.stop() == 0
