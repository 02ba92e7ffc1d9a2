"""Which cards a run gets: the fewest, then the smallest, whose free slots suffice (INTEROP.md 8.2, DESIGN.md 5.2). Pure."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """What a run wants."""

    slots: int  #: in all, from 1
    count: int = 0  #: exactly so many cards; 0: as many as it takes
    mem_bytes: int = 0  #: on each card


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A card as packing sees it: nothing but what the asker may have of it."""

    uuid: str
    slots: int  #: its size
    free_slots: int
    free_bytes: int
    shared: bool = False  #: it serves the asker's queue already
    alone: bool = False  #: it cannot be one of several (a MIG instance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """So many slots of a card."""

    uuid: str
    slots: int


def fits(ask: Ask, candidates: Iterable[Candidate]) -> bool:
    """Whether `choose` would find something; cheaper."""
    usable = _usable(ask, candidates)
    return bool(usable) and _fewest(ask, usable) > 0


def choose(ask: Ask, candidates: Iterable[Candidate]) -> tuple[Share, ...]:
    """The cards, and how many slots of each; none when it does not fit.

    Of several sets with the fewest cards, the one with the smallest cards; of equals, cards that serve the queue already go
    first, then those with the least left. The slots are spread evenly over the cards of a set.
    """
    usable = sorted(_usable(ask, candidates), key=_cost)
    number = _fewest(ask, usable)
    if not number:
        return ()
    if number == 1:
        return (
            Share(uuid=next(each.uuid for each in usable if each.free_slots >= ask.slots), slots=ask.slots),
        )
    several = [each for each in usable if not each.alone]
    chosen = several[:number] if ask.count else _smallest_set(ask.slots, number, several)
    return _spread(max(ask.slots, number), chosen)


def _usable(ask: Ask, candidates: Iterable[Candidate]) -> list[Candidate]:
    least = -(-ask.slots // ask.count) if ask.count else 1
    return [each for each in candidates if each.free_slots >= least and each.free_bytes >= ask.mem_bytes]


def _fewest(ask: Ask, usable: Sequence[Candidate]) -> int:
    """How many cards it takes; 0 when all of them are not enough."""
    if ask.count != 1 and ask.count:
        return ask.count if sum(not each.alone for each in usable) >= ask.count else 0
    if any(each.free_slots >= ask.slots for each in usable):
        return 1
    if ask.count:
        return 0
    left, number = ask.slots, 0
    for free in sorted((each.free_slots for each in usable if not each.alone), reverse=True):
        left, number = left - free, number + 1
        if left <= 0:
            return number
    return 0


_Cost = tuple[int, int, int]


def _cost(card: Candidate) -> _Cost:
    return (card.slots, not card.shared, card.free_slots)


def _smallest_set(slots: int, number: int, cards: Sequence[Candidate]) -> list[Candidate]:
    """The cheapest set of that number whose free slots suffice. There is one."""
    # The best set for each (how many cards, how many slots, no more than are wanted): cards of equal size make few of them.
    best: dict[tuple[int, int], tuple[_Cost, tuple[int, ...]]] = {(0, 0): ((0, 0, 0), ())}
    for index, card in enumerate(cards):
        size, new, free = _cost(card)
        for (count, total), (cost, members) in list(best.items()):
            if count == number:
                continue
            key = count + 1, min(slots, total + card.free_slots)
            found = ((cost[0] + size, cost[1] + new, cost[2] + free), (*members, index))
            if key not in best or found < best[key]:
                best[key] = found
    return [cards[index] for index in best[number, slots][1]]


def _spread(slots: int, cards: Iterable[Candidate]) -> tuple[Share, ...]:
    """Evenly, as far as each card has so many left."""
    shares = []
    rest = sorted(cards, key=lambda card: card.free_slots)
    for number, card in enumerate(rest):
        share = min(card.free_slots, -(-slots // (len(rest) - number)))
        shares.append(Share(uuid=card.uuid, slots=share))
        slots -= share
    return tuple(shares)
