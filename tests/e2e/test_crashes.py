"""`kill -9` of the daemon in any stage: nothing is left within seconds, and nothing is lost (DESIGN.md rules 2, 3, 6)."""

from __future__ import annotations

import json
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e import messages
from tests.servers import daemon as daemon_server
from tests.servers.faulty_http import Fault

if TYPE_CHECKING:
    import pathlib

    from tests.servers.daemon import Daemon, MakeDaemon
    from tests.servers.faulty_http import FaultyHttp

QUEUE = "local_a"
#: Five are promised (tests/unit/process/test_survivors.py), by a machine that is not too busy to keep that.
SURVIVORS_SECS = 30.0

STRAYS = """
import os, signal, sys, time
for _ in range(2):
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
"""


def put(daemon: Daemon, body: bytes, name: str = "m1") -> None:
    (daemon.queue_root / QUEUE).mkdir(exist_ok=True)
    hidden = daemon.queue_root / QUEUE / f".{name}"
    hidden.write_bytes(body)
    hidden.rename(hidden.with_name(name))


def documents(storage: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(storage.glob("metadata/scrape-host-*.json"))]


def stage(daemon: Daemon, name: str) -> bool:
    return any(run["stage"] == name for run in daemon.get("/api/runs")["running"])


def nothing_is_left(daemon: Daemon) -> None:
    daemon.until(lambda: not daemon_server.processes_below(daemon.working_dir), SURVIVORS_SECS)


def completes_after_a_restart(daemon: Daemon, attempts: int) -> None:
    daemon.start()
    completed = daemon.until(
        lambda: [each for each in documents(daemon.storage) if each["studioml"]["status"] == "completed"]
    )
    assert completed[0]["runner"]["attempt"] == attempts
    daemon.until(lambda: not daemon.waiting(QUEUE) and not daemon.get("/api/runs")["running"])
    assert not daemon.dead_letters()
    # Also that of the run that was cut off: its document is ended beside all else.
    daemon.until(lambda: not list((daemon.working_dir / "runs").iterdir()))
    assert daemon.stop() == 0


def test_while_the_workload_runs(daemons: MakeDaemon, tmp_path):
    daemon = daemons()
    go = tmp_path / "go"
    put(daemon, messages.on_directory(daemon.storage, STRAYS + messages.WAIT.format(go=str(go)), "k"))
    daemon.until(lambda: stage(daemon, "running") and len(daemon.processes()) >= 3)
    daemon.kill()
    nothing_is_left(daemon)
    go.touch()
    completes_after_a_restart(daemon, attempts=2)
    # The document of the attempt that was cut off does not say `running` for ever.
    assert [each["studioml"]["status"] for each in documents(daemon.storage)] == ["failed", "completed"]


def test_while_the_environment_is_built(daemons: MakeDaemon, tmp_path):
    daemon = daemons()
    package = tmp_path / "slow"
    package.mkdir()
    go = tmp_path / "go"
    (package / "setup.py").write_text(
        f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)\n"
        "from setuptools import setup\nsetup(name='slow-thing', version='1', py_modules=[])\n"
    )
    script = "print('ran')"
    body = json.loads(messages.on_directory(daemon.storage, script, "k", pythonenv=["./slow"]))
    files = {"main.py": script, "slow/setup.py": (package / "setup.py").read_text()}
    (daemon.storage / "k.tar").write_bytes(messages.archive(files))
    put(daemon, json.dumps(body).encode())
    daemon.until(lambda: stage(daemon, "environment") and daemon.processes())
    daemon.kill()
    nothing_is_left(daemon)
    go.touch()
    completes_after_a_restart(daemon, attempts=2)


def test_while_artifacts_are_fetched(daemons: MakeDaemon, faulty_http: FaultyHttp):
    daemon = daemons()
    faulty_http.content = b"x" * 1000
    faulty_http.faults.append(Fault(how="stall", after=10))
    slow = {"url": f"http://{faulty_http.endpoint}/data", "mutable": False, "unpack": False}
    put(daemon, messages.on_directory(daemon.storage, "print(1)", "k", artifacts={"data": slow}))
    daemon.until(lambda: stage(daemon, "staging"))
    daemon.kill()
    nothing_is_left(daemon)
    faulty_http.released.set()
    completes_after_a_restart(daemon, attempts=2)


def test_a_message_that_kills_its_runner_three_times_is_dead_lettered_while_others_run(daemons: MakeDaemon):
    daemon = daemons()
    put(
        daemon,
        messages.on_directory(
            daemon.storage, "import time; print('bad', flush=True); time.sleep(600)", "bad"
        ),
    )
    for _ in range(3):
        daemon.until(lambda: stage(daemon, "running"))
        daemon.kill()
        nothing_is_left(daemon)
        daemon.start()
    (letter,) = daemon.until(daemon.dead_letters)
    assert (letter["reason"], letter["attempts"]) == ("attempts", 3)
    put(daemon, messages.on_directory(daemon.storage, "print('fine')", "good"), "m2")
    daemon.until(lambda: any(each["studioml"]["status"] == "completed" for each in documents(daemon.storage)))
    assert daemon.stop() == 0


def test_a_lost_working_directory_starts_anew(daemons: MakeDaemon):
    daemon = daemons("--state-dir=../state-apart")
    daemon.kill()
    shutil.rmtree(daemon.working_dir / "runs")
    daemon.start()
    put(daemon, messages.on_directory(daemon.storage, "print('fine')", "k"))
    daemon.until(lambda: documents(daemon.storage))
    assert daemon.stop() == 0


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_lets_the_run_finish_and_a_second_one_does_not(daemons: MakeDaemon, tmp_path, number):
    daemon = daemons()
    put(daemon, messages.on_directory(daemon.storage, messages.WAIT.format(go=str(tmp_path / "never")), "k"))
    daemon.until(lambda: stage(daemon, "running"))
    daemon.signal(signal.Signals[number])
    daemon.until(lambda: daemon.log("draining"))
    assert daemon.process is not None
    assert daemon.process.poll() is None
    daemon.signal(signal.Signals[number])
    assert daemon.wait() == 128 + signal.Signals[number]
    nothing_is_left(daemon)
    daemon.start()
    daemon.until(
        lambda: stage(daemon, "running")
    )  # the message is back, and no other attempt was counted for it
    assert daemon.get("/api/runs")["running"][0]["attempt"] <= 2


def test_a_second_signal_does_not_wait_for_a_server_that_has_stalled(
    daemons: MakeDaemon, faulty_http: FaultyHttp
):
    daemon = daemons()
    faulty_http.content = b"x" * 1000
    faulty_http.always = Fault(how="stall", after=10)
    slow = {"url": f"http://{faulty_http.endpoint}/data", "mutable": False, "unpack": False}
    put(daemon, messages.on_directory(daemon.storage, "print(1)", "k", artifacts={"data": slow}))
    daemon.until(lambda: stage(daemon, "staging"))
    daemon.signal(signal.SIGTERM)
    daemon.until(lambda: daemon.log("takes no more work"))
    daemon.signal(signal.SIGTERM)
    # The stalls themselves last longer than a minute.
    assert daemon.wait(40) == 128 + signal.SIGTERM
