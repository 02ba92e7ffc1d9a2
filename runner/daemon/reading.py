"""Messages become requests. The models behind that take a quarter of the start to import, and are not needed to be ready."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from runner.request.model import Request

#: Larger messages are decoded in a thread: the loop would stand still.
DECODE_IN_LOOP_BYTES = 128 << 10


async def request_of(body: bytes) -> Request:
    """What a message asks for. Raises what `request.decode` raises."""
    if len(body) > DECODE_IN_LOOP_BYTES or not _decoder.cache_info().currsize:
        request: Request = await asyncio.to_thread(lambda: _decoder().decode(body))
    else:
        request = _decoder().decode(body)
    return request


async def prepare() -> None:
    """Import them, in a thread: the first message need not wait for it."""
    await asyncio.to_thread(_decoder)


@functools.cache
def _decoder() -> ModuleType:
    from runner.request import decode

    return decode
