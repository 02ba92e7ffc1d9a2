"""When what is known of a queue may be forgotten: completion services make a queue of a new name each time, for years."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

K = TypeVar("K")

#: Not sooner: that a queue was durable is the proof that it was deleted, and not lost (DESIGN.md rule 11).
FORGET_SECS = 24 * 3600.0


class Absent(Generic[K]):
    """Since when names have been missing from discovery."""

    def __init__(self) -> None:
        self._since: dict[K, float] = {}

    def over(self, known: Iterable[K], listed: Container[K]) -> set[K]:
        """Of the names that something is known of, those that no discovery has listed for a day. To be called at each discovery."""
        now = time.monotonic()
        self._since = {name: self._since.get(name, now) for name in known if name not in listed}
        return {name for name, since in self._since.items() if now - since >= FORGET_SECS}
