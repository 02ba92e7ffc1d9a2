"""Rows of INTEROP.md section 10, column REC, that `test_outcomes` and `test_adversity` do not have."""

from __future__ import annotations

import contextlib
import json
import re
import time

import pytest

from runner import errors
from runner.daemon import queuestate, runs
from runner.experiment import results
from runner.request import decode
from runner.storage.base import Forbidden
from runner.storage.files import FileStore
from tests.integration import harness
from tests.integration.harness import daemon, not_before_it_printed

LONG = "import time; print('begun', flush=True); time.sleep(600)"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(queuestate, "FIRST_BACKOFF_SECS", 0.05)
    monkeypatch.setattr(queuestate, "LAST_BACKOFF_SECS", 0.2)


async def publish(it, body, queue="rmq_a"):
    it.queue.declare(queue)
    await it.queue.publish(it.queue.ref(queue), body)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"message": {"payload": "QUFB,QUFB"}}', "malformed"),
        (
            b'{"experiment": {"key": "k", "artifacts": {"_singularity": {}}}}',
            "unsupported",
        ),
        (b'{"experiment": {"key": "k", "filename": "x.py", "artifacts": {"../x": {}}}}', "unsupported"),
    ],
)
async def test_what_can_never_run_is_dead_lettered_at_once(tmp_path, body, reason):
    async with daemon(tmp_path) as it:
        await publish(it, body)
        await it.until(it.dead)
        await it.settled()
        assert [(each["reason"], each["attempts"]) for each in it.dead()] in ([(reason, 0)], [(reason, 1)])


@pytest.mark.parametrize(
    "body",
    [
        {"message": {"payload": "QUFB" * 60 + "," + "QUFB" * 60}},
        {"experiment": {"key": "k", "artifacts": {"_singularity": {"qualified": "shub://x/y"}}}},
        {"experiment": {"key": "k", "filename": "x.py"}, "config": {"container": {"image": "a:1"}}},
    ],
)
async def test_what_wants_a_key_or_an_engine_that_is_not_here_is_left_to_other_hosts(tmp_path, body):
    async with daemon(tmp_path) as it:
        await publish(it, json.dumps(body).encode())
        await it.until(it.came_back)
        assert not it.dead()
        assert (it.queue.depth("rmq_a"), len(it.queue.held)) == (1, 0)  # at once, and not asked for again
        it.queue.delete("rmq_a")


async def test_a_message_without_artifacts_runs_and_fails_by_itself(tmp_path):
    async with daemon(tmp_path) as it:
        body = {"experiment": {"key": "k", "filename": "missing.py", "artifacts": {}}}
        await publish(it, json.dumps(body).encode())
        await it.settled()
        assert not it.dead()


async def test_a_full_disk_starts_nothing_and_counts_nothing(tmp_path, monkeypatch):
    async with daemon(tmp_path) as it:
        monkeypatch.setattr(runs, "MIN_FREE_BYTES", 1 << 60)
        await it.submit("print(1)")
        await it.until(it.came_back)
        assert not it.runs
        monkeypatch.setattr(runs, "MIN_FREE_BYTES", 0)
        await it.settled()
        assert it.documents()[0]["runner"]["attempt"] == 1


async def test_sizes_that_nobody_can_read_are_taken_as_none(tmp_path):
    async with daemon(tmp_path) as it:
        await it.submit("print(1)", resources_needed={"cpus": "many", "ram": "lots", "hdd": []})
        await it.settled()
        assert it.documents()[0]["studioml"]["status"] == "completed"


async def test_a_mutable_input_that_may_not_be_read_fails_rather_than_being_overwritten(
    tmp_path, monkeypatch
):
    really = FileStore.open

    def forbidden(store, key):
        if "modeldir" in key:
            raise Forbidden("no")
        return really(store, key)

    monkeypatch.setattr(FileStore, "open", forbidden)
    async with daemon(tmp_path) as it:
        body = it.message("import pathlib; pathlib.Path('../modeldir/new').touch()")
        old = it.storage / "experiments/exp/modeldir.tar"
        old.parent.mkdir(parents=True)
        old.write_bytes(b"old state")
        await publish(it, body)
        await it.until(it.dead)
        await it.settled()
        assert (it.dead()[0]["reason"], it.dead()[0]["attempts"]) == ("artifact", 3)
        assert old.read_bytes() == b"old state"


def failing_environment(monkeypatch, error):
    @contextlib.asynccontextmanager
    async def prepare(self, spec, log):
        raise error
        yield

    monkeypatch.setattr(harness.ThisPython, "prepare", prepare)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.EnvironmentFailed("pip says no"), "environment"),
        (RuntimeError("a defect"), "runner"),
        (OSError(28, "No space left on device"), "disk"),
    ],
)
async def test_what_may_go_better_next_time_is_tried_three_times(tmp_path, monkeypatch, error, reason):
    failing_environment(monkeypatch, error)
    async with daemon(tmp_path) as it:
        await it.submit("print(1)")
        await it.until(it.dead)
        await it.settled()
        assert [(each["reason"], each["attempts"]) for each in it.dead()] == [(reason, 3)]
        assert [each["studioml"]["status"] for each in it.documents()] == ["failed"] * 3
        assert not it.runs


async def test_a_python_that_is_not_there_is_final_at_once(tmp_path, monkeypatch):
    failing_environment(monkeypatch, errors.UnsupportedRequest("no Python 9.9; there are 3.11"))
    async with daemon(tmp_path) as it:
        await it.submit("print(1)")
        await it.until(it.dead)
        await it.settled()
        assert [(each["reason"], each["attempts"]) for each in it.dead()] == [("unsupported", 1)]
        assert "9.9" in it.output()


async def test_a_package_index_that_is_away_is_no_attempt(tmp_path, monkeypatch):
    really = harness.ThisPython.prepare
    failing_environment(monkeypatch, errors.Unreachable("away", endpoint="package index"))
    async with daemon(tmp_path) as it:
        await it.submit("print(1)")
        await it.until(lambda: len(it.documents()) >= 4)
        monkeypatch.setattr(harness.ThisPython, "prepare", really)
        await it.settled()
        assert it.documents()[-1]["studioml"]["status"] == "completed"
        assert it.documents()[-1]["runner"]["attempt"] == 1
        assert not it.dead()


async def test_a_lifetime_that_ends_while_it_runs_is_final(tmp_path, monkeypatch):
    async with daemon(tmp_path) as it:
        not_before_it_printed(it, monkeypatch)
        await it.submit(LONG, time_added=time.time(), config={"experimentLifetime": "8s"})
        await it.settled()
        (document,) = it.documents()
        assert (document["studioml"]["status"], document["studioml"]["reason"]) == ("failed", "expired")
        assert it.output().startswith("begun\nstudio-runner: ")
        assert not it.dead()


async def test_a_checkpoint_that_fails_is_tried_again_and_kills_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_CHECKPOINT_SECS", (0.1, 0.1, 1.0))
    tries: list[str] = []
    really = FileStore.put

    def put(store, key, source, size):
        if "modeldir" in key and len(tries) < 3:
            tries.append(key)
            raise errors.StorageUnavailable("away", endpoint="x") if len(tries) < 2 else Forbidden("no")
        really(store, key, source, size)

    monkeypatch.setattr(FileStore, "put", put)
    go = tmp_path / "go"
    script = f"import pathlib, time\npathlib.Path('../modeldir/m').touch()\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)"
    async with daemon(tmp_path) as it:
        await it.submit(script)
        await it.until((it.storage / "experiments/exp/modeldir.tar").exists)
        assert len(tries) == 3
        go.touch()
        await it.settled()
        assert it.documents()[0]["studioml"]["status"] == "completed"


async def test_checkpoints_store_what_has_changed_and_read_each_byte_of_output_once(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_CHECKPOINT_SECS", (0.1, 0.1, 1.0))
    monkeypatch.setattr(results, "FIRST_CHECKPOINT_SECS", 0.05)
    stored: list[str] = []
    really = FileStore.put

    def put(store, key, source, size):
        stored.append(key)
        really(store, key, source, size)

    monkeypatch.setattr(FileStore, "put", put)
    go = tmp_path / "go"
    script = f"""
import os, pathlib, time
pathlib.Path("../tmp").write_text("m")
os.rename("../tmp", "../modeldir/m")
while not pathlib.Path({str(go)!r}).exists():
    print('{{"experiment": {{"time": %f}}}}' % time.time(), flush=True)
    time.sleep(0.02)
"""
    async with daemon(tmp_path) as it:
        await it.submit(script)
        await it.until(lambda: sum("scrape-host" in key for key in stored) >= 6)
        await it.until(lambda: stored.count("experiments/exp/output.tar") >= 4)
        go.touch()
        await it.settled()
        assert stored.count("experiments/exp/modeldir.tar") == 1
        read = re.search(rb"^runner_scrape_bytes_total (\S+)$", it.service._metrics.render(), re.MULTILINE)
        assert read is not None
        assert float(read[1]) == len(it.output())


async def test_a_message_that_the_runner_stumbles_over_is_not_tried_for_ever(tmp_path, monkeypatch):
    def stumble(_):
        raise RecursionError("a defect")

    monkeypatch.setattr(decode, "decode", stumble)
    async with daemon(tmp_path) as it:
        await publish(it, b"{}")
        await it.until(it.dead)
        await it.settled()
        assert [(each["reason"], each["attempts"]) for each in it.dead()] == [("runner", 3)]
