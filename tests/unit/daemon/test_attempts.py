from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from runner import errors
from runner.daemon.attempts import Ledger


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield ledger
    ledger.close()


def test_attempts_are_counted_and_undone(ledger):
    assert ledger.begin("q", "d") == 1
    assert ledger.begin("q", "d") == 2
    ledger.undo("q", "d")
    assert ledger.attempts("q", "d").count == 1
    assert ledger.attempts("other", "d").count == 0


def test_an_attempt_that_says_nothing_more_is_one_that_killed_the_runner(ledger):
    ledger.begin("q", "d")
    assert ledger.attempts("q", "d").reason == "runner"
    ledger.failed("q", "d", "artifact", "no such object")
    assert ledger.attempts("q", "d").text == "no such object"


def test_attempts_that_travelled_with_the_message_count(ledger):
    assert ledger.begin("q", "d", carried=2) == 3
    assert ledger.begin("q", "d", carried=1) == 4


def test_finished_messages_are_known_for_a_day_and_start_at_zero_again(ledger, monkeypatch):
    ledger.begin("q", "d")
    ledger.finish("q", "d")
    assert ledger.finished("q", "d")
    assert ledger.attempts("q", "d").count == 0
    later = time.time() + 24 * 3600 + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert not ledger.finished("q", "d")


def test_a_kill_right_after_the_count_loses_nothing(tmp_path):
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from runner.daemon.attempts import Ledger
        Ledger(Path(sys.argv[1])).begin("q", "d")
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    path = tmp_path / "ledger.sqlite"
    ended = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        check=False,
        cwd=Path(__file__).parents[3],
        env=dict(os.environ),
    )
    assert ended.returncode == -signal.SIGKILL
    ledger = Ledger(path)
    assert ledger.attempts("q", "d").count == 1
    ledger.close()


def test_a_file_that_is_no_ledger_is_the_operators_to_move(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_text("not a database, but long enough to be looked at as one " * 10)
    with pytest.raises(errors.UsageError, match="move it away"):
        Ledger(path)


def test_a_new_message_of_finished_bytes_is_no_finished_one(ledger):
    ledger.begin("q", "d")
    ledger.finish("q", "d")
    ledger.published_anew("q", "d")  # should the runner die now, its redelivery has to run
    assert not ledger.finished("q", "d")


def test_bytes_that_were_there_twice_are_not_known_as_finished(ledger):
    ledger.begin("q", "d")
    ledger.begin("q", "d")
    ledger.finish("q", "d", others=1, unique=False)
    assert ledger.attempts("q", "d").count == 1
    assert not ledger.finished("q", "d")
    ledger.finish("q", "d", unique=False)
    assert ledger.attempts("q", "d").count == 0
    assert not ledger.finished("q", "d")


def test_it_is_private_and_forgets_while_it_runs(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    assert path.stat().st_mode & 0o777 == 0o600
    ledger.finish("q", "old")
    later = time.time() + 25 * 3600
    monkeypatch.setattr(time, "time", lambda: later)
    ledger.finish("q", "new")
    ledger.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT digest FROM finished").fetchall() == [("new",)]


def test_a_full_disk_stops_what_begins_and_nothing_else(ledger):
    ledger.begin("q", "d")
    ledger._db.execute("PRAGMA query_only=1")  # as a disk that takes no more
    with pytest.raises(OSError, match="ledger"):
        ledger.begin("q", "d")
    with pytest.raises(OSError, match="ledger"):
        ledger.begin("q", "e")
    ledger.failed("q", "d", "artifact", "x")
    ledger.undo("q", "d")
    ledger.finish("q", "d")
    assert ledger.attempts("q", "d").count == 1


def test_what_was_known_under_an_older_name_is_known_under_the_new_one(tmp_path):
    with contextlib.closing(Ledger(tmp_path / "ledger.sqlite")) as before:
        for queue, times in (("old", 2), ("older", 1), ("new", 1)):
            for _ in range(times):
                before.begin(queue, "d")
        before.failed("old", "d", "artifact", "no such object")
        before.begin("old", "alone")
        before.finish("old", "done")
    with contextlib.closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        ledger.renamed("old", "new")
        ledger.renamed("older", "new")
        assert ledger.attempts("new", "d").count == 2
        assert ledger.attempts("new", "alone").count == 1
        assert ledger.finished("new", "done")
        assert ledger.attempts("old", "d").count == 0
        assert not ledger.finished("old", "done")
