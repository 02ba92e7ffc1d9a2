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

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """A part of the machine, held by one experiment until it is released."""

    number: int
    amounts: Resources
    allocator: Allocator = dataclasses.field(repr=False, compare=False)

    def release(self) -> None:
        """Give it back. Any further call does nothing."""
        self.allocator.release(self)


@dataclasses.dataclass(kw_only=True, eq=False)
class _Waiter:
    ask: Resources
    rank: Callable[[], float]
    granted: asyncio.Future[Allocation]


class Allocator:
    """Cores, memory and disk of one machine. GPUs: none yet, so a request for any never fits."""

    def __init__(self, total: Resources, disk_free: Callable[[], int]) -> None:
        self.total = total
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
        )

    @property
    def held(self) -> int:
        """How many allocations are out."""
        return len(self._held)

    def lacking(self, ask: Resources, of: Resources) -> str:
        """What of `of` there is too little of for `ask`, in words; empty when it fits."""
        ask = self.normalise(ask)
        if ask.gpus:
            return f"{ask.gpus} GPU slots are asked for, there are no GPUs"
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

    def fits(self, ask: Resources) -> bool:
        """Whether `allocate` would grant it now."""
        return not self.lacking(ask, self.free)

    def allocate(self, ask: Resources) -> Allocation:
        """Reserve all of it, or nothing.

        Raises:
            errors.NeverFits: this machine as a whole has less, or has less to give while nothing runs on it.
            errors.NoCapacity: it has, but not now.
        """
        self.check(ask)
        if short := self.lacking(ask, self.free):
            if not self._held:  # a disk that others have filled: no run that ends will change that
                raise errors.NeverFits(f"more than this machine has to give: {short}")
            raise errors.NoCapacity(f"not enough room now: {short}", lacking=short)
        allocation = Allocation(number=next(self._numbers), amounts=self.normalise(ask), allocator=self)
        self._held[allocation.number] = allocation
        self._changed()
        return allocation

    def check(self, ask: Resources) -> None:
        """Raises `errors.NeverFits` when this machine as a whole has less than `ask`."""
        if short := self.lacking(ask, self.total):
            raise errors.NeverFits(f"more than this machine has: {short}")

    async def acquire(self, ask: Resources, *, rank: Callable[[], float], timeout_secs: float) -> Allocation:
        """As `allocate`, but wait for room. Among those that fit what has become free, the lowest `rank()` goes first.

        Raises:
            errors.NeverFits, and errors.NoCapacity when there was no room within `timeout_secs`.
        """
        try:
            return self.allocate(ask)
        except errors.NoCapacity as exc:
            refusal = exc
        waiter = _Waiter(ask=ask, rank=rank, granted=asyncio.get_running_loop().create_future())
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
        for waiter in sorted(self._waiters, key=lambda waiter: waiter.rank()):
            if not waiter.granted.done() and self.fits(waiter.ask):
                waiter.granted.set_result(self.allocate(waiter.ask))
        self._changed()

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()
