"""`make demo`, whole and interrupted. Needs the package registry, for scikit-learn and its like."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.servers.daemon import clean_environment, processes_below

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECS = 150

_STARTED: list[subprocess.Popen[bytes]] = []
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages and environments for all demos of this module."""
    return tmp_path_factory.mktemp("environments")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """The demo's directory; nothing may live in it afterwards."""
    demo = tmp_path / "demo"
    yield demo
    while _STARTED:  # only those of a test that failed still run
        process = _STARTED.pop()
        if process.poll() is None:
            process.terminate()
            process.communicate()
    assert nothing_lives_in(demo)


def nothing_lives_in(directory: Path) -> bool:
    """Supervisors of a daemon that had to be killed end what it ran, within seconds."""
    limit = time.monotonic() + 30
    while processes_below(directory):
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)  # between looks
    return True


def share_environments(directory: Path, cached: Path) -> None:
    (directory / "state").mkdir(parents=True, mode=0o700)
    (directory / "state" / "environments").symlink_to(cached)


def start(directory: Path, *arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "demo.py"), f"--dir={directory}", *arguments],
        env=clean_environment() | {"QUEUE_MATCH": "^nothing$"},  # the demo is not the operator's daemon
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    _STARTED.append(process)
    return process


def until(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + LIMIT_SECS
    while not condition():
        assert time.monotonic() < limit
        assert process.poll() is None, process.stdout.read().decode() if process.stdout else ""
        time.sleep(0.01)  # between questions


def test_it_trains_and_is_faster_the_second_time(directory: Path, cached: Path):
    share_environments(directory, cached)
    took = []
    told = ""
    for how in ("environment built", "environment cached"):
        demo = start(directory, "--epochs=3")
        told = demo.communicate(timeout=LIMIT_SECS)[0].decode()
        assert demo.returncode == 0, told
        assert how in told
        assert "accuracy" in told
        assert "the scraped document" in told
        assert '"status": "completed"' in told
        found = re.search(r"took (\d+\.\d) s", told)
        assert found is not None
        took.append(float(found[1]))
    assert "the first time it was" in told
    assert len(took) == 2
    results = sorted((directory / "results").iterdir())
    assert len(results) == 2
    for result in results:
        assert (result / "modeldir" / "model.pkl").stat().st_size > 0
        assert (result / "modeldir" / "training.png").read_bytes().startswith(b"\x89PNG")
        assert b"epoch  3" in (result / "output" / "output").read_bytes()
        document = json.loads((result / "metadata.json").read_bytes())
        assert document["experiment"]["epoch"] == 3
        assert "final" in document["experiment"]


def is_starting(directory: Path) -> bool:
    return (directory / "daemon.log").exists()


def is_building(directory: Path) -> bool:
    return any((directory / "state" / "environments" / "entries").glob(".new-*"))


def is_running(directory: Path) -> bool:
    return any(
        b"epoch" in output.read_bytes() for output in directory.glob("runs/*/experiments/*/output/output")
    )


def is_submitted(directory: Path) -> bool:
    return any((directory / "storage" / "blobstore").glob("*.tar"))


@pytest.mark.parametrize("stage", [is_starting, is_submitted, is_building, is_running])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_process_and_nothing_half_written(
    directory: Path, cached: Path, stage: Callable[[Path], bool], number: signal.Signals
):
    if stage is is_running:
        share_environments(directory, cached)  # else each builds one, which is what is interrupted
    demo = start(directory, "--epochs=2000")
    until(lambda: stage(directory) or is_running(directory), demo)  # a short stage may go by unseen
    demo.send_signal(number)
    told = demo.communicate(timeout=LIMIT_SECS)[0].decode()
    assert demo.returncode == 130, told
    assert "interrupted" in told
    assert "Traceback" not in told
    assert nothing_lives_in(directory)
    assert list((directory / "results").iterdir()) == []
    assert [path for path in (directory / "queue").rglob("*") if path.is_file()] == []
    assert [path for path in directory.rglob("*.part") if "environments" not in path.parts] == []


def test_ctrl_c_before_there_is_anything_to_stop_is_no_traceback(directory: Path):
    demo = start(directory)
    maps = Path(f"/proc/{demo.pid}/maps")
    until(lambda: "orjson" in maps.read_text(), demo)  # it has begun to import
    demo.send_signal(signal.SIGINT)
    told = demo.communicate(timeout=LIMIT_SECS)[0].decode()
    assert demo.returncode in {130, -signal.SIGINT}, told
    assert "Traceback" not in told


def test_after_an_interrupted_one_the_next_runs_its_own(directory: Path, cached: Path):
    share_environments(directory, cached)
    demo = start(directory, "--epochs=2000")
    until(lambda: is_running(directory), demo)
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=LIMIT_SECS)
    assert demo.returncode == 130
    demo = start(directory, "--epochs=1")
    told = demo.communicate(timeout=LIMIT_SECS)[0].decode()
    assert demo.returncode == 0, told
    assert len(list((directory / "results").iterdir())) == 1


def test_a_daemon_that_works_there_already_is_left_alone(directory: Path, cached: Path):
    share_environments(directory, cached)
    first = start(directory, "--epochs=2000")
    until(lambda: is_running(directory), first)
    second = start(directory)
    told = second.communicate(timeout=LIMIT_SECS)[0].decode()
    assert second.returncode == 2
    assert "already" in told
    assert is_running(directory)
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=LIMIT_SECS)
    assert first.returncode == 130
