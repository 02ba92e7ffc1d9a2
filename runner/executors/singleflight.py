"""One task for all that want the same at the same time."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Work by key. Those who ask while it is under way share it, and its failure."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._flights: dict[str, _Flight[T]] = {}

    async def join(self, key: str, begin: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What the work for `key` gives; begins it when it is not under way. Cancelling the last that waits ends it."""
        flight = self._flights.get(key)
        if flight is None:
            task = asyncio.create_task(begin(), name=f"{self._what} {key}")
            flight = self._flights[key] = _Flight(task)
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if flight.waiting == 0:
                if self._flights.get(key) is flight:
                    del self._flights[key]
                flight.task.cancel()  # nothing to a task that is done
                await asyncio.wait([flight.task])


@dataclasses.dataclass
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    waiting: int = 0
