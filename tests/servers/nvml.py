"""A libnvidia-ml.so.1 that tells what a file says, for the unmodified nvidia-ml-py: no machine of the tests has a GPU.

`build` compiles it (gcc); with its directory in LD_LIBRARY_PATH at the start of a process, and FAKE_NVML naming the file, each
call reads the file anew. `Machine` writes the file, in one atomic step::

    machine = Machine(tmp_path / "machine")
    machine.gpus = [T4(uuid="GPU-a"), A100_40(uuid="GPU-b")]
    machine.write()
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import pathlib

GIB = 1 << 30
MIB = 1 << 20
# nvml.h
DRIVER_NOT_LOADED, NOT_SUPPORTED, UNKNOWN, GPU_IS_LOST, LIB_RM_VERSION_MISMATCH = 9, 3, 999, 15, 18


@dataclasses.dataclass(kw_only=True)
class Part:
    """A MIG instance."""

    uuid: str
    name: str
    total: int
    used: int = 0
    processes: dict[int, int | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True)
class Gpu:
    """A card. `ecc` None: it has no ECC memory. A process's memory None: the driver does not say."""

    uuid: str
    name: str
    total: int
    used: int = 0
    ecc: int | None = 0
    utilization: int | None = 0
    lost: bool = False  #: every call for it gives GPU_IS_LOST
    processes: dict[int, int | None] = dataclasses.field(default_factory=dict)
    parts: list[Part] | None = None  #: MIG is enabled


# As nvidia-smi shows them on the real ones.
T4 = functools.partial(Gpu, name="Tesla T4", total=15360 * MIB, used=448 * MIB)
A100_40 = functools.partial(Gpu, name="NVIDIA A100-SXM4-40GB", total=40960 * MIB, used=596 * MIB)
A100_80 = functools.partial(Gpu, name="NVIDIA A100 80GB PCIe", total=81920 * MIB, used=634 * MIB)
H100 = functools.partial(Gpu, name="NVIDIA H100 80GB HBM3", total=81559 * MIB, used=571 * MIB)
RTX_4090 = functools.partial(Gpu, name="NVIDIA GeForce RTX 4090", total=24564 * MIB, used=382 * MIB, ecc=None)
GTX_1080_TI = functools.partial(Gpu, name="NVIDIA GeForce GTX 1080 Ti", total=11264 * MIB, used=0, ecc=None)


class Machine:
    """What the library tells, until it is written anew."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.gpus: list[Gpu] = []
        self.errors: dict[str, int] = {}  #: what a function returns, whatever the file says
        self.hangs: dict[str, pathlib.Path] = {}  #: functions that do not return while that file is there
        self.write()

    def write(self) -> None:
        lines = [f"error|{name}|{code}" for name, code in self.errors.items()]
        lines += [f"hang|{name}|{path}" for name, path in self.hangs.items()]
        for gpu in self.gpus:
            ecc, rate = (-1 if each is None else each for each in (gpu.ecc, gpu.utilization))
            mig = -1 if gpu.parts is None else len(gpu.parts)
            lines.append(
                f"gpu|{gpu.uuid}|{gpu.name}|{gpu.total}|{gpu.used}|{ecc}|{rate}|{gpu.lost:d}|{mig}|{_told(gpu.processes)}"
            )
            lines += [
                f"part|{each.uuid}|{each.name}|{each.total}|{each.used}|-1|-1|0|-1|{_told(each.processes)}"
                for each in gpu.parts or []
            ]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in lines))
        partial.replace(self.path)


def _told(processes: dict[int, int | None]) -> str:
    return "".join(f"{pid}:{-1 if used is None else used}," for pid, used in processes.items())


_COMMON = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef struct { int is_part, whole, mig, lost; char uuid[96], name[96]; long long total, used, ecc, rate; char processes[512]; } row;
typedef struct { row rows[64]; int count; } machine;
typedef struct { u64 total, free, used; } memory;
typedef struct { u32 pid; u64 used; u32 gpu_instance, compute_instance; } process;
typedef struct { u32 gpu, memory; } rates;

static const char *next(char **rest) { char *field = strsep(rest, "|\n"); return field ? field : ""; }

/* What the function is to return, whatever else; -1: nothing is said. Reads the machine. */
static int get(machine *it, const char *function) {
    int result = -1;
    char line[2048];
    it->count = 0;
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    if (!file) return 9;
    while (fgets(line, sizeof line, file)) {
        char *rest = line;
        const char *kind = next(&rest);
        if (!strcmp(kind, "error")) {
            if (!strcmp(next(&rest), function)) result = atoi(next(&rest));
        } else if (!strcmp(kind, "hang")) {
            if (!strcmp(next(&rest), function)) { const char *path = next(&rest); while (!access(path, F_OK)) usleep(10000); }
        } else if (it->count < 64) {
            row *r = &it->rows[it->count];
            r->is_part = !strcmp(kind, "part");
            r->whole = r->is_part ? it->rows[it->count - 1].is_part ? it->rows[it->count - 1].whole : it->count - 1 : it->count;
            strncpy(r->uuid, next(&rest), 95); strncpy(r->name, next(&rest), 95);
            r->uuid[95] = r->name[95] = 0;
            r->total = atoll(next(&rest)); r->used = atoll(next(&rest)); r->ecc = atoll(next(&rest)); r->rate = atoll(next(&rest));
            r->lost = atoi(next(&rest)); r->mig = atoi(next(&rest));
            strncpy(r->processes, next(&rest), 511); r->processes[511] = 0;
            it->count++;
        }
    }
    fclose(file);
    return result;
}

/* The row of a handle, which is its number from 1. */
static int of(machine *it, const char *function, void *handle, row **found) {
    int forced = get(it, function);
    long number = (long)handle - 1;
    if (forced >= 0) return forced;
    if (number < 0 || number >= it->count) return 2;
    *found = &it->rows[number];
    return it->rows[(*found)->whole].lost ? 15 : 0;
}
#define ROW(function) machine it; row *r; int code = of(&it, function, handle, &r); if (code) return code;

static int processes_of(const char *function, void *handle, u32 *count, process *told) {
    ROW(function)
    u32 room = *count, number = 0;
    for (char *at = r->processes; *at; at = strchr(at, ',') + 1) {
        if (told && number < room) {
            process each = { (u32)atoi(at), (u64)atoll(strchr(at, ':') + 1), ~0u, ~0u };
            told[number] = each;
        }
        number++;
    }
    *count = number;
    return number > (told ? room : 0) ? 7 : 0;
}
"""

_FUNCTIONS = {
    "nvmlInitWithFlags": "(u32 flags) { machine it; int code = get(&it, FN); return code > 0 ? code : 0; }",
    "nvmlShutdown": "(void) { return 0; }",
    "nvmlErrorString": None,
    "nvmlDeviceGetCount_v2": "(u32 *count) { machine it; int code = get(&it, FN); if (code > 0) return code;"
    " *count = 0; for (int i = 0; i < it.count; i++) *count += !it.rows[i].is_part; return 0; }",
    "nvmlDeviceGetHandleByIndex_v2": "(u32 index, void **handle) { machine it; int code = get(&it, FN); if (code > 0) return code;"
    " for (int i = 0; i < it.count; i++) if (!it.rows[i].is_part && index-- == 0)"
    " { *handle = (void *)(long)(i + 1); return it.rows[i].lost ? 15 : 0; } return 2; }",
    "nvmlDeviceGetHandleByUUID": "(const char *uuid, void **handle) { machine it; int code = get(&it, FN); if (code > 0) return code;"
    " for (int i = 0; i < it.count; i++) if (!strcmp(it.rows[i].uuid, uuid))"
    " { *handle = (void *)(long)(i + 1); return it.rows[it.rows[i].whole].lost ? 15 : 0; } return 6; }",
    "nvmlDeviceGetUUID": '(void *handle, char *text, u32 size) { ROW(FN) snprintf(text, size, "%s", r->uuid); return 0; }',
    "nvmlDeviceGetName": '(void *handle, char *text, u32 size) { ROW(FN) snprintf(text, size, "%s", r->name); return 0; }',
    "nvmlDeviceGetMemoryInfo": "(void *handle, memory *told) { ROW(FN)"
    " told->total = r->total; told->used = r->used; told->free = r->total - r->used; return 0; }",
    "nvmlDeviceGetTotalEccErrors": "(void *handle, int error, int counter, u64 *count) { ROW(FN)"
    " if (r->ecc < 0) return 3; *count = error == 1 && counter == 0 ? r->ecc : 777; return 0; }",
    "nvmlDeviceGetMigMode": "(void *handle, u32 *current, u32 *pending) { ROW(FN) *current = *pending = r->mig >= 0; return 0; }",
    "nvmlDeviceGetMaxMigDeviceCount": "(void *handle, u32 *count) { ROW(FN) *count = 7; return 0; }",
    "nvmlDeviceGetMigDeviceHandleByIndex": "(void *handle, u32 index, void **part) { ROW(FN)"
    " if ((int)index >= r->mig) return 6; *part = (void *)((long)handle + 1 + index); return 0; }",
    "nvmlDeviceGetUtilizationRates": "(void *handle, rates *told) { ROW(FN)"
    " if (r->rate < 0) return 3; told->gpu = r->rate; told->memory = 0; return 0; }",
    "nvmlDeviceGetComputeRunningProcesses_v3": "(void *handle, u32 *count, process *told) { return processes_of(FN, handle, count, told); }",
    "nvmlDeviceGetComputeRunningProcesses_v2": "(void *handle, u32 *count, process *told) { return processes_of(FN, handle, count, told); }",
    "nvmlDeviceGetGraphicsRunningProcesses_v3": "(void *handle, u32 *count, process *told) { *count = 0; return 0; }",
}
_ERROR_STRING = 'const char *nvmlErrorString(int code) { return "an error of the fake library"; }'


def build(directory: pathlib.Path, *, without: tuple[str, ...] = ()) -> pathlib.Path:
    """Compile it into that directory; `without` these functions, as in an old driver."""
    if shutil.which("gcc") is None:
        absent = "no compiler for the fake libnvidia-ml (Debian: gcc libc6-dev)"
        if os.environ.get("CI") == "true":
            pytest.fail(absent)
        pytest.skip(absent)
    assert set(without) <= set(_FUNCTIONS)
    source = _COMMON + "\n".join(
        _ERROR_STRING if body is None else f"int {name}{body.replace('FN', f'{chr(34)}{name}{chr(34)}')}"
        for name, body in _FUNCTIONS.items()
        if name not in without
    )
    (directory / "nvml.c").write_text(source)
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-O1",
        "-w",
        "-o",
        str(directory / "libnvidia-ml.so.1"),
        str(directory / "nvml.c"),
    ]
    subprocess.run(command, check=True)
    return directory


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of the library, with all functions."""
    return build(tmp_path_factory.mktemp("nvml"))


def environment(library: pathlib.Path, machine: Machine) -> dict[str, str]:
    """For a process that is to see that machine."""
    return {"LD_LIBRARY_PATH": str(library), "FAKE_NVML": str(machine.path)}
