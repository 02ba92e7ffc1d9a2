"""The real nvidia-ml-py on a library of the tests' own, in a process of its own, while the machine changes under it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from runner.resources import probe
from runner.resources.cards import Card
from runner.resources.gpus import Look, Sight, Usage
from tests.servers import nvml
from tests.servers.nvml import GIB, MIB, Machine, Part

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator

EYES = """
import sys
from runner.resources.gpus import Nvml
nvml = Nvml()
for line in sys.stdin:
    print(repr(eval(line)), flush=True)
"""


class Eyes:
    """A process that looks."""

    def __init__(self, library: pathlib.Path, machine: Machine) -> None:
        self.machine = machine
        self.process = subprocess.Popen(
            [sys.executable, "-c", EYES],
            env=os.environ | nvml.environment(library, machine) | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, expression: str) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.machine.write()
        self.process.stdin.write(f"{expression}\n")
        self.process.stdin.flush()
        names = {"Look": Look, "Sight": Sight, "Card": Card, "Usage": Usage, "frozenset": frozenset}
        return eval(self.process.stdout.readline(), names)

    def look(self) -> Look:
        seen = self.ask("nvml.look()")
        assert isinstance(seen, Look)
        return seen

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path / "machine")


@pytest.fixture
def eyes(nvml_library, machine) -> Iterator[Eyes]:
    made = Eyes(nvml_library, machine)
    yield made
    made.close()


def test_real_cards(eyes, machine):
    machine.gpus = [
        nvml.T4(uuid="GPU-0"),
        nvml.A100_80(uuid="GPU-1", used=9 * GIB),
        nvml.RTX_4090(uuid="GPU-2"),
        nvml.GTX_1080_TI(uuid="GPU-3"),
        nvml.H100(uuid="GPU-4", ecc=3),
    ]
    look = eyes.look()
    assert [(each.card.uuid, each.card.name, each.card.index) for each in look.sights] == [
        ("GPU-0", "Tesla T4", "0"),
        ("GPU-1", "NVIDIA A100 80GB PCIe", "1"),
        ("GPU-2", "NVIDIA GeForce RTX 4090", "2"),
        ("GPU-3", "NVIDIA GeForce GTX 1080 Ti", "3"),
        ("GPU-4", "NVIDIA H100 80GB HBM3", "4"),
    ]
    assert look.sights[0].card.memory_bytes == 15360 * MIB
    assert [each.used_bytes for each in look.sights][:2] == [448 * MIB, 9 * GIB]
    assert [each.ecc_errors for each in look.sights] == [0, 0, 0, 0, 3]  # those without ECC have none
    assert (look.lost, look.why) == (frozenset(), "")


def test_mig_instances_stand_for_their_card(eyes, machine):
    name = "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    machine.gpus = [
        nvml.A100_40(
            uuid="GPU-0",
            ecc=1,
            parts=[
                Part(uuid="MIG-a", name=name, total=4864 * MIB, used=12 * MIB),
                Part(uuid="MIG-b", name=name, total=4864 * MIB),
            ],
        ),
        nvml.A100_40(uuid="GPU-1", parts=[]),
        nvml.T4(uuid="GPU-2"),
    ]
    first, second, plain = eyes.look().sights
    assert first.card == Card(
        uuid="MIG-a", name=name, index="0:0", memory_bytes=4864 * MIB, whole="GPU-0", whole_bytes=40960 * MIB
    )
    assert (first.used_bytes, first.ecc_errors) == (12 * MIB, 1)  # the errors are the whole card's
    assert (second.card.uuid, second.card.index, second.card.is_mig) == ("MIG-b", "0:1", True)
    assert (plain.card.uuid, plain.card.is_mig) == ("GPU-2", False)


def test_a_lost_card_is_named_and_comes_back(eyes, machine):
    machine.gpus = [nvml.T4(uuid="GPU-0"), nvml.T4(uuid="GPU-1")]
    assert len(eyes.look().sights) == 2
    machine.gpus[0].lost = True
    look = eyes.look()
    assert [each.card.uuid for each in look.sights] == ["GPU-1"]
    assert look.lost == {"GPU-0"}
    assert eyes.ask("nvml.usage(['GPU-0', 'GPU-1'], [])").keys() == {"GPU-1"}
    machine.gpus[0].lost = False
    assert (len(eyes.look().sights), eyes.look().lost) == (2, frozenset())


@pytest.mark.parametrize(
    "functions",
    [
        ("nvmlDeviceGetMigMode", "nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetUtilizationRates"),
        ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3"),
        ("nvmlDeviceGetName", "nvmlErrorString"),
    ],
)
def test_an_old_driver_lacks_functions(tmp_path, machine, functions):
    eyes = Eyes(nvml.build(tmp_path, without=functions), machine)
    try:
        machine.gpus = [nvml.T4(uuid="GPU-0")]
        (seen,) = eyes.look().sights
        assert (seen.card.uuid, seen.card.memory_bytes, seen.ecc_errors) == ("GPU-0", 15360 * MIB, 0)
        (figures,) = eyes.ask("nvml.usage(['GPU-0'], [])").values()
        assert figures.memory_bytes == (0 if probe.sees_all_processes() else None)
    finally:
        eyes.close()


@pytest.mark.parametrize("code", [nvml.NOT_SUPPORTED, nvml.UNKNOWN, 4, 12345])
@pytest.mark.parametrize(
    "function",
    [
        "nvmlDeviceGetName",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetTotalEccErrors",
        "nvmlDeviceGetComputeRunningProcesses_v3",
    ],
)
def test_what_a_card_does_not_tell_costs_nothing_else(eyes, machine, function, code):
    machine.gpus = [nvml.T4(uuid="GPU-0")]
    machine.errors = {function: code}
    (seen,) = eyes.look().sights
    assert seen.card.uuid == "GPU-0"
    assert seen.card.memory_bytes == (0 if "Memory" in function else 15360 * MIB)


def test_a_card_without_a_name_to_call_it_by_is_not_there(eyes, machine):
    machine.gpus = [nvml.T4(uuid="GPU-0")]
    machine.errors = {"nvmlDeviceGetUUID": nvml.UNKNOWN}
    assert eyes.look() == Look()


@pytest.mark.parametrize(
    ("function", "code", "why"),
    [
        ("nvmlInitWithFlags", nvml.DRIVER_NOT_LOADED, "Driver Not Loaded"),
        ("nvmlInitWithFlags", nvml.LIB_RM_VERSION_MISMATCH, "version mismatch"),
        ("nvmlDeviceGetCount_v2", nvml.UNKNOWN, "Unknown Error"),
    ],
)
def test_a_driver_that_fails_is_told_and_tried_again(eyes, machine, function, code, why):
    machine.gpus = [nvml.T4(uuid="GPU-0")]
    machine.errors = {function: code}
    look = eyes.look()
    assert (look.sights, why in look.why) == ((), True)
    machine.errors = {}
    assert len(eyes.look().sights) == 1


def test_without_a_library_there_is_no_gpu_and_nothing_is_imported(tmp_path, machine):
    eyes = Eyes(tmp_path, machine)
    try:
        look = eyes.look()
        assert look.sights == ()
        assert "libnvidia-ml.so.1" in look.why
        assert eyes.ask("'pynvml' in sys.modules") is False
        assert eyes.ask("nvml.usage(['GPU-0'], [])") == {}
    finally:
        eyes.close()


def test_a_process_that_hides_its_environment_is_known_by_what_has_started_it(monkeypatch):
    """As workers do that are started with an empty one, and whatever changes its own title."""
    code = "import subprocess; print(subprocess.Popen(['sleep', '600'], env={}).pid, flush=True); input()"
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        env={"STUDIOML_HOME": "/runs/a"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    nameless = subprocess.Popen(["sleep", "600"], env={})
    assert parent.stdout
    worker = int(parent.stdout.readline())
    try:
        assert probe.home(worker) == "/runs/a"
        assert probe.home(nameless.pid) == ""  # this very process has started it: it is nobody else's
        monkeypatch.setattr(os, "getpid", lambda: 0)
        monkeypatch.delenv("STUDIOML_HOME", raising=False)
        assert probe.home(nameless.pid) is None
    finally:
        os.kill(worker, signal.SIGKILL)
        nameless.kill()
        nameless.communicate()
        parent.communicate(b"\n")
    assert probe.home(nameless.pid) is None  # it is gone


def test_whose_memory_it_is(eyes, machine, tmp_path):
    """A run's processes are known by the STUDIOML_HOME that they were started with."""
    sleeping = [
        subprocess.Popen(["sleep", "600"], env={"STUDIOML_HOME": home} if home else {})
        for home in ("/runs/a", "/runs/a", "/runs/b", "")
    ]
    try:
        used: dict[int, int | None] = {2**22 + 1: GIB}  # nobody has that number
        used.update({process.pid: number * GIB for number, process in enumerate(sleeping, 1)})
        machine.gpus = [nvml.A100_80(uuid="GPU-0", used=11 * GIB, utilization=70, processes=used)]
        (seen,) = eyes.look().sights
        if not probe.sees_all_processes():  # in a container the driver's process ids mean nothing
            assert seen.by_home is None
        else:
            assert seen.by_home == {"/runs/a": 3 * GIB, "/runs/b": 3 * GIB}
        pids = [process.pid for process in sleeping[:2]]
        memory = 3 * GIB if probe.sees_all_processes() else None
        assert eyes.ask(f"nvml.usage(['GPU-0'], {pids})") == {
            "GPU-0": Usage(memory_bytes=memory, utilization=0.7)
        }
        machine.gpus[0].processes[pids[0]] = None
        assert eyes.look().sights[0].by_home is None
        assert eyes.ask(f"nvml.usage(['GPU-0'], {pids})")["GPU-0"].memory_bytes is None
    finally:
        for process in sleeping:
            process.kill()
            process.wait()
