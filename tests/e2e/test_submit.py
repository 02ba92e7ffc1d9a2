"""`studio-runner submit` against a real daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.servers.daemon import MakeDaemon


def test_a_daemon_starts_and_drains(daemons: MakeDaemon):
    daemon = daemons()
    assert daemon.runs() == []
    assert daemon.stop() == 0
    daemon.start()
    daemon.kill()
    assert daemon.wait() == -9
    assert daemon.log("serving")
