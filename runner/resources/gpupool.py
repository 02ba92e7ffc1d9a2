"""The cards, who holds how much of which, and which of them may not be used: the GPU part of the allocator.

Not thread-safe, and nothing in it waits: it lives in the daemon's loop, and is told by `gpuwatch` what the driver sees.

What of a card's memory is free (DESIGN.md 5.2, rule 8): what is measured to be free, less what runs were promised and do not use
yet. A run that was promised 8 GiB and uses 5 takes 5 by the measurement and 3 by the promise: never 13, never 5.

What of its slots is free: the share of them that strangers have left of the memory, to the nearest whole slot, less those that were
granted. To the nearest, as an idle card has some memory in use too, by the driver itself and by a display or a persistence server:
some hundred MB, less than half a slot of any card in the table. Rounded down, they would cost every card a slot, and one of a
single slot altogether; up to half a slot's memory is overcommitted instead. Our own runs have paid with their slots already: what
they use never counts here.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from runner import units
from runner.resources import packing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from runner.request.model import Resources
    from runner.resources.cards import Card, Slots
    from runner.resources.gpus import Sight

#: A fenced card is used again when nothing was wrong with it for this long.
QUIET_SECS = 300.0
#: A card that is away and that nobody holds is forgotten after this long: MIG instances come and go.
FORGET_SECS = 3600.0
#: So many looks in a row must miss a card of which the driver does not say that it is lost.
MISSES = 2
#: More cards are not listed in a sentence.
_LISTED = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grant:
    """A part of a card that a run has."""

    uuid: str
    name: str
    memory_bytes: int  #: of the card
    slots: int  #: that are the run's


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardState:
    """A card as metrics and pages show it."""

    card: Card
    slots: int
    free_slots: int
    used_bytes: int  #: of its memory, by whomever
    fenced: str  #: why it may not be used


@dataclasses.dataclass(kw_only=True)
class _Hold:
    slots: int
    promised_bytes: int
    home: str = ""  #: the run's `STUDIOML_HOME`, by which its processes are known


@dataclasses.dataclass(kw_only=True, eq=False)
class _Held:
    """A card and its holders."""

    card: Card
    slots: int
    sight: Sight
    holds: dict[int, _Hold] = dataclasses.field(default_factory=dict)  # by the allocation's number
    owner: str = ""  #: the queue that it serves, while anybody holds it
    fenced: str = ""  #: why it may not be used
    bad_at: float = 0.0  #: when something was wrong with it last
    away_since: float | None = None
    misses: int = 0
    others_bytes: int = 0  #: what was used when nobody of ours had it
    least_bytes: int = 0  #: the least that was used since then: more than that is not known to be strangers'
    ended: set[str] = dataclasses.field(
        default_factory=set
    )  #: homes of runs that had ended when it was seen, or after
    changes: int = 0  #: of its holders

    @property
    def free_slots(self) -> int:
        return max(0, self.fair_slots - sum(hold.slots for hold in self.holds.values()))

    @property
    def fair_slots(self) -> int:
        """How many slots it has beside what strangers use of it."""
        total = self.card.memory_bytes
        left = max(0, total - self.strangers_bytes)
        return (2 * self.slots * left + total) // (2 * total) if total else self.slots

    @property
    def strangers_bytes(self) -> int:
        """Memory in use that is known not to be that of our runs. A card that does not tell of its memory is believed to have none."""
        if not self.sight.card.memory_bytes:
            return 0
        homes = self.sight.by_home
        if homes is None:
            return self.least_bytes
        ours = {hold.home for hold in self.holds.values()} | self.ended | {""}
        return max(0, self.sight.used_bytes - sum(homes.get(home, 0) for home in ours))

    @property
    def free_bytes(self) -> int:
        return max(0, self.card.memory_bytes - self.sight.used_bytes - self._unused())

    def _unused(self) -> int:
        """What was promised and is not used yet."""
        homes = self.sight.by_home
        holds = self.holds.values()
        if homes is not None:
            return sum(
                max(0, hold.promised_bytes - (homes.get(hold.home, 0) if hold.home else 0)) for hold in holds
            )
        # The driver does not say whose memory it is. Runs with a promise are believed to use no more than that; whoever has
        # none may use all that is used.
        promised = sum(hold.promised_bytes for hold in holds)
        if not all(hold.promised_bytes for hold in holds):
            return promised
        return max(0, promised - max(0, self.sight.used_bytes - self.others_bytes))

    def sees(self, sight: Sight, since: int) -> None:
        """It looks like that; `since`: how many changes of its holders there had been when the look began."""
        self.sight = sight
        self.least_bytes = min(self.least_bytes, sight.used_bytes)
        if self.changes == since:  # what has ended before has given back what it had
            self.ended.clear()
            if not self.holds:
                self.others_bytes = self.least_bytes = sight.used_bytes

    def usable(self, owner: str) -> bool:
        return not self.fenced and not self.misses and (not self.holds or self.owner == owner)


class GpuPool:
    """The cards of one machine."""

    def __init__(self, slots: Callable[[Card], Slots] | None = None) -> None:
        """`slots`: how many a card has. Without it there are no cards, and none will come."""
        self._slots = slots
        self._cards: dict[str, _Held] = {}
        self._released = False
        #: Why nothing can be said of cards now, when that is so: for people.
        self.silent = (
            "they were not looked for yet" if slots is not None else "it is told to use none (--cpu-only)"
        )

    def __len__(self) -> int:
        return len(self._cards)

    # -- what the driver sees

    def watermarks(self) -> dict[str, int]:
        """To be taken before a look, and given to `seen` with it: who held what when it began."""
        self._released = False
        return {uuid: held.changes for uuid, held in self._cards.items()}

    @property
    def uneasy(self) -> bool:
        """Whether another look would tell more: a run has ended since the last one began, or a card was missed."""
        return self._released or any(held.misses and not held.fenced for held in self._cards.values())

    def seen(
        self, sights: Sequence[Sight], lost: frozenset[str], watermarks: Mapping[str, int], now: float
    ) -> dict[str, str]:
        """What a look at the whole machine has shown, at that `time.monotonic`. Which cards are fenced from now on, and why."""
        self.silent = ""
        there = {sight.card.uuid: self._measured(sight) for sight in sights}
        fenced = {}
        for uuid, held in list(self._cards.items()):
            seen = there.get(uuid)
            is_lost = bool(lost & {uuid, held.card.whole})
            why = self._wrong(held, seen, is_lost=is_lost)
            if why and not held.fenced:
                fenced[uuid] = why
            if why:
                held.fenced, held.bad_at = why, now
            if seen is None:
                held.away_since = now if held.away_since is None else held.away_since
            else:
                held.away_since = None
                held.sees(seen, since=watermarks.get(uuid, 0))
            if held.fenced and seen is not None and not why and now - held.bad_at >= QUIET_SECS:
                held.fenced = ""
        self._forget()
        return fenced

    def silence(self, why: str) -> bool:
        """A look has failed: nothing is given away until one goes well; runs go on. Whether that is news."""
        news, self.silent = self.silent != why, why
        return news

    def _measured(self, sight: Sight) -> Sight:
        """The same, its card known. Where the driver does not tell of the memory, none of it is free until it does."""
        held = self._cards.get(sight.card.uuid)
        if held is None or (sight.card.memory_bytes and not held.card.memory_bytes and not held.holds):
            slots = 1 if self._slots is None else self._slots(sight.card).count
            self._cards[sight.card.uuid] = _Held(
                card=sight.card,
                slots=slots,
                sight=sight,
                others_bytes=sight.used_bytes,
                least_bytes=sight.used_bytes,
            )
        elif not sight.card.memory_bytes:
            return dataclasses.replace(sight, used_bytes=held.card.memory_bytes)
        return sight

    def _wrong(self, held: _Held, seen: Sight | None, *, is_lost: bool) -> str:
        if seen is None:
            held.misses += 1
            if is_lost:
                return "the driver has lost it"
            return "it has disappeared" if held.misses >= MISSES or held.fenced else ""
        held.misses = 0
        if seen.ecc_errors:
            return f"it has uncorrected memory errors ({seen.ecc_errors})"
        return ""

    def _forget(self) -> None:
        for uuid, held in list(self._cards.items()):
            away = held.away_since is not None and held.bad_at - held.away_since >= FORGET_SECS
            if away and not held.holds:
                del self._cards[uuid]

    # -- what runs get

    def never(self, ask: Resources) -> str:
        """Why not even the idle machine could give that, in words; empty when it could. Fenced cards are not counted."""
        if not ask.gpus:
            return ""
        usable = [held for held in self._cards.values() if not held.fenced]
        whole = [
            _candidate(held, free_slots=held.slots, free_bytes=held.card.memory_bytes) for held in usable
        ]
        if packing.fits(_wish(ask), whole):
            return ""
        fenced = [held for held in self._cards.values() if held.fenced]
        has = _listed(f"{_named(held.card)} ({_of(held.slots, held.card.memory_bytes)})" for held in usable)
        has = has or (f"no GPU: {self.silent}" if self.silent else "no GPU")
        away = _listed(f"{_named(held.card)}: {held.fenced}" for held in fenced)
        return f"{_asked(ask)}; this machine has {has}{f'; fenced: {away}' if away else ''}"

    def lacking(self, ask: Resources, owner: str) -> str:
        """Why that cannot be given to a run of that queue now, in words; empty when it can."""
        if not ask.gpus:
            return ""
        if self.silent:
            return f"{_asked(ask)}; {self.silent}"
        if packing.fits(_wish(ask), self._candidates(owner)):
            return ""
        return f"{_asked(ask)}; free are: {self._told(owner)}"

    def take(self, ask: Resources, owner: str, number: int) -> tuple[Grant, ...]:
        """Give it to that allocation; nothing to one that asks for none. `lacking` has said that it can be given."""
        if not ask.gpus:
            return ()
        grants = []
        for share in packing.choose(_wish(ask), self._candidates(owner)):
            held = self._cards[share.uuid]
            held.owner = owner
            held.changes += 1
            held.holds[number] = _Hold(slots=share.slots, promised_bytes=ask.gpu_mem_bytes)
            card = held.card
            grants.append(
                Grant(uuid=card.uuid, name=card.name, memory_bytes=card.memory_bytes, slots=share.slots)
            )
        return tuple(grants)

    def name(self, number: int, home: str) -> None:
        """The run of that allocation has this `STUDIOML_HOME`."""
        for held in self._cards.values():
            if (hold := held.holds.get(number)) is not None:
                hold.home = home

    def give_back(self, number: int) -> None:
        """All that this allocation has. Does nothing for one that has nothing."""
        for held in self._cards.values():
            if (hold := held.holds.pop(number, None)) is not None:
                held.ended.add(hold.home)
                held.changes += 1
                self._released = True

    # -- what others may know

    @property
    def free_slots(self) -> int:
        """Slots to be had, of cards that are not fenced; of one that serves a queue they are for that queue only."""
        return sum(held.free_slots for held in self._cards.values() if not held.fenced)

    def cards(self) -> list[CardState]:
        """Each card as it is now."""
        return [
            CardState(
                card=held.card,
                slots=held.slots,
                free_slots=0 if held.fenced else held.free_slots,
                used_bytes=held.sight.used_bytes,
                fenced=held.fenced,
            )
            for held in self._cards.values()
        ]

    def fenced(self, uuids: Sequence[str]) -> str:
        """Why the first fenced one of these is fenced; empty when none is."""
        for uuid in uuids:
            held = self._cards.get(uuid)
            if held is not None and held.fenced:
                return f"its GPU {held.card.name} ({uuid}) failed: {held.fenced}"
        return ""

    def _candidates(self, owner: str) -> Iterator[packing.Candidate]:
        for held in self._cards.values():
            if held.usable(owner):
                yield _candidate(held, free_slots=held.free_slots, free_bytes=held.free_bytes)

    def _told(self, owner: str) -> str:
        def state(held: _Held) -> str:
            if held.fenced or held.misses:
                return held.fenced or "it does not answer"
            if not held.usable(owner):
                return "serves another queue"
            others = f"; others use {units.format_bytes(held.strangers_bytes)}"
            told = f"{held.free_slots} of {_of(held.slots, held.free_bytes)}"
            return told + (others if held.fair_slots < held.slots else "")

        return _listed(f"{_named(held.card)} ({state(held)})" for held in self._cards.values())


def _candidate(held: _Held, *, free_slots: int, free_bytes: int) -> packing.Candidate:
    return packing.Candidate(
        uuid=held.card.uuid,
        slots=held.slots,
        free_slots=free_slots,
        free_bytes=free_bytes,
        shared=bool(held.holds),
        alone=held.card.is_mig,
    )


def _wish(ask: Resources) -> packing.Ask:
    return packing.Ask(slots=ask.gpus, count=ask.gpu_count, mem_bytes=ask.gpu_mem_bytes)


def _asked(ask: Resources) -> str:
    slots = f"{ask.gpus} GPU slot{'s' if ask.gpus > 1 else ''}"
    cards = f" on {ask.gpu_count} card{'s' if ask.gpu_count > 1 else ''}" if ask.gpu_count else ""
    memory = f" with {units.format_bytes(ask.gpu_mem_bytes)} each" if ask.gpu_mem_bytes else ""
    return f"{slots}{cards}{memory} {'are' if ask.gpus > 1 else 'is'} asked for"


def _of(slots: int, memory_bytes: int) -> str:
    return f"{slots} slot{'s' if slots > 1 else ''}, {units.format_bytes(memory_bytes)}"


def _named(card: Card) -> str:
    return f"{card.name} {card.index}"


def _listed(told: Iterator[str]) -> str:
    texts = list(told)
    more = len(texts) - _LISTED
    return ", ".join(texts[:_LISTED]) + (f" and {more} more" if more > 0 else "")
