"""Reserving parts of the machine: all or nothing, never twice, released once however often it is asked (DESIGN.md rule 8).

Not thread-safe: it lives in the daemon's loop, and nothing in it waits but `acquire`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from typing import TYPE_CHECKING

from runner import errors, units
from runner.request.model import Resources
from runner.resources.gpupool import GpuPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner.resources.gpupool import Grant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """A part of the machine, held by one experiment until it is released."""

    number: int
    amounts: Resources
    gpus: tuple[Grant, ...] = ()  #: parts of cards
    allocator: Allocator = dataclasses.field(repr=False, compare=False)

    def name(self, home: str) -> None:
        """The run that has it got this `STUDIOML_HOME`: by that its processes are known on the cards."""
        self.allocator.gpus.name(self.number, home)

    def release(self) -> None:
        """Give it back. Any further call does nothing."""
        self.allocator.release(self)


@dataclasses.dataclass(kw_only=True, eq=False)
class _Waiter:
    ask: Resources
    owner: str
    rank: Callable[[], float]
    granted: asyncio.Future[Allocation]


class Allocator:
    """Cores, memory, disk and GPUs of one machine. `owner` is the queue that asks: a card serves one at a time."""

    def __init__(self, total: Resources, disk_free: Callable[[], int], gpus: GpuPool | None = None) -> None:
        self.total = total
        self.gpus = GpuPool() if gpus is None else gpus
        self._disk_free = disk_free
        self._held: dict[int, Allocation] = {}
        self._numbers = itertools.count(1)
        self._waiters: list[_Waiter] = []
        self._listeners: list[Callable[[], None]] = []

    @staticmethod
    def normalise(ask: Resources) -> Resources:
        """What is really reserved for an ask: whatever runs needs at least one core."""
        return dataclasses.replace(ask, cpus=max(1, ask.cpus))

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener`, in the loop, whenever something was granted or given back."""
        self._listeners.append(listener)

    @property
    def free(self) -> Resources:
        """What could be granted now."""
        held = [allocation.amounts for allocation in self._held.values()]
        promised = sum(amounts.hdd_bytes for amounts in held)
        return Resources(
            cpus=self.total.cpus - sum(amounts.cpus for amounts in held),
            ram_bytes=self.total.ram_bytes - sum(amounts.ram_bytes for amounts in held),
            # What runs have written already is missing from the free space as well: counted twice, on the safe side.
            hdd_bytes=max(0, min(self.total.hdd_bytes, self._disk_free()) - promised),
            gpus=self.gpus.free_slots,
        )

    @property
    def held(self) -> int:
        """How many allocations are out."""
        return len(self._held)

    def lacking(self, ask: Resources, of: Resources) -> str:
        """What of `of`, GPUs apart, there is too little of for `ask`, in words; empty when it fits."""
        ask = self.normalise(ask)
        short = []
        if ask.cpus > of.cpus:
            short.append(f"{ask.cpus} cores are asked for, {of.cpus} are there")
        for name, wanted, there in (
            ("memory", ask.ram_bytes, of.ram_bytes),
            ("disk", ask.hdd_bytes, of.hdd_bytes),
        ):
            if wanted > there:
                short.append(
                    f"{units.format_bytes(wanted)} of {name} are asked for, {units.format_bytes(there)} are there"
                )
        return "; ".join(short)

    def short(self, ask: Resources, owner: str = "", free: Resources | None = None) -> str:
        """What there is too little of now, in words; empty when `allocate` would grant it. `free`: of a moment ago."""
        short = (self.lacking(ask, free or self.free), self.gpus.lacking(ask, owner))
        return "; ".join(filter(None, short))

    def fits(self, ask: Resources, owner: str = "") -> bool:
        """Whether `allocate` would grant it now."""
        return not self.short(ask, owner)

    def allocate(self, ask: Resources, owner: str = "") -> Allocation:
        """Reserve all of it, or nothing.

        Raises:
            errors.NeverFits: this machine as a whole has less, or has less to give while nothing runs on it.
            errors.NoCapacity: it has, but not now.
        """
        self.check(ask)
        if short := self.short(ask, owner):
            # A disk that others have filled: no run that ends will change that. Memory of cards does come back.
            if not self._held and self.lacking(ask, self.free):
                raise errors.NeverFits(f"more than this machine has to give: {short}")
            raise errors.NoCapacity(f"not enough room now: {short}", lacking=short)
        number = next(self._numbers)
        gpus = self.gpus.take(ask, owner, number)
        allocation = Allocation(number=number, amounts=self.normalise(ask), gpus=gpus, allocator=self)
        self._held[allocation.number] = allocation
        self._changed()
        return allocation

    def check(self, ask: Resources) -> None:
        """Raises `errors.NeverFits` when this machine as a whole has less than `ask`."""
        if short := "; ".join(filter(None, (self.lacking(ask, self.total), self.gpus.never(ask)))):
            raise errors.NeverFits(f"more than this machine has: {short}")

    async def acquire(
        self, ask: Resources, *, owner: str = "", rank: Callable[[], float], timeout_secs: float
    ) -> Allocation:
        """As `allocate`, but wait for room. Among those that fit what has become free, the lowest `rank()` goes first.

        Raises:
            errors.NeverFits, and errors.NoCapacity when there was no room within `timeout_secs`.
        """
        try:
            return self.allocate(ask, owner)
        except errors.NoCapacity as exc:
            refusal = exc
        waiter = _Waiter(ask=ask, owner=owner, rank=rank, granted=asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await asyncio.wait({waiter.granted}, timeout=timeout_secs)
        except asyncio.CancelledError:
            if waiter.granted.done():
                waiter.granted.result().release()
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        if not waiter.granted.done():
            raise refusal
        return waiter.granted.result()

    def release(self, allocation: Allocation) -> None:
        """Give it back; does nothing for what is not out. `Allocation.release` is the usual way here."""
        if self._held.pop(allocation.number, None) is None:
            return
        self.gpus.give_back(allocation.number)
        self.reconsider()

    def reconsider(self) -> None:
        """There may be more to give than before: serve those who wait, and tell the listeners."""
        for waiter in sorted(self._waiters, key=lambda waiter: waiter.rank()):
            if not waiter.granted.done() and self.fits(waiter.ask, waiter.owner):
                waiter.granted.set_result(self.allocate(waiter.ask, waiter.owner))
        self._changed()

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()
