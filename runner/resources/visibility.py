"""Which cards this runner may use: what `CUDA_VISIBLE_DEVICES` and `NVIDIA_VISIBLE_DEVICES` of its own say (INTEROP.md 8.2). Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from runner.resources.cards import Card

#: Each that is set restricts.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
_NONE = {"", "-1", "none", "void"}


def visible(cards: Sequence[Card], environ: Mapping[str, str], *, contained: bool) -> list[Card]:
    """Those of `cards`, the whole inventory, that the variables leave.

    An entry is an index as the driver counts ("0", or "0:1" for a MIG instance), or a UUID or the beginning of one; of a card
    that is cut into MIG instances either means all of these. Unknown and ambiguous entries are ignored.

    `contained`: in a container. There the indices of `NVIDIA_VISIBLE_DEVICES` are the host's, and what gave the container
    these cards has obeyed them: a list as long as the inventory leaves all of it.
    """
    left = list(cards)
    for name in VARIABLES:
        text = environ.get(name)
        if text is None:
            continue
        entries = [entry.strip().lower() for entry in text.split(",")]
        obeyed = contained and name.startswith("NVIDIA") and len(entries) == len(cards)
        if obeyed and all(entry.replace(":", "").isdecimal() for entry in entries):
            continue
        named = _named(cards, entries)
        left = [card for card in left if card in named]
    return left


def _named(cards: Sequence[Card], entries: list[str]) -> list[Card]:
    if entries == ["all"]:
        return list(cards)
    if len(entries) == 1 and entries[0] in _NONE:
        return []
    return [card for entry in entries for card in _meant(cards, entry)]


def _meant(cards: Sequence[Card], entry: str) -> list[Card]:
    if entry.replace(":", "").isdecimal():
        return [card for card in cards if entry in {card.index, card.index.partition(":")[0]}]
    if not entry.startswith(("gpu-", "mig-")):
        return []
    uuids = {uuid for card in cards for uuid in (card.uuid, card.whole) if uuid.lower().startswith(entry)}
    exact = {uuid for uuid in uuids if uuid.lower() == entry}
    if len(uuids) > 1 and not exact:
        return []
    return [card for card in cards if {card.uuid, card.whole} & (exact or uuids)]
