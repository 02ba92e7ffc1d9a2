"""A daemon on a machine with cards: the real nvidia-ml-py on a library of the tests' own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from runner.resources import probe
from tests.e2e import messages
from tests.servers import nvml
from tests.servers.nvml import Machine

if TYPE_CHECKING:
    import pathlib

    from tests.servers.daemon import Daemon, MakeDaemon

#: Says what it was given, and goes on until it is let go; fails by itself where the file says so.
WORKLOAD = """
import os, pathlib, time
go = pathlib.Path({go!r})
go.with_suffix(".pid").write_text(str(os.getpid()))
print({{name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")}}, flush=True)
while not go.exists():
    time.sleep(0.02)
assert go.read_text() != "fail" or os.environ["CUDA_VISIBLE_DEVICES"] != "GPU-0", "CUDA error: uncorrectable ECC error"
"""


NO_GPU = (
    "no GPU is used: experiments that ask for one are left to other hosts; --cpu-only says it is meant so"
)


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Machine:
    made = Machine(tmp_path / "machine")
    made.gpus = [nvml.T4(uuid="GPU-0"), nvml.A100_40(uuid="GPU-1")]
    made.write()
    return made


@pytest.fixture
def daemon(daemons: MakeDaemon, nvml_library: pathlib.Path, machine: Machine) -> Daemon:
    return daemons(
        "--cpu-only=false", "--max-cores=0", "--queue-refresh=1s", env=nvml.environment(nvml_library, machine)
    )


def put(daemon: Daemon, queue: str, key: str, go: pathlib.Path, **asked: Any) -> None:
    body = messages.on_directory(
        daemon.storage,
        WORKLOAD.format(go=str(go)),
        key,
        resources_needed={"cpus": 0, "ram": 0, "hdd": 0} | asked,
        config={"env": {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}},  # nobody gives himself more than he gets
    )
    (daemon.queue_root / queue).mkdir(exist_ok=True)
    hidden = daemon.queue_root / queue / f".{key}"
    hidden.write_bytes(body)
    hidden.rename(hidden.with_name(key))


def documents(daemon: Daemon, key: str) -> list[dict[str, Any]]:
    found = [
        json.loads(path.read_text()) for path in sorted(daemon.storage.glob("metadata/scrape-host-*.json"))
    ]
    return [each for each in found if each["studioml"]["experiment"] == key]


def printed(daemon: Daemon, key: str) -> str:
    """What the run in progress of that experiment has printed."""
    for run in daemon.get("/api/runs")["running"]:
        if run["experiment"] == key:
            told: bytes = daemon.get(f"/api/runs/{run['run']}/output")
            return told.decode()
    return ""


def test_runs_of_one_queue_share_a_card_and_another_queue_gets_its_own(daemon, machine, tmp_path):
    go = {key: tmp_path / key for key in ("one", "two", "three", "four")}
    put(daemon, "local_a", "one", go["one"], gpus=1, gpuMem="6gb")
    put(daemon, "local_a", "two", go["two"], gpus=2, gpuMem="6gb")
    told = [daemon.until(lambda key=key: printed(daemon, key)) for key in ("one", "two")]
    given = "{'CUDA_VISIBLE_DEVICES': 'GPU-0', 'NVIDIA_VISIBLE_DEVICES': 'GPU-0', 'CUDA_DEVICE_ORDER': 'PCI_BUS_ID'}"
    assert [each.strip() for each in told] == [given, given]
    assert [run["gpus"] for run in daemon.get("/api/runs")["running"]] == [["GPU-0"], ["GPU-0"]]
    metrics = daemon.get("/metrics").decode()
    assert 'runner_gpu_free_slots{gpu="GPU-0",name="Tesla T4"} 1.0' in metrics
    assert 'runner_gpu_memory_bytes{gpu="GPU-1",name="NVIDIA A100-SXM4-40GB"} 4.29' in metrics

    of_stranger = {1: nvml.GIB}
    of_run = {int(go["one"].with_suffix(".pid").read_text()): 5 * nvml.GIB}
    machine.gpus[0].processes, machine.gpus[0].utilization = of_stranger | of_run, 70
    machine.write()
    daemon.until(lambda: used(daemon, "one").get("gpu_utilization", {}).get("peak") == 0.7)
    if probe.sees_all_processes():  # in a container the driver's process ids mean nothing
        daemon.until(lambda: used(daemon, "one").get("gpu_memory_bytes", {}).get("peak") == 5 * nvml.GIB)

    go["one"].write_text("done")  # there are two cores
    put(daemon, "local_b", "three", go["three"], gpus=1)
    assert "'CUDA_VISIBLE_DEVICES': 'GPU-1'" in daemon.until(lambda: printed(daemon, "three"))
    go["two"].write_text("done")
    daemon.until(lambda: completed(daemon, "two"))
    put(daemon, "local_none", "four", go["four"])
    assert "'CUDA_VISIBLE_DEVICES': '-1'" in daemon.until(lambda: printed(daemon, "four"))
    go["four"].write_text("done")
    daemon.until(lambda: completed(daemon, "four"))

    put(daemon, "local_b", "five", go["three"], gpus=28)
    why = "28 GPU slots are asked for; free are: Tesla T4 0 (4 of 4 slots"
    daemon.until(lambda: why in parked(daemon, "local_b"))
    go["three"].write_text("done")
    daemon.until(lambda: completed(daemon, "five"))
    (document,) = documents(daemon, "one")
    assert document["runner"]["used"]["gpu_utilization"]["peak"] == 0.7
    told_memory = document["runner"]["used"].get("gpu_memory_bytes", {}).get("peak")
    assert told_memory == (5 * nvml.GIB if probe.sees_all_processes() else None)
    (document,) = documents(daemon, "two")
    assert document["runner"]["granted"]["gpus"] == [
        {"uuid": "GPU-0", "name": "Tesla T4", "memory_bytes": 16106127360, "slots": 2}
    ]
    put(daemon, "local_c", "never", go["one"], gpus=40)
    why = "40 GPU slots are asked for; this machine has Tesla T4 0 (4 slots"
    daemon.until(lambda: why in closed(daemon, "local_c"))
    assert daemon.stop() == 0


def used(daemon: Daemon, key: str) -> dict[str, Any]:
    """What the run in progress of that experiment uses."""
    return next((run["used"] for run in daemon.get("/api/runs")["running"] if run["experiment"] == key), {})


def completed(daemon: Daemon, key: str) -> bool:
    return any(each["studioml"]["status"] == "completed" for each in documents(daemon, key))


def closed(daemon: Daemon, queue: str) -> str:
    told = daemon.get(f"/api/queues?queue={queue}")["queues"]
    return next((each["closed_because"] or "" for each in told), "")


def parked(daemon: Daemon, queue: str) -> str:
    told = daemon.get(f"/api/queues?queue={queue}")["queues"]
    return next((each["parked"] or "" for each in told), "")


@pytest.mark.parametrize("fails_by_itself", [True, False])
def test_a_card_that_fails_in_mid_run_sends_the_run_to_another(daemon, machine, tmp_path, fails_by_itself):
    go = tmp_path / "go"
    put(daemon, "local_a", "one", go, gpus=1)
    daemon.until(lambda: "GPU-0" in printed(daemon, "one"))
    machine.gpus[0].ecc = 3
    machine.write()
    if fails_by_itself:
        told = go.with_suffix(".partial")  # it must not be there before it says so
        told.write_text("fail")
        told.rename(go)
    else:
        (tmp_path / "now").write_text("done")
        put(daemon, "local_b", "two", tmp_path / "now", gpus=1)  # what asks for a card has them looked at
    daemon.until(lambda: daemon.log("experiment goes back to its queue"))
    go.write_text("done")
    failed, done = daemon.until(
        lambda: (
            (both := documents(daemon, "one"))[1:] and both[1]["studioml"]["status"] == "completed" and both
        )
    )
    assert (failed["studioml"]["status"], failed["studioml"]["reason"]) == ("failed", "gpu")
    assert done["runner"]["granted"]["gpus"][0]["uuid"] == "GPU-1"
    assert done["runner"]["attempt"] == 2
    (record,) = daemon.log("a GPU has failed and is not used any more")
    assert (record["gpu"], record["why"]) == ("GPU-0", "it has uncorrected memory errors (3)")
    assert 'runner_gpu_fenced{gpu="GPU-0",name="Tesla T4"} 1.0' in daemon.get("/metrics").decode()
    assert daemon.stop() == 0


def test_a_driver_that_hangs_hurts_nobody_who_needs_no_card_and_does_not_hold_up_the_end(
    daemon, machine, tmp_path
):
    go, hang = tmp_path / "go", tmp_path / "hang"
    put(daemon, "local_a", "zero", go, gpus=1)
    daemon.until(lambda: printed(daemon, "zero"))
    hang.touch()
    machine.hangs = {"nvmlDeviceGetCount_v2": hang}
    machine.write()
    go.write_text("done")
    daemon.until(lambda: completed(daemon, "zero") and not daemon.get("/api/runs")["running"])
    # What it gave back is being looked at from now on.
    put(daemon, "local_a", "one", go, gpus=1)
    put(daemon, "local_none", "two", go)
    daemon.until(lambda: completed(daemon, "two"))
    assert not documents(daemon, "one")
    assert daemon.stop() == 0
    assert [path.name.partition(".")[0] for path in daemon.waiting("local_a")] == ["one"]  # put back


def test_without_a_driver_a_request_for_a_gpu_is_for_other_hosts_and_cpu_only_does_not_even_look(
    daemons, tmp_path, nvml_library, machine
):
    go = tmp_path / "go"
    go.write_text("done")
    for number, (arguments, env, why) in enumerate(
        [
            (("--cpu-only=false",), {}, "this machine has no GPU: there is no libnvidia-ml.so.1"),
            (
                ("--cpu-only",),
                nvml.environment(nvml_library, machine),
                "this machine has no GPU: it is told to use none (--cpu-only)",
            ),
        ]
    ):
        daemon = daemons(*arguments, "--queue-refresh=1s", env=env)
        put(daemon, "local_a", f"k{number}", go, gpus=1)
        (left,) = daemon.until(lambda daemon=daemon: daemon.log("left to other hosts"))
        assert why in left["why"]
        assert len(daemon.log(NO_GPU)) == ("--cpu-only" not in arguments)
        assert daemon.stop() == 0
