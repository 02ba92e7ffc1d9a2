"""Looks at the cards now and then, in threads, and tells the pool; fenced cards are made known to those who use them.

The driver's calls block, and with a broken card may never return: at most one is out at a time, in a thread that nobody has to
wait for, and while it is overdue nothing of the cards is given away.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from typing import TYPE_CHECKING, TypeVar

import structlog

from runner import units
from runner.resources import probe, visibility
from runner.resources.gpus import Look

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from runner.request.model import Resources
    from runner.resources.cards import Card, Table
    from runner.resources.gpupool import GpuPool
    from runner.resources.gpus import Nvml, Sight, Usage

log = structlog.get_logger(__name__)

_Answer = TypeVar("_Answer")

#: Between two looks, when nothing asks for one.
LOOK_SECS = 30.0
#: ... and when the last one told of something that is on its way: memory that a run gives back, a card that was missed.
SOON_SECS = 2.0
#: What was seen so lately need not be looked at again.
FRESH_SECS = 1.0
#: A look that takes longer is not waited for.
LIMIT_SECS = 20.0


class GpuWatch:
    """The eyes of a `GpuPool`. Made in the loop that it works in; without `nvml` (--cpu-only) it never looks."""

    def __init__(self, pool: GpuPool, nvml: Nvml | None, table: Table, environ: Mapping[str, str]) -> None:
        """`environ`: the runner's own, which says what cards it may use."""
        self.pool = pool
        #: Called when a look has shown something new.
        self.changed: Callable[[], None] = lambda: None
        #: Called after each look that finds cards which may not be used: their UUIDs, and why.
        self.on_fenced: Callable[[Mapping[str, str]], None] = lambda _: None
        self._nvml = nvml
        self._table = table
        self._environ = environ
        self._looking = asyncio.Lock()
        self._out = False  # a call is out, in a thread
        self._looked_at = -LOOK_SECS
        self._wanted = asyncio.Event()
        self._hidden: dict[str, bool] = {}  # each card that was ever seen: whether it is not ours
        self._estimated: set[str] = set()  # models that it has warned of
        self._fenced: dict[str, str] = {}

    async def run(self) -> None:
        """For ever: look, soon after a run with a card has ended, else every `LOOK_SECS`."""
        if self._nvml is None:
            return
        woken = False
        while True:
            # What has ended gives its memory back, but the driver takes a moment: look once more.
            wait = SOON_SECS if woken or self.pool.uneasy else LOOK_SECS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wanted.wait()
            woken = self._wanted.is_set()
            self._wanted.clear()
            await self.look()

    def wake(self) -> None:
        """Something was given back: what is free is to be measured anew."""
        if self.pool.uneasy:
            self._wanted.set()

    async def refresh(self, ask: Resources) -> None:
        """Before an ask is looked at: know what is free now. At most `LIMIT_SECS`; never raises."""
        if ask.gpus:
            await self.look(fresh_secs=FRESH_SECS)

    async def failed(self, uuids: Sequence[str]) -> str:
        """Why one of these cards may not be used any more, by a look of now; empty when all are well.

        A workload mostly fails long before the next look tells that its card did.
        """
        if not uuids or self._nvml is None:
            return ""
        for _ in range(2):  # a card is believed to be away when it was missed twice
            await self.look()
            if why := self.pool.fenced(uuids):
                return why
        return ""

    async def usage(self, uuids: Sequence[str], pids: Sequence[int]) -> dict[str, Usage]:
        """As `Nvml.usage`. Nothing while the driver does not answer; returns within `LIMIT_SECS` of its turn, as `look`."""
        if self._nvml is None or not uuids:
            return {}
        async with self._looking:
            if self.pool.silent:
                return {}
            return await self._in_thread(functools.partial(self._nvml.usage, uuids, pids)) or {}

    async def look(self, *, fresh_secs: float = 0.0) -> None:
        """Look now, and tell the pool and whom it concerns. Never raises; returns within `LIMIT_SECS` of its turn.

        `fresh_secs`: not when that was done so lately.
        """
        if self._nvml is None:
            return
        async with self._looking:
            if time.monotonic() - self._looked_at < fresh_secs:
                return
            watermarks = self.pool.watermarks()
            look = await self._in_thread(self._nvml.look) or Look(
                why=f"the NVIDIA driver has not answered for {LIMIT_SECS:.0f} s"
            )
            self._looked_at = time.monotonic()
            mine = self._visible(look)
            if why := look.why or self._none(look, mine):
                if self.pool.silence(why):
                    self._say_silent(why)
                return
            before = None if self.pool.silent else self.pool.cards()
            self._tell(mine, look, watermarks)
        if self.pool.cards() != before:
            self.changed()

    def _visible(self, look: Look) -> list[Sight]:
        """What of it this runner may use. New cards are told of."""
        everything = [sight.card for sight in look.sights]
        mine = visibility.visible(everything, self._environ, contained=not probe.sees_all_processes())
        for card in everything:
            # Decided once: when a card is lost, the driver counts those behind it anew.
            if card.uuid not in self._hidden:
                self._hidden[card.uuid] = card not in mine
                self._introduce(card)
        return [sight for sight in look.sights if not self._hidden[sight.card.uuid]]

    def _none(self, look: Look, mine: Sequence[Sight]) -> str:
        """Why there is no card, when there never was one."""
        if mine or len(self.pool):
            return ""
        if look.sights:
            return f"{' and '.join(self._variables)} of the daemon hides all there are"
        return "the NVIDIA driver knows of none that works"

    @property
    def _variables(self) -> list[str]:
        return [name for name in visibility.VARIABLES if name in self._environ]

    async def _in_thread(self, ask: Callable[[], _Answer]) -> _Answer | None:
        """What the driver answers; None when it does not in time, or still owes the answer to an earlier call."""
        if self._out:
            return None
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_Answer] = loop.create_future()

        def settle(told: _Answer) -> None:
            if not answer.done():
                answer.set_result(told)

        def work() -> None:
            told = ask()
            self._out = False
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, told)

        # Not one of the loop's threads: those are waited for at exit.
        self._out = True
        threading.Thread(target=work, name="nvml", daemon=True).start()
        await asyncio.wait({answer}, timeout=LIMIT_SECS)
        return answer.result() if answer.done() else None

    def _tell(self, mine: Sequence[Sight], look: Look, watermarks: Mapping[str, int]) -> None:
        fenced = self.pool.seen(mine, look.lost, watermarks, self._looked_at)
        states = {state.card.uuid: state for state in self.pool.cards()}
        for uuid, why in fenced.items():
            name = states[uuid].card.name
            log.warning("a GPU has failed and is not used any more", gpu=uuid, name=name, why=why)
        for uuid in list(self._fenced):
            if uuid not in states or not states[uuid].fenced:
                del self._fenced[uuid]
                if uuid in states:
                    log.info("a GPU that had failed is used again", gpu=uuid, name=states[uuid].card.name)
        self._fenced |= fenced
        if self._fenced:  # again and again: a run may have been on its way to a card when that was fenced
            self.on_fenced(self._fenced)

    def _introduce(self, card: Card) -> None:
        slots = self._table.slots(card)
        told = {"gpu": card.uuid, "name": card.name, "memory": units.format_bytes(card.memory_bytes)}
        if self._hidden[card.uuid]:
            log.info("a GPU is hidden from this runner", **told, by=self._variables)
        elif slots.estimated and card.name not in self._estimated:
            self._estimated.add(card.name)
            log.warning(
                "no table has this GPU: its slots are estimated from its memory; --gpu-cards can name them",
                **told,
                slots=slots.count,
            )
        else:
            log.info("a GPU to give away", **told, index=card.index, slots=slots.count)

    def _say_silent(self, why: str) -> None:
        if len(self.pool):
            log.warning("the GPUs cannot be seen: none is given away until they can, runs go on", why=why)
        else:
            log.warning(
                "no GPU is used: experiments that ask for one are left to other hosts; --cpu-only says it is meant so",
                why=why,
            )
