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

    def keep_disk(self) -> None:
        """Give back all but the disk: nothing runs in it any more. Any further call does nothing."""
        self.allocator.keep_disk(self)

    def release(self) -> None:
        """Give it back. Any further call does nothing."""
        self.allocator.release(self)


@dataclasses.dataclass(kw_only=True, eq=False)
class _Waiter:
    ask: Resources
    owner: str
    rank: Callable[[], float]
    keeps: bool  #: what has become free is kept for it
    granted: asyncio.Future[Allocation]


class Allocator:
    """Cores, memory, disk and GPUs of one machine. `owner` is the queue that asks: a card serves one at a time."""

    def __init__(self, total: Resources, disk_free: Callable[[], int], gpus: GpuPool | None = None) -> None:
        self.total = total
        self.gpus = GpuPool() if gpus is None else gpus
        #: Why this machine gives nothing away now; empty when it does. Call `reconsider` when that changes.
        self.closed: Callable[[], str] = lambda: ""
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
    def room(self) -> Resources:
        """What a newcomer could be granted now, GPUs apart: `free`, less what is kept for one that has waited for long."""
        return _less(self.free, self._keeper)

    @property
    def _keeper(self) -> _Waiter | None:
        keepers = [waiter for waiter in self._waiters if waiter.keeps]
        return min(keepers, key=lambda waiter: waiter.rank(), default=None)

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

    def short(self, ask: Resources, owner: str = "", room: Resources | None = None) -> str:
        """What there is too little of now, in words; empty when `allocate` would grant it. `room`: of a moment ago."""
        if why := self.closed():
            return why
        short = (self.lacking(ask, room or self.room), self._short_of_gpus(ask, owner, self._keeper))
        return "; ".join(filter(None, short))

    def _short_of_gpus(self, ask: Resources, owner: str, keeper: _Waiter | None) -> str:
        if ask.gpus and keeper is not None and keeper.ask.gpus:
            return "GPUs are kept for a message that has waited for long"
        return self.gpus.lacking(ask, owner)

    def fits(self, ask: Resources, owner: str = "") -> bool:
        """Whether `allocate` would grant it now."""
        return not self.short(ask, owner)

    def allocate(
        self, ask: Resources, owner: str = "", *, instead_of: Allocation | None = None
    ) -> Allocation:
        """Reserve all of it, or nothing. `instead_of` is given up for it, whatever comes of it; first of all to this ask.

        Raises:
            errors.NeverFits: this machine as a whole has less, or has less to give while nothing runs on it.
            errors.NoCapacity: it has, but not now.
        """
        if instead_of is not None and self._held.pop(instead_of.number, None) is not None:
            self.gpus.give_back(instead_of.number)
            try:
                short = (
                    self.closed() or self.lacking(ask, instead_of.amounts) or self.gpus.lacking(ask, owner)
                )
                return self.allocate(ask, owner) if short else self._reserve(ask, owner)
            finally:
                self._grant()
                self._changed()
        self.check(ask)
        # A disk that others have filled: no run that ends will change that. Memory of cards does come back.
        if not self._held and (short := self.lacking(ask, self.free)):
            raise errors.NeverFits(f"more than this machine has to give: {short}")
        if short := self.short(ask, owner):
            kept = self.lacking(ask, self.room) and not self.lacking(ask, self.free)
            why = "room is kept for what has waited for long" if kept else "not enough room now"
            raise errors.NoCapacity(f"{why}: {short}", lacking=short)
        return self._reserve(ask, owner)

    def check(self, ask: Resources) -> None:
        """Raises `errors.NeverFits` when this machine as a whole has less than `ask`."""
        if short := "; ".join(filter(None, (self.lacking(ask, self.total), self.gpus.never(ask)))):
            raise errors.NeverFits(f"more than this machine has: {short}")

    async def acquire(
        self,
        ask: Resources,
        *,
        owner: str = "",
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
            return self.allocate(ask, owner)
        except errors.NoCapacity as exc:
            refusal = exc
        granted: asyncio.Future[Allocation] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(ask=ask, owner=owner, rank=rank, keeps=keeps, granted=granted)
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
        self.gpus.give_back(allocation.number)
        self.reconsider()

    def keep_disk(self, allocation: Allocation) -> None:
        """Give back all of it but the disk; does nothing for what is not out. `Allocation.keep_disk` is the usual way here."""
        if allocation.number not in self._held:
            return
        disk = Resources(cpus=0, ram_bytes=0, hdd_bytes=allocation.amounts.hdd_bytes)
        self._held[allocation.number] = dataclasses.replace(allocation, amounts=disk, gpus=())
        self.gpus.give_back(allocation.number)
        self.reconsider()

    def found_memory(self, ram_bytes: int) -> None:
        """So much is available, beside what is in use. More than was known of is given away from now on; less changes nothing."""
        if ram_bytes > self.total.ram_bytes:
            self.total = dataclasses.replace(self.total, ram_bytes=ram_bytes)
            self.reconsider()

    def reconsider(self) -> None:
        """There may be more to give than before: serve those who wait, and tell the listeners."""
        self._grant()
        self._changed()

    def _grant(self) -> None:
        """Something has become free: whom it fits gets it."""
        if self.closed():
            return
        keeper: _Waiter | None = None
        for waiter in sorted(self._waiters, key=lambda waiter: (not waiter.keeps, waiter.rank())):
            if waiter.granted.done():
                continue
            short = self.lacking(waiter.ask, _less(self.free, keeper))
            if not short and not self._short_of_gpus(waiter.ask, waiter.owner, keeper):
                self._waiters.remove(waiter)
                waiter.granted.set_result(self._reserve(waiter.ask, waiter.owner))
            elif waiter.keeps and keeper is None:
                keeper = waiter

    def _reserve(self, ask: Resources, owner: str) -> Allocation:
        number = next(self._numbers)
        gpus = self.gpus.take(ask, owner, number)
        allocation = Allocation(number=number, amounts=self.normalise(ask), gpus=gpus, allocator=self)
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
