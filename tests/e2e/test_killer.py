"""Workloads that kill the runner's processes: three attempts, a dead letter that says why, and the others run on (DESIGN.md rule 3)."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e import messages

if TYPE_CHECKING:
    import pathlib

    from tests.servers.daemon import Daemon, MakeDaemon

pytestmark = pytest.mark.timeout(300)  # several starts of a daemon, on a machine that may be busy

#: Writes down that it has started, finds its ancestors up to the daemon (never further), kills one of them, and stays.
KILLER = """
import os, pathlib, signal, time
with open({starts!r}, "a") as file:
    file.write("start\\n")
print("begun", flush=True)

def is_daemon(pid):
    return {mark!r}.encode() in pathlib.Path(f"/proc/{{pid}}/cmdline").read_bytes()

def parent(pid):
    return int(pathlib.Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[1])

above = [os.getppid()]
while not is_daemon(above[-1]):
    above.append(parent(above[-1]))
    assert above[-1] > 1, above
os.kill(above[{which}], signal.SIGKILL)
time.sleep(600)
"""


def put(daemon: Daemon, queue: str, body: bytes) -> None:
    (daemon.queue_root / queue).mkdir(exist_ok=True)
    name = uuid.uuid4().hex
    hidden = daemon.queue_root / queue / f".{name}"
    hidden.write_bytes(body)
    hidden.rename(hidden.with_name(name))


def put_killer(daemon: Daemon, starts: pathlib.Path, which: int) -> None:
    """One that kills its `which`th ancestor: 0 is its parent, 1 its parent's parent, -1 the daemon."""
    script = KILLER.format(starts=str(starts), mark=f"--working-dir={daemon.working_dir}", which=which)
    put(daemon, "local_killer", messages.on_directory(daemon.storage, script, "killer"))


def put_waiting(daemon: Daemon, go: pathlib.Path) -> None:
    script = messages.WAIT.format(go=str(go))
    put(daemon, "local_other", messages.on_directory(daemon.storage, script, "other"))


def documents(daemon: Daemon, key: str) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(daemon.storage.glob("metadata/scrape-host-*"))]
    return [each for each in found if each["studioml"]["experiment"] == key]


def outcomes(daemon: Daemon, key: str) -> list[tuple[int, str]]:
    """The attempts of an experiment, each with how it ended."""
    return sorted((each["runner"]["attempt"], each["studioml"]["status"]) for each in documents(daemon, key))


def runs(daemon: Daemon, queue: str) -> bool:
    return any(
        run["queue"] == queue and run["stage"] == "running" for run in daemon.get("/api/runs")["running"]
    )


@pytest.mark.parametrize("which", [0, 1], ids=["parent", "parents-parent"])
def test_one_that_kills_what_is_above_it_is_dead_lettered_and_others_run_on(
    daemons: MakeDaemon, tmp_path, which
):
    daemon, starts, go = daemons(), tmp_path / "starts", tmp_path / "go"
    put_waiting(daemon, go)
    daemon.until(lambda: runs(daemon, "local_other"))
    put_killer(daemon, starts, which)
    (letter,) = daemon.until(daemon.dead_letters)
    assert (letter["queue"], letter["reason"], letter["attempts"]) == ("local_killer", "runner", 3)
    assert "has vanished" in letter["text"]
    assert len(starts.read_text().splitlines()) == 3
    daemon.until(lambda: not daemon.waiting("local_killer"))
    assert outcomes(daemon, "killer") == [(1, "failed"), (2, "failed"), (3, "failed")]
    assert runs(daemon, "local_other")  # all that time
    go.touch()
    daemon.until(lambda: outcomes(daemon, "other") == [(1, "completed")])
    assert daemon.stop() == 0
    assert not daemon.log("nursery lost")


def test_one_that_kills_the_parent_of_all_runs_harms_nobody(daemons: MakeDaemon, tmp_path):
    daemon, starts, go = daemons(), tmp_path / "starts", tmp_path / "go"
    put_waiting(daemon, go)
    daemon.until(lambda: runs(daemon, "local_other"))
    put_killer(daemon, starts, 2)
    daemon.until(lambda: daemon.log("nursery lost"))
    assert runs(daemon, "local_other")
    go.touch()
    daemon.until(lambda: outcomes(daemon, "other") == [(1, "completed")])
    put(daemon, "local_next", messages.on_directory(daemon.storage, "print('fine')", "next"))
    daemon.until(lambda: outcomes(daemon, "next") == [(1, "completed")])
    assert runs(daemon, "local_killer")


def test_one_that_kills_the_daemon_is_dead_lettered_and_others_are_served(daemons: MakeDaemon, tmp_path):
    daemon, starts = daemons(), tmp_path / "starts"
    put_killer(daemon, starts, -1)
    for number in (1, 2, 3):
        assert daemon.wait(100) == -9  # of its workload, not of ours
        assert len(starts.read_text().splitlines()) == number
        put(
            daemon,
            "local_other",
            messages.on_directory(daemon.storage, f"print({number})", f"other{number}"),
        )
        daemon.launch()  # as a service manager would; it may be killed before anybody can ask it anything
    (letter,) = daemon.until(daemon.dead_letters)
    assert (letter["queue"], letter["reason"], letter["attempts"]) == ("local_killer", "attempts", 3)
    assert "the runner ended while it ran" in letter["text"]
    daemon.until(lambda: not daemon.waiting("local_killer"))
    for number in (1, 2, 3):
        daemon.until(
            lambda number=number: "completed" in [how for _, how in outcomes(daemon, f"other{number}")]  # type: ignore[misc]
        )
    daemon.until(
        lambda: outcomes(daemon, "killer") == [(1, "failed"), (2, "failed"), (3, "failed")]
    )  # none says that it runs
    daemon.until(lambda: not daemon.waiting("local_other") and not daemon.get("/api/runs")["running"])
    assert len(starts.read_text().splitlines()) == 3
    assert daemon.stop() == 0
