"""The runner itself as a real process: `studio-runner serve` in a directory of its own, with a shared environment cache.

Listed in `pytest_plugins` of tests/conftest.py. A test takes the fixture `daemons` and calls it::

    daemon = daemons("--retries=1", env={"AMQP_URL": rabbitmq.amqp_url})     # returns when /readyz says ready
    daemon.until(lambda: daemon.get("/api/runs")["recent"])
    daemon.kill()                                                            # as `kill -9`
    daemon.start()                                                           # again, in the same directory
    assert daemon.stop() == 0                                                # SIGTERM, and wait
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pytest

from runner.options import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

T = TypeVar("T")

PROGRAM = pathlib.Path(sys.executable).with_name("studio-runner")
START_SECS = 100.0
STOP_SECS = 100.0
#: For whatever a daemon is waited for: generous, as other tests may share the machine.
PATIENCE_SECS = 100.0


class Daemon:
    """One daemon process at a time in one working directory; `start` after `stop` or `kill` goes on with what is there."""

    def __init__(
        self,
        working_dir: pathlib.Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        environments: pathlib.Path,
    ) -> None:
        self.working_dir = working_dir
        self.queue_root = working_dir / "queue"
        self.storage = working_dir / "storage"
        self.state_dir = working_dir / "state"
        self.arguments = list(arguments)
        self.env = dict(env or {})
        self.process: subprocess.Popen[bytes] | None = None
        for directory in (self.queue_root, self.state_dir, self.storage):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (shared := self.state_dir / "environments").exists():
            shared.symlink_to(environments)

    def start(self, *, ready: bool = True) -> None:
        """Start it and wait until it answers; `ready`: until it can take work, too."""
        self.launch()
        self.until(lambda: self._answers(ready=ready), START_SECS)

    def launch(self) -> None:
        """Start it, and do not wait for anything."""
        argv = [str(PROGRAM), "serve", f"--working-dir={self.working_dir}", "--prom-address=127.0.0.1:0"]
        with (self.working_dir / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*argv, "--log-format=json", "--log-level=debug", "--cpu-only", *self.arguments],
                env=clean_environment() | self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.working_dir,
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def address(self) -> str:
        """host:port of its HTTP port."""
        return str(json.loads((self.working_dir / "studio-runner.json").read_bytes())["address"])

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, secs: float = STOP_SECS) -> int:
        """Its exit code, once it has ended by itself."""
        assert self.process is not None
        try:
            return self.process.wait(secs)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon has not ended in {secs:.0f} s:\n{self.log_text()}") from None

    def stop(self, secs: float = STOP_SECS) -> int:
        """SIGTERM: drained; its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(secs)

    def kill(self) -> None:
        """As `kill -9`. Does nothing when it has ended."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    # -- looking

    def get(self, path: str, *, token: str | None = None) -> Any:
        """GET: parsed when it is JSON, else bytes. Raises HTTPError."""
        request = urllib.request.Request(f"http://{self.address}{path}")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            content: bytes = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
        return json.loads(content) if is_json else content

    def runs(self) -> list[dict[str, Any]]:
        """The runs in progress, then the recent ones, oldest first."""
        listed = self.get("/api/runs")
        return [*listed["recent"], *listed["running"]]

    def log_text(self) -> str:
        """All that it wrote to stdout and stderr, of earlier processes too."""
        return (self.working_dir / "daemon.log").read_text(errors="replace")

    def log(self, event: str | None = None) -> list[dict[str, Any]]:
        """Its records, or those of one event."""
        records = []
        for line in self.log_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return [record for record in records if event is None or record.get("event") == event]

    def waiting(self, queue: str) -> list[pathlib.Path]:
        """The messages that wait in a directory queue."""
        return [
            path
            for path in (self.queue_root / queue).iterdir()
            if path.is_file() and not path.name.startswith(".") and path.name != "lock.lock"
        ]

    def dead_letters(self) -> list[dict[str, Any]]:
        found = sorted((self.state_dir / "dead-letter").glob("*/*.json"))
        return [json.loads(path.read_bytes()) for path in found]

    def processes(self) -> list[int]:
        """Processes of its runs: whose working directory, program or environment is in its working directory."""
        return [pid for pid in processes_below(self.working_dir) if pid != getattr(self.process, "pid", None)]

    def until(self, condition: Callable[[], T], secs: float = PATIENCE_SECS) -> T:
        """What `condition` gives once it is true. Fails, showing the log, when it is not in time or the daemon has ended."""
        limit = time.monotonic() + secs
        while not (found := condition()):
            assert time.monotonic() < limit, f"not within {secs:.0f} s:\n{self.log_text()[-8000:]}"
            time.sleep(0.02)  # between questions
        return found

    def _answers(self, *, ready: bool) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (
            f"the daemon has ended ({self.process.returncode}):\n{self.log_text()}"
        )
        try:
            # The file may still be that of a daemon that was killed.
            told = json.loads((self.working_dir / "studio-runner.json").read_bytes())
            if told["pid"] != self.process.pid:
                return False
            self.get("/readyz" if ready else "/healthz")
        except (OSError, ValueError):  # not there yet; 503 is an OSError too
            return False
        return True


class MakeDaemon(Protocol):
    """What the fixture `daemons` gives."""

    def __call__(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        working_dir: pathlib.Path | None = None,
        start: bool = True,
        ready: bool = True,
    ) -> Daemon: ...


def clean_environment() -> dict[str, str]:
    """This process's environment without what would configure a runner."""
    ours = {option.env for option in OPTIONS} | {"STATE_DIRECTORY", "NOTIFY_SOCKET", "STUDIO_STORAGE"}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith(("AWS_", "LOGXI", "STUDIOML_"))
    }


def processes_below(directory: pathlib.Path) -> list[int]:
    """Processes that live in a directory: by where they are, or by what their environment names."""
    inside = os.fsencode(directory.resolve())
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                where = os.fsencode((entry / "cwd").readlink())
                environment = (entry / "environ").read_bytes()
                if where == inside or where.startswith(inside + b"/") or inside + b"/runs/" in environment:
                    found.append(int(entry.name))
    return found


@pytest.fixture(scope="session")
def environments(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A cache of Python environments for the daemons of the whole test run: each is built once."""
    return tmp_path_factory.mktemp("environments")


@pytest.fixture
def daemons(tmp_path: pathlib.Path, environments: pathlib.Path) -> Iterator[MakeDaemon]:
    """Makes daemons; those that still run after the test are killed, and what they ran with them."""
    made: list[Daemon] = []

    def make(
        *arguments: str,
        env: Mapping[str, str] | None = None,
        working_dir: pathlib.Path | None = None,
        start: bool = True,
        ready: bool = True,
    ) -> Daemon:
        where = working_dir or tmp_path / f"daemon{len(made) or ''}"
        daemon = Daemon(where, *arguments, env=env, environments=environments)
        made.append(daemon)
        if start:
            daemon.start(ready=ready)
        return daemon

    yield make
    for daemon in made:
        daemon.kill()
    for daemon in made:
        daemon.until(lambda daemon=daemon: not daemon.processes())  # type: ignore[misc]
