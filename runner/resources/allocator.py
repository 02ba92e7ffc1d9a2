"""Reserving parts of the machine: all or nothing, never twice, released once however often it is asked (DESIGN.md rule 8).

Not thread-safe: it lives in the daemon's loop, and nothing in it waits but `acquire`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

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
    keeps: bool  #: what has become free is kept for it
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
    def room(self) -> Resources:
        """What a newcomer could be granted now: `free`, less what is kept for one that has waited for long."""
        keepers = [waiter for waiter in self._waiters if waiter.keeps]
        first = min(keepers, key=lambda waiter: waiter.rank(), default=None)
        return _less(self.free, first)

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

    def allocate(self, ask: Resources, *, instead_of: Allocation | None = None) -> Allocation:
        """Reserve all of it, or nothing. `instead_of` is given up for it, whatever comes of it; first of all to this ask.

        Raises:
            errors.NeverFits: this machine as a whole has less, or has less to give while nothing runs on it.
            errors.NoCapacity: it has, but not now.
        """
        if instead_of is not None and self._held.pop(instead_of.number, None) is not None:
            try:
                fits = not self.lacking(ask, instead_of.amounts)
                return self._reserve(ask) if fits else self.allocate(ask)
            finally:
                self._grant()
                self._changed()
        self.check(ask)
        if short := self.lacking(ask, self.free):
            if not self._held:  # a disk that others have filled: no run that ends will change that
                raise errors.NeverFits(f"more than this machine has to give: {short}")
            raise errors.NoCapacity(f"not enough room now: {short}", lacking=short)
        if short := self.lacking(ask, self.room):
            raise errors.NoCapacity(f"room is kept for what has waited for long: {short}", lacking=short)
        return self._reserve(ask)

    def check(self, ask: Resources) -> None:
        """Raises `errors.NeverFits` when this machine as a whole has less than `ask`."""
        if short := self.lacking(ask, self.total):
            raise errors.NeverFits(f"more than this machine has: {short}")

    async def acquire(
        self,
        ask: Resources,
        *,
        rank: Callable[[], float],
        timeout_secs: float,
        keeps: bool = False,
        unless: asyncio.Future[Any] | None = None,
    ) -> Allocation:
        """As `allocate`, but wait for room. Among those that fit what has become free, the lowest `rank()` goes first.

        `keeps`: while it waits, what becomes free is kept for it, and only what it does not need is granted to others.
        The wait ends without result when `unless` is done.

        Raises:
            errors.NeverFits, and errors.NoCapacity when there was no room within `timeout_secs`.
        """
        try:
            return self.allocate(ask)
        except errors.NoCapacity as exc:
            refusal = exc
        granted: asyncio.Future[Allocation] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(ask=ask, rank=rank, keeps=keeps, granted=granted)
        self._waiters.append(waiter)
        if keeps:
            self._changed()
        ends: set[asyncio.Future[Any]] = {granted} if unless is None else {granted, unless}
        try:
            await asyncio.wait(ends, timeout=timeout_secs, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if granted.done():
                granted.result().release()
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                if keeps:
                    self._grant()
                    self._changed()
        if not granted.done():
            raise refusal
        return granted.result()

    def release(self, allocation: Allocation) -> None:
        """Give it back; does nothing for what is not out. `Allocation.release` is the usual way here."""
        if self._held.pop(allocation.number, None) is None:
            return
        self._grant()
        self._changed()

    def _grant(self) -> None:
        """Something has become free: whom it fits gets it."""
        keeper: _Waiter | None = None
        for waiter in sorted(self._waiters, key=lambda waiter: (not waiter.keeps, waiter.rank())):
            if waiter.granted.done():
                continue
            if not self.lacking(waiter.ask, _less(self.free, keeper)):
                self._waiters.remove(waiter)
                waiter.granted.set_result(self._reserve(waiter.ask))
            elif waiter.keeps and keeper is None:
                keeper = waiter

    def _reserve(self, ask: Resources) -> Allocation:
        allocation = Allocation(number=next(self._numbers), amounts=self.normalise(ask), allocator=self)
        self._held[allocation.number] = allocation
        self._changed()
        return allocation

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()


def _less(free: Resources, keeper: _Waiter | None) -> Resources:
    """What is left of it for others than the keeper."""
    if keeper is None:
        return free
    kept = Allocator.normalise(keeper.ask)
    return dataclasses.replace(
        free,
        cpus=max(0, free.cpus - kept.cpus),
        ram_bytes=max(0, free.ram_bytes - kept.ram_bytes),
        hdd_bytes=max(0, free.hdd_bytes - kept.hdd_bytes),
    )
