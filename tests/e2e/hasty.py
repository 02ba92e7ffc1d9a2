"""The daemon's program with shorter times: what takes minutes of waiting with a real broker's limits takes seconds.

And what the tests of runs from SQS and Pub/Sub ask of it.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.servers import daemon as daemon_server

if TYPE_CHECKING:
    import pathlib

    from tests.servers.daemon import Daemon

#: Until SQS or Pub/Sub hand a message out again that nobody renews, the poll that it came with included. It is renewed at half of
#: that, or sooner: a stall of some seconds is no loss.
HOLD_SECS = 16
_SCRIPT = f"""#!{sys.executable}
import functools, sys
from runner.cli import main
from runner.daemon import dispatch
from runner.queues import pubsub_account, sqs_access

dispatch.EXISTENCE_SECS = 1.0
sqs_access.SqsTiming = functools.partial(
    sqs_access.SqsTiming, poll_secs=2, visibility_secs={HOLD_SECS - 2}, confirm_secs=0.5
)
pubsub_account.PubsubTimes = functools.partial(pubsub_account.PubsubTimes, lease_secs={HOLD_SECS})
sys.exit(main.main())
"""


@pytest.fixture
def hasty(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Daemons of this test are in a hurry. All else is as the installed program has it."""
    program = tmp_path / "studio-runner"
    program.write_text(_SCRIPT)
    program.chmod(0o755)
    monkeypatch.setattr(daemon_server, "PROGRAM", program)


def running(daemon: Daemon, key: str) -> dict[str, Any] | None:
    """The run of that experiment, when its workload runs."""
    runs = daemon.get("/api/runs")["running"]
    return next((run for run in runs if (run["experiment"], run["stage"]) == (key, "running")), None)


def done(daemon: Daemon, key: str) -> list[dict[str, Any]]:
    """The ended runs of that experiment, of this process of the daemon."""
    return [run for run in daemon.get("/api/runs")["recent"] if run["experiment"] == key]


def lost(daemon: Daemon, key: str) -> bool:
    """Whether a run of that experiment has lost its message for a while: a run that adopts it again looks like one that held it."""
    records = daemon.log("the message of a run in progress was lost; the run goes on and waits for it")
    return any(record["experiment"] == key for record in records)


def documents(storage: pathlib.Path, key: str) -> list[dict[str, Any]]:
    """The documents of that experiment, one a run."""
    read = [json.loads(path.read_bytes()) for path in sorted(storage.glob("metadata/scrape-*.json"))]
    return [each for each in read if each["studioml"]["experiment"] == key]
