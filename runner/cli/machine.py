"""What `doctor` looks at on this machine: what can be given to experiments, and what they can run in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from runner import errors, units
from runner.cli.finding import Finding, unusable
from runner.executors import docker_engine, engines
from runner.executors.interpreters import OLDEST, Interpreters
from runner.experiment import runas
from runner.process import cgroups
from runner.resources import cards, probe
from runner.resources.gpus import Look, Nvml
from runner.resources.visibility import visible

if TYPE_CHECKING:
    from runner.config import Config
    from runner.executors.interpreters import Interpreter
    from runner.process.spawner import Spawner
    from runner.resources.gpus import Sight

#: Runs need room for their inputs and environments: below this a machine is of no use, whatever the reserve says.
LITTLE_DISK_BYTES = 1_000_000_000
#: How long the driver may take to tell of its cards.
DRIVER_SECS = 20.0


def machine(config: Config) -> list[Finding]:
    """Cores, memory and disk."""
    volume = config.paths.working_dir
    while not volume.exists():
        volume = volume.parent
    try:
        total = probe.machine(config.machine, volume)
    except errors.UsageError as exc:
        return [Finding(subject="machine", verdict="problem", text=str(exc), advice="lower that option")]
    free = probe.disk_free(volume)
    facts = {
        "cores": total.cpus,
        "ram_bytes": total.ram_bytes,
        "disk_bytes": total.hdd_bytes,
        "disk_free_bytes": free,
    }
    wanted = config.machine.max_mem_bytes
    short = total.ram_bytes < wanted
    less = f", --max-mem allows {units.format_bytes(wanted)}: the rest is in use now" if short else ""
    machine = Finding(
        subject="machine",
        verdict="warning" if short else "ok",
        text=f"{total.cpus} cores and {units.format_bytes(total.ram_bytes)} of memory may be given to experiments{less}",
        advice="runs of a daemon use it, or others do" if short else "",
        facts=facts,
    )
    used = shutil.disk_usage(volume)
    disk = Finding(
        subject="disk",
        verdict="ok" if free >= LITTLE_DISK_BYTES else "problem",
        text=f"{units.format_bytes(free)} may be promised of {units.format_bytes(used.total)} at {volume} "
        f"({units.format_bytes(used.free)} are free, a tenth of all is never promised)",
        advice=""
        if free >= LITTLE_DISK_BYTES
        else "make room there, or name another volume with --working-dir",
        facts=facts,
    )
    return [machine, disk]


def limits(config: Config) -> list[Finding]:
    """How runs would be kept within what they were granted, by a daemon started like this program."""
    if not config.runs.enforce_limits:
        return [
            Finding(
                subject="limits",
                verdict="warning",
                text="runs may use more than they were granted: --enforce-limits is false",
                advice="without it one run can take the memory of all others",
            )
        ]
    try:
        groups = cgroups.Groups.foreseen()
    except cgroups.Unavailable as exc:
        return [
            Finding(
                subject="limits",
                verdict="ok",
                text=f"memory and disk of runs are measured every few seconds; the kernel sees to no limit, seen from here: {exc}",
                advice="Delegate=yes in its systemd unit, or a container that may write its control group, gives the daemon control groups",
                facts={"mechanism": "measured"},
            )
        ]
    return [
        Finding(
            subject="limits",
            verdict="ok",
            text=f"the kernel sees to the memory of runs: {groups}",
            facts={"mechanism": f"cgroup v{groups.version}"},
        )
    ]


def gpus(config: Config) -> list[Finding]:
    """Each card, as the runner would use it."""
    if config.machine.cpu_only:
        return [Finding(subject="gpus", verdict="ok", text="none are used: --cpu-only")]
    try:
        table = cards.load(config.machine.gpu_cards)
    except errors.UsageError as exc:
        return [unusable("gpus", str(exc))]
    look = _look()
    usable = visible(
        [sight.card for sight in look.sights], os.environ, contained=not probe.sees_all_processes()
    )
    if not look.sights and not look.lost:
        return [
            Finding(
                subject="gpus",
                verdict="warning",
                text=f"none: {look.why or 'the driver has found no card'}",
                advice="--cpu-only says that it is meant so; experiments that ask for GPUs are left to other hosts",
            )
        ]
    return [
        *[_gpu(sight, table, usable=sight.card in usable) for sight in look.sights],
        *[unusable(f"gpu {uuid}", "the driver has lost it") for uuid in sorted(look.lost)],
    ]


def _look() -> Look:
    """In a thread that nobody waits for at the end: a call into a broken driver may never return."""
    answers: queue.SimpleQueue[Look] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(Nvml().look()), daemon=True).start()
    try:
        return answers.get(timeout=DRIVER_SECS)
    except queue.Empty:
        return Look(why=f"the NVIDIA driver has not answered in {DRIVER_SECS:.0f} s")


def _gpu(sight: Sight, table: cards.Table, *, usable: bool) -> Finding:
    card, slots = sight.card, table.slots(sight.card)
    subject = f"gpu {card.index}"
    facts = {"uuid": card.uuid, "name": card.name, "memory_bytes": card.memory_bytes, "slots": slots.count}
    what = f"{card.name} with {units.format_bytes(card.memory_bytes)}, {slots.count} slots"
    if not usable:
        told = "hidden by CUDA_VISIBLE_DEVICES or NVIDIA_VISIBLE_DEVICES"
        return Finding(subject=subject, verdict="ok", text=f"{what}: {told}", facts=facts | {"slots": 0})
    if sight.ecc_errors:
        return Finding(
            subject=subject,
            verdict="problem",
            text=f"{what}: {sight.ecc_errors} uncorrected memory errors: it is fenced",
            advice="reset it (nvidia-smi --gpu-reset) or restart the machine; replace it when they come back",
            facts=facts,
        )
    if slots.estimated:
        return Finding(
            subject=subject,
            verdict="warning",
            text=f"{what}, estimated from its memory: its name is in no table",
            advice="say how many in a file for --gpu-cards",
            facts=facts,
        )
    return Finding(subject=subject, verdict="ok", text=what, facts=facts)


async def containers(config: Config, spawner: Spawner) -> list[Finding]:
    """The engines of containers: none is needed but by experiments that ask for one."""
    return [await _docker(config, spawner), await asyncio.to_thread(_singularity)]


async def _docker(config: Config, spawner: Spawner) -> Finding:
    wanted = config.containers.engine
    program = docker_engine.find(wanted, os.environ)
    if program is None:
        named = wanted not in {"auto", "off"}
        return Finding(
            subject="containers",
            verdict="problem" if named else "ok",
            text="no engine: --container-engine=off"
            if wanted == "off"
            else "no docker or podman is on the PATH",
            advice=f"install {wanted}, or name another"
            if named
            else "experiments in Docker images are left to other hosts",
        )
    try:
        answer = await docker_engine.Engine(program, spawner, environ=os.environ).ask("info")
        why = "" if answer.ok else answer.last
    except errors.RunnerError as exc:
        why = str(exc).strip().splitlines()[-1]
    facts = {"program": str(program)}
    if why:
        return Finding(
            subject="containers",
            verdict="problem" if wanted != "auto" else "warning",
            text=f"{program} is there, but its engine cannot be used: {why}",
            advice="start it, and let this user speak to it; or --container-engine=off",
            facts=facts,
        )
    return Finding(subject="containers", verdict="ok", text=f"{program} answers", facts=facts)


def _singularity() -> Finding:
    engine = engines.Engine.find(os.environ)
    if engine is None:
        advice = "experiments in Singularity images are left to other hosts; install apptainer if they should run here"
        return Finding(
            subject="singularity",
            verdict="ok",
            text="no apptainer or singularity is on the PATH",
            advice=advice,
        )
    return Finding(
        subject="singularity", verdict="ok", text=f"{engine.path} is there", facts={"program": engine.path}
    )


async def interpreters(config: Config, spawner: Spawner) -> list[Finding]:
    """The Pythons that experiments can have."""
    with tempfile.TemporaryDirectory() as scratch:
        # The daemon's own notes of them, where they can be read; never written by us.
        notes = config.environments.cache_dir / "interpreters.json"
        kept = Path(scratch) / "interpreters.json"
        with contextlib.suppress(OSError):
            kept.write_bytes(notes.read_bytes())
        found = await Interpreters(spawner, kept, environ=os.environ).discover()
    usable = [one for one in found if one.version[:2] >= OLDEST]
    facts = {"interpreters": [{"version": str(one), "path": str(one.path)} for one in found]}
    if not usable:
        return [
            Finding(
                subject="python",
                verdict="problem",
                text="no usable interpreter was found",
                advice="install one with `uv python install 3.11`, pyenv, or the system's packages",
                facts=facts,
            )
        ]
    listed = ", ".join(map(str, usable))
    old = [str(one) for one in found if one.version[:2] < OLDEST]
    return [
        Finding(
            subject="python",
            verdict="ok",
            text=f"{listed}{'; too old: ' + ', '.join(old) if old else ''}",
            facts=facts,
        ),
        *([_another_user(config.runs.run_as, usable)] if config.runs.run_as else []),
    ]


def _another_user(name: str, interpreters: list[Interpreter]) -> Finding:
    """With --run-as: who that is, and whether they can start what the daemon would choose."""
    try:
        user = runas.resolve(name)
    except errors.UsageError as exc:
        return unusable("--run-as", str(exc))
    assert user is not None
    shut = [str(one.path) for one in interpreters if runas.closed(one.path, user) is not None]
    if not shut:
        return Finding(subject="--run-as", verdict="ok", text=f"experiments run as {user.name}")
    return Finding(
        subject="--run-as",
        verdict="problem" if len(shut) == len(interpreters) else "warning",
        text=f"{user.name} cannot enter where {', '.join(shut)} is: experiments that get it cannot start",
        advice="install it where everybody may enter, not in a closed home: UV_PYTHON_INSTALL_DIR=/opt/python uv python install",
        facts={"unreachable": shut},
    )
