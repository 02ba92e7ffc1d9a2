"""What every test may use."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

# A test run in the background of a script is started with SIGINT ignored, and all that it starts would inherit that.
with contextlib.suppress(ValueError):  # not in the main thread
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = [
    "tests.servers.daemon",
    "tests.servers.docker",
    "tests.servers.faulty_http",
    "tests.servers.rabbitmq",
    "tests.servers.pubsub",
    "tests.servers.seaweedfs",
    "tests.servers.moto_sqs",  # it uses the one before
    "tests.servers.nvml",
    "tests.servers.studioml_client",
    "tests.servers.apptainer",
]


#: Asked in a process of its own, as a daemon that a test starts is: preparing groups may move the process that asks.
_LIMITS = """
from runner.process import cgroups
try:
    print(cgroups.Groups.find())
except cgroups.Unavailable as exc:
    print(f"measured ({exc})")
"""


def pytest_report_header() -> str:
    """Which mechanism the daemons of these tests limit their runs by."""
    asked = subprocess.run(
        [sys.executable, "-c", _LIMITS],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"limits: {asked.stdout.strip() or asked.stderr.strip().splitlines()[-1]}"


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names of tests are the same in every process: compressed bytes hold the time, and random ones are random."""
    if isinstance(val, bytes) and (len(val) > 20 or val.startswith(b"\x1f\x8b")):
        return f"{argname}-of-{len(val)}-bytes"
    return None
