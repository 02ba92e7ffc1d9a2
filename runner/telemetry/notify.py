"""Tells systemd how the service is doing (sd_notify(3)); without a NOTIFY_SOCKET it does nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Notifier:
    """Sends states to the service manager. Never blocks, never raises: nobody listening is not our trouble."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        #: None: nobody asked. "@name" is Linux's abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address or None
        self._watchdog_secs = _watchdog_secs(environ)

    def ready(self, status: str = "") -> None:
        """Start-up is over."""
        self._send("READY=1", *_status(status))

    def stopping(self, status: str = "") -> None:
        """The service drains and will end."""
        self._send("STOPPING=1", *_status(status))

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(*_status(text))

    def extend(self, secs: float) -> None:
        """Ask for that much more time to start or to stop."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(secs * 1e6)}")

    async def watchdog(self) -> None:
        """Say "alive" at half of WATCHDOG_USEC, for ever; returns at once when no watchdog is set.

        It runs in the daemon's loop: a loop that is stuck stops saying so, and systemd restarts the service.
        """
        if self._address is None or self._watchdog_secs is None:
            return
        while True:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_secs / 2)

    def _send(self, *lines: str) -> None:
        if self._address is None or not lines:
            return
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as door,
        ):
            door.setblocking(False)  # noqa: FBT003 - its only parameter
            door.sendto("\n".join(lines).encode(), self._address)


def _status(text: str) -> tuple[str, ...]:
    return (f"STATUS={' '.join(text.split())}",) if text else ()


def _watchdog_secs(environ: Mapping[str, str]) -> float | None:
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    usec = environ.get("WATCHDOG_USEC", "")
    return int(usec) / 1e6 if usec.isdecimal() and int(usec) > 0 else None
