"""Which signals end the daemon."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest

from runner.daemon.stop import Stop

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _hangup() -> Iterator[None]:
    """As a terminal's programs have it, whatever has started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_drains_and_the_second_ends_at_once(number: signal.Signals):
    stop = Stop()
    with stop.on_signals():
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.signalled.wait(), 30)
        assert stop.drain.is_set()
        assert not stop.force.is_set()
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.force.wait(), 30)
        assert stop.signal == number


async def test_a_closed_terminal_drains_however_often_it_says_so():
    """From the shell, and from the kernel when the shell has ended."""
    stop = Stop()
    with stop.on_signals():
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.wait_for(stop.signalled.wait(), 30)
        stop.ask(signal.SIGHUP)
        assert not stop.force.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(stop.force.wait(), 30)
        assert stop.signal == signal.SIGTERM


async def test_under_nohup_a_closed_terminal_ends_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop().on_signals():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
