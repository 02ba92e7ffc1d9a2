"""The GPUs of this machine, as NVIDIA's driver tells of them: the only module that imports pynvml, and only where its library is.

Everything here blocks, for milliseconds mostly, for as long as it likes when a card or the driver is broken: call it in a thread.
Nothing here raises for what the driver answers: what it cannot say is missing from the answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import threading
from typing import TYPE_CHECKING, Any

from runner.resources import probe
from runner.resources.cards import Card

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

LIBRARY = "libnvidia-ml.so.1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sight:
    """A card as it was seen once."""

    card: Card
    used_bytes: int  #: of its memory, by whomever
    ecc_errors: int = 0  #: uncorrected ones since the driver was loaded
    #: How much of that each run has, by its `STUDIOML_HOME`, and below "" runs of ours of which nothing tells which they are.
    #: None where the driver does not tell all processes and their memory.
    by_home: Mapping[str, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """What one look at the machine has shown."""

    sights: tuple[Sight, ...] = ()
    lost: frozenset[str] = (
        frozenset()
    )  #: UUIDs of cards of which the driver says that they are lost, or need a reset
    why: str = ""  #: why nothing could be seen at all; empty: the look went well


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What some processes use of a card. None: the driver does not say."""

    memory_bytes: int | None
    utilization: float | None  #: of the whole card, by whomever, 0 to 1; not told of MIG instances


class _LostError(Exception):
    """The card does not answer any more."""


class Nvml:
    """The driver's management library. Threads may share it."""

    def __init__(self) -> None:
        self._opening = threading.Lock()
        self._open = False
        self._stale = False  # what is open knows lost cards, which may have come back
        self._uuids: dict[int, str] = {}  # by index, of the last look: a lost card does not tell its own

    def look(self) -> Look:
        """All cards, MIG instances in place of the cards that are cut into them."""
        if not _has_library():
            return Look(why=f"there is no {LIBRARY}: no NVIDIA driver is installed")
        import pynvml

        try:
            self._reopen()
            number = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as exc:
            self._stale = True
            return Look(why=f"the NVIDIA driver says: {exc}")
        sights: list[Sight] = []
        lost: set[str] = set()
        for index in range(number):
            try:
                sights += _sights(index)
            except _LostError:
                self._stale = True
                lost.add(self._uuids.get(index, ""))
        self._uuids |= {
            int(each.card.index.partition(":")[0]): each.card.whole or each.card.uuid for each in sights
        }
        return Look(sights=tuple(sights), lost=frozenset(lost - {""}))

    def usage(self, uuids: Collection[str], pids: Collection[int]) -> dict[str, Usage]:
        """What these processes use of these cards (or MIG instances). A card that does not answer is missing.

        Only of what a `look` has found. The driver tells process ids of the host: in a container nothing is known of the memory.
        """
        if not self._open:
            return {}
        used = {}
        for uuid in uuids:
            with contextlib.suppress(_LostError):
                handle = _ask("nvmlDeviceGetHandleByUUID", uuid)
                if handle is not None:
                    used[uuid] = _usage(handle, set(pids))
        return used

    def _reopen(self) -> None:
        """Raises NVMLError."""
        import pynvml

        with self._opening:
            if self._stale:
                self._shut()
            if not self._open:
                pynvml.nvmlInit()
                self._open, self._stale = True, False

    def _shut(self) -> None:
        import pynvml

        if self._open:
            self._open = False
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()


def _has_library() -> bool:
    """Importing pynvml costs memory and time, which a machine without GPUs need not pay."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def _ask(function: str, *args: Any) -> Any:
    """What NVML answers; None when it does not: old drivers lack functions, cards lack features.

    Raises:
        _LostError: the card is lost or needs a reset.
    """
    import pynvml

    try:
        return getattr(pynvml, function)(*args)
    except (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired) as exc:
        raise _LostError from exc
    except (pynvml.NVMLError, UnicodeDecodeError):
        return None


def _sights(index: int) -> Iterator[Sight]:
    """The card of that index, or its MIG instances. Raises _LostError."""
    import pynvml

    handle = _ask("nvmlDeviceGetHandleByIndex", index)
    uuid = None if handle is None else _ask("nvmlDeviceGetUUID", handle)
    if not uuid:
        return
    name = _ask("nvmlDeviceGetName", handle) or "NVIDIA GPU"
    total, used = _memory(handle)
    ecc = _ask(
        "nvmlDeviceGetTotalEccErrors",
        handle,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        pynvml.NVML_VOLATILE_ECC,
    )
    card = Card(uuid=uuid, name=name, index=str(index), memory_bytes=total)
    if (_ask("nvmlDeviceGetMigMode", handle) or [0])[0]:
        for number in range(_ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            part = _ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, number)
            if part is not None and (seen := _instance(part, card, number, ecc or 0)) is not None:
                yield seen
        return
    yield Sight(card=card, used_bytes=used, ecc_errors=ecc or 0, by_home=_by_home(handle))


def _instance(handle: Any, whole: Card, number: int, ecc_errors: int) -> Sight | None:
    uuid = _ask("nvmlDeviceGetUUID", handle)
    if not uuid:
        return None
    name = _ask("nvmlDeviceGetName", handle) or whole.name
    total, used = _memory(handle)
    card = Card(
        uuid=uuid,
        name=name if " MIG" in name else f"{name} MIG",
        index=f"{whole.index}:{number}",
        memory_bytes=total,
        whole=whole.uuid,
        whole_bytes=whole.memory_bytes,
    )
    return Sight(card=card, used_bytes=used, ecc_errors=ecc_errors, by_home=_by_home(handle))


def _memory(handle: Any) -> tuple[int, int]:
    """All of it, and what is used; zeros when the driver does not say."""
    told = _ask("nvmlDeviceGetMemoryInfo", handle)
    return (0, 0) if told is None else (int(told.total), int(told.total) - int(told.free))


def _by_home(handle: Any) -> dict[str, int] | None:
    if not probe.sees_all_processes():
        return None
    by_pid = _processes(handle)
    if by_pid is None or None in by_pid.values():
        return None
    homes: dict[str, int] = {}
    for pid, used in by_pid.items():
        if (home := probe.home(pid)) is not None:
            homes[home] = homes.get(home, 0) + (used or 0)
    return homes


def _processes(handle: Any) -> dict[int, int | None] | None:
    """Memory by process id. A process may both compute and draw, and is then told of twice, with the same figure."""
    found: dict[int, int | None] = {}
    told = False
    for kind in ("Compute", "Graphics"):
        for version in ("_v3", "_v2"):
            listed = _ask(f"nvmlDeviceGet{kind}RunningProcesses{version}", handle)
            if listed is not None:
                told = True
                found |= {process.pid: process.usedGpuMemory for process in listed}
                break
    return found if told else None


def _usage(handle: Any, pids: Collection[int]) -> Usage:
    by_pid = _processes(handle) if probe.sees_all_processes() else None
    memory: int | None = None
    if by_pid is not None:
        known = [used for pid, used in by_pid.items() if pid in pids]
        memory = None if None in known else sum(used or 0 for used in known)
    rates = _ask("nvmlDeviceGetUtilizationRates", handle)
    return Usage(memory_bytes=memory, utilization=None if rates is None else rates.gpu / 100)
