"""Memory that comes back: a daemon that is started while memory is short would else give away too little for all of its life.

That is what happens after a `kill -9`: what is left of its runs is still about to end when the next daemon looks at the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner.resources.allocator import Allocator

EVERY_SECS = 10.0


async def follow(allocator: Allocator, available: Callable[[], int], every_secs: float = EVERY_SECS) -> None:
    """For ever: tell the allocator of memory that is there now and was not before.

    What runs use is missing from `available`, so it can only tell too little; hence nothing is taken away by it: what was promised
    and is not used yet cannot be told from what strangers have taken.
    """
    while True:
        await asyncio.sleep(every_secs)
        with contextlib.suppress(OSError):  # no more files can be opened now, say: the next look tells
            allocator.found_memory(await asyncio.to_thread(available))
