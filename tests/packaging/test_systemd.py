"""The systemd unit: verified by systemd where it is installed, its promises kept by a real daemon."""

from __future__ import annotations

import re
import select
import shutil
import socket
import subprocess
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest

from runner import config
from runner.options import OPTIONS
from tests.packaging.documents import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOLDER = ROOT / "deploy" / "systemd"
UNIT = FOLDER / "studio-runner.service"
EXAMPLE = FOLDER / "environment.example"


def directives() -> dict[str, list[str]]:
    """Everything in [Service]: a directive may be given more than once."""
    found: dict[str, list[str]] = defaultdict(list)
    section = UNIT.read_text().split("[Service]\n")[1].split("\n[")[0]
    for line in section.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[name].append(value)
    return found


SERVICE = directives()


def test_systemd_understands_it(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing (Debian: systemd)")
    (program,) = SERVICE["ExecStart"]
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(program.split()[0], "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "studio-runner" not in done.stderr  # unknown directives are only warned of


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Type", "notify"),
        ("Delegate", "yes"),
        ("KillMode", "mixed"),  # else a drain sends TERM to the workloads
        ("TimeoutStopSec", "infinity"),
        ("OOMPolicy", "continue"),  # else a workload out of memory ends the service
        ("Restart", "on-failure"),
        ("RestartPreventExitStatus", "2"),
        ("SuccessExitStatus", "130 143"),
        ("EnvironmentFile", "-/etc/studio-runner/environment"),
        ("StateDirectory", "studio-runner"),
        ("CacheDirectory", "studio-runner"),
        ("ExecStart", "/opt/studio-runner/bin/studio-runner serve"),
    ],
)
def test_it_says(name, value):
    assert SERVICE[name] == [value]


def test_it_is_not_root():
    assert SERVICE["User"] == ["studio-runner"]
    assert SERVICE["NoNewPrivileges"] == ["yes"]


def test_nothing_in_it_takes_devices_or_just_in_time_compilers_from_workloads():
    harmful = {
        *("PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "MemoryDenyWriteExecute"),
        *("PrivateNetwork", "RestrictAddressFamilies", "ProtectControlGroups", "RestrictNamespaces"),
        *("SystemCallFilter", "PrivateUsers", "ProtectProc", "IPAddressDeny", "RestrictRealtime"),
    }
    assert not harmful & set(SERVICE)
    assert SERVICE["ProtectSystem"] == ["full"]  # strict would close the directories of file: artifacts


def test_the_directories_are_the_daemons(tmp_path):
    (assigned,) = SERVICE["Environment"]
    name, _, value = assigned.partition("=")
    built = config.parse(
        [], {name: value.replace("%C", "/var/cache"), "STATE_DIRECTORY": "/var/lib/studio-runner"}
    )
    assert str(built.paths.working_dir) == "/var/cache/studio-runner"
    assert str(built.paths.state_dir) == "/var/lib/studio-runner"


def example(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#?([A-Z_]+)='?(.*?)'?$", text, re.MULTILINE))


def test_every_variable_of_the_example_is_an_option():
    named = example(EXAMPLE.read_text())
    assert len(named) > 8
    assert set(named) <= {option.env for option in OPTIONS if not option.missing}


def test_the_example_as_it_is_and_with_everything_switched_on_is_a_configuration():
    on = example(re.sub(r"^#.*\n", "", EXAMPLE.read_text(), flags=re.MULTILINE))
    assert config.parse([], on).queues.match.pattern == "^(rmq|local)_.*$"
    built = config.parse([], example(EXAMPLE.read_text()))
    assert built.runs.grace_secs == 1800
    assert built.cache.size_bytes == 100_000_000_000


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """What systemd listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        yield listener


def heard(manager: socket.socket, word: str, secs: float = 60.0) -> None:
    while True:
        assert select.select([manager], [], [], secs)[0], f"systemd has not heard {word}"
        if word in manager.recv(4096).decode().splitlines():
            return


def test_the_daemon_tells_when_it_is_ready_alive_and_stopping(daemons, manager):
    env = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "400000"}
    daemon = daemons(env=env, start=False)
    daemon.start(ready=False)
    heard(manager, "READY=1")
    heard(manager, "WATCHDOG=1")
    heard(manager, "WATCHDOG=1")
    assert daemon.stop() == 0
    heard(manager, "STOPPING=1")


def test_a_wrong_option_is_the_exit_code_that_is_not_tried_again(daemons):
    daemon = daemons("--queue-match=(", start=False)
    with pytest.raises(AssertionError, match="has ended"):
        daemon.start()
    assert daemon.wait() == int(SERVICE["RestartPreventExitStatus"][0])
