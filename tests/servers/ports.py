"""Ports for servers that tests start."""

from __future__ import annotations

import contextlib
import os
import random
import socket

#: Below the range that outgoing connections take theirs from.
_FIRST, _LAST = 10_000, 32_000
#: Test processes that run beside each other take theirs from different parts.
_PARTS = 4


def free_ports(count: int) -> list[int]:
    """Ports of loopback that are free now; another process may take one before the server does, which is improbable."""
    size = (_LAST - _FIRST) // _PARTS
    first = _FIRST + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % _PARTS * size
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for port in random.sample(range(first, first + size), size):
            listener = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise AssertionError("no port is free")
