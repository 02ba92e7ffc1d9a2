"""How many slots a card has: a table by name, the operator's lines over it, an estimate for what neither knows (INTEROP.md 8.1)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import re
import tomllib
from typing import TYPE_CHECKING

from runner import errors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

#: Of a card that no line names: so many slots for so much memory.
ESTIMATE_SLOTS = 2
ESTIMATE_BYTES = 4 << 30
#: More is a slip of the pen.
MAX_SLOTS = 10_000
#: The pattern of every card.
ANY = "*"
_MIG = "mig"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU, or a MIG instance of one: what of it does not change while it is there."""

    uuid: str
    name: str
    index: str  #: as the driver counts: "0"; the second MIG instance of that card is "0:1"
    memory_bytes: int  #: 0: the driver does not say
    whole: str = ""  #: of a MIG instance: the UUID of the card that it is a part of
    whole_bytes: int = 0  #: ... and how much memory that one has

    @property
    def is_mig(self) -> bool:
        """Whether it is a MIG instance. A program can use one of these, not several."""
        return bool(self.whole)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """How many slots a card has, and how that is known."""

    count: int  #: from 1
    estimated: bool = False


class Table:
    """Slots by name."""

    def __init__(self, built_in: Mapping[str, int], override: Mapping[str, int] | None = None) -> None:
        self._tables = [
            [(_words(pattern), count) for pattern, count in table.items()]
            for table in (override or {}, built_in)
        ]

    def slots(self, card: Card) -> Slots:
        """Never 0, whatever the card. The operator's lines are looked at first, and a line with more words wins."""
        # The profile of an instance ("MIG 3g.40gb") has a size in it that is not the whole card's.
        whole = _words(card.name.partition(" MIG")[0])
        words = _words(card.name) | {_MIG} if card.is_mig else whole
        for table in self._tables:
            matching = [
                (pattern, count)
                for pattern, count in table
                if pattern <= (words if _MIG in pattern else whole)
            ]
            if matching:
                pattern, count = max(matching, key=lambda each: len(each[0]))
                return Slots(count=count if _MIG in pattern else _share(count, card))
        count = max(1, (card.memory_bytes + ESTIMATE_BYTES // 2) // ESTIMATE_BYTES * ESTIMATE_SLOTS)
        return Slots(count=count, estimated=True)


def load(override: Path | None = None) -> Table:
    """The table, with the operator's file over it. Blocking.

    Raises:
        errors.UsageError: the file cannot be used; the text says why.
    """
    built_in = importlib.resources.files(__package__).joinpath("cards.toml").read_text()
    return Table(_parsed(built_in), None if override is None else _of_file(override))


def _of_file(path: Path) -> dict[str, int]:
    try:
        return _parsed(path.read_text())
    except OSError as exc:
        raise errors.UsageError(f"--gpu-cards={path}: {exc.strerror}: the file must be readable") from exc
    except ValueError as exc:  # not UTF-8 and not TOML are ValueErrors too
        raise errors.UsageError(
            f'--gpu-cards={path}: {exc} (example: [slots] and below it "RTX 4090" = 12)'
        ) from exc


def _parsed(text: str) -> dict[str, int]:
    """Raises ValueError."""
    document = tomllib.loads(text)
    slots = document.pop("slots", None)
    if not isinstance(slots, dict) or document:
        raise ValueError("it must have one table, [slots], and nothing else")
    for pattern, count in slots.items():
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_SLOTS:
            raise ValueError(f'"{pattern}": its slots are no whole number from 1 to {MAX_SLOTS}')
        if not _words(pattern) and pattern != ANY:
            raise ValueError(f'"{pattern}" has no word of a card\'s name; "{ANY}" stands for every card')
    return slots


def _share(count: int, card: Card) -> int:
    """What a part of a card has of the slots of the whole: as much as of its memory, rounded down, but never nothing."""
    if not card.is_mig or not card.whole_bytes:
        return count
    # 5 % are let go: an instance has a little less than its round share.
    return max(1, int(count * min(1.0, 1.05 * card.memory_bytes / card.whole_bytes)))


@functools.cache
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))
