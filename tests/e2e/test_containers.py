"""Experiments in containers, from queue to stored results, on a real engine."""

from __future__ import annotations

import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e import messages
from tests.servers.docker import GREETER, PYTHON

if TYPE_CHECKING:
    import pathlib

    from tests.servers.daemon import Daemon, MakeDaemon
    from tests.servers.docker import DockerServer

pytestmark = pytest.mark.slow
QUEUE = "local_a"


def put(daemon: Daemon, body: bytes, name: str = "m1") -> None:
    (daemon.queue_root / QUEUE).mkdir(exist_ok=True)
    hidden = daemon.queue_root / QUEUE / f".{name}"
    hidden.write_bytes(body)
    hidden.rename(hidden.with_name(name))


def serving(daemons: MakeDaemon, docker: DockerServer) -> Daemon:
    # The engine of the tests has no networks.
    return daemons("--container-network=none", env=docker.env)


def body(daemon: Daemon, script: str, key: str, image: str = PYTHON, **experiment: Any) -> bytes:
    settings = {"container": {"image": image}}
    return messages.on_directory(
        daemon.storage, script, key, **({"config": settings, "pythonver": None} | experiment)
    )


def ended(daemon: Daemon, key: str) -> dict[str, Any]:
    """The last of that experiment, once its message is settled."""
    settled = daemon.until(
        lambda: [run for run in daemon.runs() if run["experiment"] == key and "fate" in run]
    )
    return settled[-1]


def memory_peak(run: dict[str, Any]) -> int:
    """What it has used so far, as the pages show it."""
    peak: int = run.get("used", {}).get("memory_bytes", {}).get("peak", 0)
    return peak


def printed(storage: pathlib.Path, key: str) -> str:
    with tarfile.open(storage / "experiments" / key / "output.tar") as archive:
        member = archive.extractfile("output")
        assert member is not None
        return member.read().decode()


def test_from_the_queue_to_stored_results(daemons: MakeDaemon, docker: DockerServer):
    daemon = serving(daemons, docker)
    script = """
import json, os, time
held = b"x" * (100 << 20)
home = os.environ["STUDIOML_HOME"] + "/experiments/" + os.environ["STUDIOML_EXPERIMENT"]
while not os.path.exists(home + "/modeldir/measured"):
    time.sleep(0.1)
open(home + "/modeldir/model", "w").write("trained")
print(json.dumps({"experiment": {"score": 7}}))
raise SystemExit(4)
"""
    put(daemon, body(daemon, script, "k1"))
    # The engine's client has a fraction of that, and no other process here has it.
    daemon.until(lambda: [run for run in daemon.runs() if memory_peak(run) > 100 << 20])
    (modeldir,) = daemon.working_dir.glob("runs/*/experiments/*/modeldir")
    (modeldir / "measured").touch()
    run = ended(daemon, "k1")
    assert (run["status"], run["reason"], run["exit_code"]) == ("failed", "exit", 4)
    assert printed(daemon.storage, "k1") == '{"experiment": {"score": 7}}\n'
    with tarfile.open(daemon.storage / "experiments/k1/modeldir.tar") as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
    assert names == {".", "measured", "model"}
    (document,) = (
        json.loads(path.read_text()) for path in daemon.storage.glob("metadata/scrape-host-*.json")
    )
    assert document["experiment"]["score"] == 7
    assert document["runner"]["environment"]["image"] == PYTHON
    used = document["runner"]["used"]
    assert used.keys() == {"elapsed_secs", "samples", "cpu_cores", "memory_bytes", "disk_bytes"}
    assert 100 << 20 < used["memory_bytes"]["peak"] < 200 << 20
    assert docker.containers() == []
    # An image's own program; and one whose name is none.
    put(daemon, body(daemon, "", "k2", image=GREETER, filename=None, args=["you"]), "m2")
    assert ended(daemon, "k2")["status"] == "completed"
    assert "hello from the image\ngiven: you\n" in printed(daemon.storage, "k2")
    put(daemon, body(daemon, "", "k3", image="-v /:/host"), "m3")
    assert "is not the name of a container image" in ended(daemon, "k3")["text"]
    daemon.until(lambda: len(daemon.dead_letters()) == 1)
    assert daemon.stop() == 0
    assert not list((daemon.working_dir / "runs").iterdir())


def test_runs_whose_time_is_over_end_with_their_containers_also_those_that_ignore_it(
    daemons: MakeDaemon, docker: DockerServer
):
    daemon = serving(daemons, docker)
    script = """
import signal, sys, time
def end(*_):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("begun", flush=True)
time.sleep(600)
"""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('begun', flush=True)\nwhile True: time.sleep(60)"
    put(daemon, body(daemon, script, "k1", max_duration="5s"))
    put(daemon, body(daemon, stubborn, "k2", max_duration="5s"), "m2")
    for key in ("k1", "k2"):
        run = ended(daemon, key)
        assert (run["status"], run["reason"]) == ("failed", "timeout")
    # Where the machine was so slow that it had not begun, there was nothing to be saved.
    said = printed(daemon.storage, "k1")
    assert "saved" in said or "begun" not in said
    assert docker.containers() == []


def test_a_killed_daemon_leaves_no_container_running_and_its_next_start_none_at_all(
    daemons: MakeDaemon, docker: DockerServer, tmp_path: pathlib.Path
):
    daemon = serving(daemons, docker)
    script = """
import os, signal, time
first = not os.path.exists("../modeldir/model")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("begun", flush=True)
while first:
    time.sleep(60)
"""
    put(daemon, body(daemon, script, "k"))
    outputs = "runs/*/experiments/*/output/output"
    daemon.until(lambda: any(path.read_text() for path in daemon.working_dir.glob(outputs)))
    (first,) = docker.containers()
    daemon.kill()
    daemon.until(lambda: not docker.docker("ps", "--quiet", check=True).stdout)  # nobody else ends it
    assert docker.containers() == [first]
    model = tmp_path / "model"
    model.write_text("of a checkpoint")  # the second attempt will have it
    (daemon.storage / "experiments" / "k").mkdir(parents=True, exist_ok=True)
    with tarfile.open(daemon.storage / "experiments" / "k" / "modeldir.tar", "w") as archive:
        archive.add(model, "model")
    daemon.start()
    run = ended(daemon, "k")
    assert (run["status"], run["attempt"]) == ("completed", 2)  # the first was counted
    daemon.until(lambda: not docker.containers())
    assert daemon.stop() == 0
