from __future__ import annotations

import asyncio
import os
import secrets
import socket

import pytest

from runner.telemetry import notify


@pytest.fixture(params=["path", "abstract"])
def door(request, tmp_path):
    name = str(tmp_path / "notify") if request.param == "path" else f"@runner-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if name.startswith("@") else name)
        listener.setblocking(False)
        yield name, listener


async def receive(listener):
    return (await asyncio.get_running_loop().sock_recv(listener, 4096)).decode()


async def test_states_reach_the_manager(door):
    name, listener = door
    notifier = notify.Notifier({"NOTIFY_SOCKET": name})
    notifier.ready("2 queues")
    assert await receive(listener) == "READY=1\nSTATUS=2 queues"
    notifier.status("one\nline")
    assert await receive(listener) == "STATUS=one line"
    notifier.extend(1.5)
    assert await receive(listener) == "EXTEND_TIMEOUT_USEC=1500000"
    notifier.stopping()
    assert await receive(listener) == "STOPPING=1"


async def test_the_watchdog_is_fed_at_half_its_time(door):
    name, listener = door
    notifier = notify.Notifier(
        {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "200000", "WATCHDOG_PID": str(os.getpid())}
    )
    task = asyncio.create_task(notifier.watchdog())
    started = asyncio.get_running_loop().time()
    assert [await receive(listener) for _ in range(3)] == ["WATCHDOG=1"] * 3
    assert asyncio.get_running_loop().time() - started >= 0.19
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "environ",
    [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/nowhere/at/all"}, {"NOTIFY_SOCKET": "@nobody-listens"}],
)
async def test_without_a_manager_nothing_happens(environ):
    notifier = notify.Notifier(environ)
    notifier.ready("x")
    notifier.stopping()
    await notifier.watchdog()


async def test_a_watchdog_meant_for_another_process_is_not_fed(door):
    name, _ = door
    for environ in (
        {"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "x"},
        {"WATCHDOG_USEC": "0"},
    ):
        await notify.Notifier({"NOTIFY_SOCKET": name, **environ}).watchdog()
