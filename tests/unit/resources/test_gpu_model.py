"""A machine with GPUs whose runs, strangers and faults do what they like: nothing is promised twice, nothing leaks, and what
fits by the rules is granted.

`GPU_MODEL_STEPS=100000 pytest tests/unit/resources/test_gpu_model.py` goes that many steps instead of the few of every day.
"""

from __future__ import annotations

import dataclasses
import itertools
import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runner import errors
from runner.request.model import Resources
from runner.resources.allocator import Allocation, Allocator
from runner.resources.cards import Card, Slots
from runner.resources.gpupool import QUIET_SECS, GpuPool
from runner.resources.gpus import Sight

STEPS = int(os.environ.get("GPU_MODEL_STEPS", "3000"))
STEPS_EACH = 50
GIB = 1 << 30
#: uuid -> slots, GiB; the last two are instances of one card
CARDS = {"a": (2, 11), "b": (4, 15), "c": (24, 40), "d": (24, 40), "m0": (2, 5), "m1": (2, 5)}
MACHINE = Resources(cpus=1000, ram_bytes=GIB, hdd_bytes=GIB)


@dataclasses.dataclass(eq=False)
class Run:
    allocation: Allocation
    owner: str
    promised: int
    used: dict[str, int]

    @property
    def home(self) -> str:
        return f"/runs/{self.allocation.number}"


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cards = {
            uuid: Card(
                uuid=uuid,
                name=uuid,
                index=str(number),
                memory_bytes=gib * GIB,
                whole="w" if uuid.startswith("m") else "",
            )
            for number, (uuid, (_, gib)) in enumerate(CARDS.items())
        }
        self.pool = GpuPool(lambda card: Slots(count=CARDS[card.uuid][0]))
        self.machine = Allocator(MACHINE, lambda: GIB, self.pool)
        self.runs: list[Run] = []
        self.strangers = dict.fromkeys(CARDS, 0)
        self.seen = dict.fromkeys(CARDS, 0)  # ... when the card was looked at last
        self.ecc = dict.fromkeys(CARDS, 0)
        self.away: set[str] = set()
        self.bad_at = dict.fromkeys(CARDS, -1e9)  # when a look saw something wrong with it
        self.now = 0.0
        self.look()

    # -- what is true

    def used(self, uuid: str) -> int:
        total = self.cards[uuid].memory_bytes
        ours = sum(run.used.get(uuid, 0) for run in self.runs)
        return min(total, self.strangers[uuid] + ours)

    def free_slots(self, uuid: str) -> int:
        slots, gib = CARDS[uuid]
        # The nearest whole number to what strangers have left: one at a time is taken away while more than half of it is theirs.
        left = next(
            left
            for left in range(slots + 1)
            if 2 * slots * (gib * GIB - self.seen[uuid]) < (2 * left + 1) * gib * GIB
        )
        return max(0, left - self.granted(uuid))

    def granted(self, uuid: str) -> int:
        return sum(grant.slots for run in self.runs for grant in run.allocation.gpus if grant.uuid == uuid)

    def room(self, uuid: str) -> int:
        """Memory that nobody uses and nobody was promised."""
        owed = sum(
            max(0, run.promised - run.used.get(uuid, 0))
            for run in self.runs
            if any(grant.uuid == uuid for grant in run.allocation.gpus)
        )
        return max(0, self.cards[uuid].memory_bytes - self.used(uuid) - owed)

    def owners(self, uuid: str) -> set[str]:
        return {run.owner for run in self.runs for grant in run.allocation.gpus if grant.uuid == uuid}

    def fits(self, ask: Resources, owner: str) -> bool:
        """By the rules, tried out."""
        least = -(-ask.gpus // ask.gpu_count) if ask.gpu_count else 1
        usable = [
            uuid
            for uuid in CARDS
            if self.bad_at[uuid] < 0
            and self.owners(uuid) <= {owner}
            and self.free_slots(uuid) >= least
            and self.room(uuid) >= ask.gpu_mem_bytes
        ]
        sizes = [ask.gpu_count] if ask.gpu_count else range(1, len(CARDS) + 1)
        return any(
            sum(map(self.free_slots, chosen)) >= ask.gpus
            and (size == 1 or not any(self.cards[uuid].is_mig for uuid in chosen))
            for size in sizes
            for chosen in itertools.combinations(usable, size)
        )

    # -- what happens

    @rule()
    def look(self) -> None:
        marks = self.pool.watermarks()
        sights = [
            Sight(
                card=card,
                used_bytes=self.used(uuid),
                ecc_errors=self.ecc[uuid],
                by_home={run.home: run.used[uuid] for run in self.runs if uuid in run.used},
            )
            for uuid, card in self.cards.items()
            if uuid not in self.away
        ]
        self.pool.seen(sights, frozenset(self.away), marks, self.now)
        self.seen |= {uuid: self.strangers[uuid] for uuid in CARDS if uuid not in self.away}
        for uuid in CARDS:
            if self.ecc[uuid] or uuid in self.away:
                self.bad_at[uuid] = self.now
            elif self.now - self.bad_at[uuid] >= QUIET_SECS:
                self.bad_at[uuid] = -1e9

    @rule(
        owner=st.sampled_from("xyz"),
        slots=st.integers(1, 60),
        small=st.booleans(),
        count=st.sampled_from([0, 0, 0, 1, 2, 3]),
        gib=st.sampled_from([0, 0, 1, 2, 3, 4, 6, 8, 10, 16, 30, 41]),
    )
    def ask(self, owner: str, slots: int, small: bool, count: int, gib: int) -> None:
        self.look()  # as the dispatcher does
        slots = 1 + slots % 5 if small else slots
        ask = Resources(gpus=slots, gpu_count=count, gpu_mem_bytes=gib * GIB)
        fits = self.fits(ask, owner)
        rooms = {uuid: self.room(uuid) for uuid in CARDS}
        try:
            allocation = self.machine.allocate(ask, owner)
        except (errors.NoCapacity, errors.NeverFits):
            assert not fits
            return
        assert fits
        granted = [grant.uuid for grant in allocation.gpus]
        assert len(set(granted)) == len(granted) == (count or len(granted))
        assert sum(grant.slots for grant in allocation.gpus) == max(slots, count)
        assert all(grant.slots > 0 for grant in allocation.gpus)
        assert all(rooms[uuid] >= gib * GIB for uuid in granted)
        run = Run(allocation, owner, gib * GIB, dict.fromkeys(granted, 0))
        allocation.name(run.home)
        self.runs.append(run)

    @rule(index=st.integers(0, 100), again=st.booleans())
    def release(self, index: int, again: bool) -> None:
        if self.runs:
            run = self.runs.pop(index % len(self.runs))
            run.allocation.release()
            if again:
                run.allocation.release()

    @rule(index=st.integers(0, 100), gib=st.sampled_from([0, 1, 2, 3, 4, 6, 8, 10, 30]))
    def use(self, index: int, gib: int) -> None:
        if self.runs:
            run = self.runs[index % len(self.runs)]
            for uuid in run.used:
                run.used[uuid] = 0
                run.used[uuid] = min(gib * GIB, self.cards[uuid].memory_bytes - self.used(uuid))

    @rule(uuid=st.sampled_from(list(CARDS)), gib=st.integers(0, 40))
    def stranger(self, uuid: str, gib: int) -> None:
        self.strangers[uuid] = 0
        self.strangers[uuid] = min(gib * GIB, self.cards[uuid].memory_bytes - self.used(uuid))

    @rule(uuid=st.sampled_from(list(CARDS)), how=st.sampled_from(["ecc", "away", "", "", "", "", ""]))
    def breaks(self, uuid: str, how: str) -> None:
        if how == "ecc":
            self.ecc[uuid] += 1
        elif how == "away":
            self.away.add(uuid)

    @rule()
    def is_repaired(self) -> None:
        self.ecc = dict.fromkeys(CARDS, 0)
        self.away.clear()

    @rule(secs=st.sampled_from([1.0, 30.0, 150.0, 300.0]))
    def time_passes(self, secs: float) -> None:
        self.now += secs

    # -- what always holds

    @invariant()
    def nothing_is_promised_twice_and_nothing_leaks(self) -> None:
        told = {state.card.uuid: state for state in self.pool.cards()}
        for uuid, (slots, _) in CARDS.items():
            assert 0 <= self.granted(uuid) <= slots
            assert len(self.owners(uuid)) <= 1
            if uuid in told and not told[uuid].fenced:
                assert told[uuid].free_slots == self.free_slots(uuid)
        assert self.machine.held == len(self.runs)

    def teardown(self) -> None:
        for run in self.runs:
            run.allocation.release()
        for held in self.pool._cards.values():
            assert not held.holds


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=max(1, STEPS // STEPS_EACH), stateful_step_count=STEPS_EACH, deadline=None
)
