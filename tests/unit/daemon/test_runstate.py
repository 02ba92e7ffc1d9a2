from __future__ import annotations

import contextlib
import dataclasses
import os
import time

import pytest

from runner import errors
from runner.daemon import runstate
from runner.daemon.attempts import Ledger
from runner.daemon.runstate import RunState, RunStates
from runner.experiment.outcome import Outcome


def state(root, run_id="a.0", outcome=None):
    return RunState(
        run_id=run_id,
        root=root / run_id,
        queue="q",
        digest="d",
        second=1700000000,
        started=1.5,
        attempt=2,
        outcome=outcome,
    )


def test_it_comes_back_as_it_was(tmp_path):
    states = RunStates(tmp_path / "state")
    outcome = Outcome.of_stop(errors.Reason.TIMEOUT, "too long")
    states.save(state(tmp_path))
    states.save(state(tmp_path, "b.0", outcome))
    assert states.load() == [state(tmp_path), state(tmp_path, "b.0", outcome)]


def test_the_sweep_keeps_what_is_undelivered_and_removes_what_nobody_knows(tmp_path):
    runs = tmp_path / "runs"
    states = RunStates(tmp_path / "state")
    for name in ("cut.0", "done.0", "0123456789abcdef.0", "tensorboard"):
        (runs / name).mkdir(parents=True)
    done = state(runs, "done.0", Outcome.of_stop(errors.Reason.TIMEOUT, "x"))
    for each in (state(runs, "cut.0"), done, state(runs, "vanished.0")):
        states.save(each)
    runstate.sweep(states, runs, keep=True)
    assert (runs / "0123456789abcdef.0").is_dir()
    undelivered, interrupted = runstate.sweep(states, runs)
    assert undelivered == [done]
    assert [each.run_id for each in interrupted] == ["cut.0"]
    # What no runner has made is not the runner's to remove.
    assert sorted(path.name for path in runs.iterdir()) == ["cut.0", "done.0", "tensorboard"]
    assert "vanished.0" not in {each.run_id for each in states.load()}


def test_a_state_that_points_elsewhere_removes_nothing_there(tmp_path):
    states = RunStates(tmp_path / "state")
    precious = tmp_path / "precious" / "a.0"
    precious.mkdir(parents=True)
    states.save(dataclasses.replace(state(tmp_path), root=precious))
    assert runstate.sweep(states, tmp_path / "runs") == ([], [])
    assert precious.exists()


def test_the_last_state_that_was_written_whole_counts(tmp_path):
    states = RunStates(tmp_path / "state")
    states.save(state(tmp_path))
    with (tmp_path / "state" / "a.0.json").open("ab") as file:
        file.write(b'\n{"run_id": "a.0", "ou')
    assert states.load() == [state(tmp_path)]
    done = state(tmp_path, outcome=Outcome.of_stop(errors.Reason.TIMEOUT, "x"))
    states.save(done)
    assert states.load() == [done]


def test_a_torn_file_is_removed_and_said(tmp_path):
    states = RunStates(tmp_path)
    (tmp_path / "x.json").write_text('{"run_id": ')
    (tmp_path / "y.json").write_text("[1]")
    assert states.load() == []
    assert list(tmp_path.glob("*.json")) == []


def test_only_final_outcomes_are_resumed(tmp_path):
    runs = tmp_path / "runs"
    states = RunStates(tmp_path / "state")
    (runs / "back.0").mkdir(parents=True)
    back = state(runs, "back.0", Outcome.of_stop(errors.Reason.DRAINED, "x"))
    states.save(back)
    assert runstate.sweep(states, runs) == ([], [back])


def test_results_that_nobody_comes_for_are_forgotten(tmp_path):
    runs = tmp_path / "runs"
    states = RunStates(tmp_path / "state")
    (runs / "0123456789abcdef.0").mkdir(parents=True)
    states.save(state(runs, "0123456789abcdef.0", Outcome.of_stop(errors.Reason.TIMEOUT, "x")))
    long_ago = time.time() - runstate.KEEP_SECS - 1
    os.utime(tmp_path / "state" / "0123456789abcdef.0.json", (long_ago, long_ago))
    assert runstate.sweep(states, runs) == ([], [])
    assert not list(runs.iterdir())


@pytest.fixture
def ledger(tmp_path):
    with contextlib.closing(Ledger(tmp_path / "ledger.sqlite")) as opened:
        yield opened


def killed(ledger, states, *runs):
    """These runs were cut off with their daemon; the count of their message as the next one has it."""
    for each in runs:
        states.save(each)
    runstate.correct(ledger, states, [found for found in states.load() if found.outcome is None])
    return ledger.attempts("q", "d").count


def test_runs_of_the_same_bytes_that_were_cut_off_together_count_once(tmp_path, ledger):
    states = RunStates(tmp_path / "state")
    for _ in range(2):
        ledger.begin("q", "d")
    assert killed(ledger, states, state(tmp_path), state(tmp_path, "b.0")) == 1
    # Killed again before it was done with them: nothing more is taken back.
    assert killed(ledger, states) == 1


def test_what_is_left_of_an_earlier_attempt_takes_none_back(tmp_path, ledger):
    """Daemons that are killed again and again leave the states of several attempts: one that kills its runner would run for ever."""
    states = RunStates(tmp_path / "state")
    for number in (1, 2, 3):
        assert ledger.begin("q", "d") == number
        run = dataclasses.replace(state(tmp_path, f"a.{number}"), attempt=number)
        assert killed(ledger, states, run) == number
