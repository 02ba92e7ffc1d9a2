"""Blocking calls beside the daemon's loop: a thread each, so many at a time.

Not `concurrent.futures`: its threads are waited for when the process ends, and a long poll takes 20 seconds. A thread is made
for each call; beside a request (2 ms) that costs nothing (0.1 ms), and an idle account holds no more threads than polls.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
P = ParamSpec("P")


class Threads:
    """Runs calls in threads, first come, first served."""

    def __init__(self, name: str, *, most: int) -> None:
        self.most = most
        self.asking = 0  #: callers of `run`, those that wait for a thread included
        self._name = name
        self._free = asyncio.Semaphore(most)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work(*args, **kwargs)` gives or raises. The call must end by itself: cancelling waits for nothing and stops nothing."""
        self.asking += 1
        try:
            await self._free.acquire()
            future = self._start(work, *args, **kwargs)
            return await asyncio.shield(future)
        finally:
            self.asking -= 1

    def _start(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

        def main() -> None:
            try:
                outcome.set_result(work(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - the edge of a thread: the caller gets it
                outcome.set_exception(error)

        future = asyncio.wrap_future(outcome)
        future.add_done_callback(self._ended)
        threading.Thread(target=main, name=self._name, daemon=True).start()
        return future

    def _ended(self, future: asyncio.Future[T]) -> None:
        self._free.release()
        if not future.cancelled():
            future.exception()  # when its caller has gone, an error concerns nobody
