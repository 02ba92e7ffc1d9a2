"""What becomes of each message: INTEROP.md section 10, column REC, and DESIGN.md section 4."""

from __future__ import annotations

import asyncio
import json
import re
import tarfile
import time
import urllib.request

import pytest

from runner.daemon import queuestate
from runner.queues.memory import MemoryBackend
from tests.integration.harness import LIMIT_SECS, daemon, not_before_it_printed


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch):
    monkeypatch.setattr(queuestate, "FIRST_BACKOFF_SECS", 0.05)
    monkeypatch.setattr(queuestate, "LAST_BACKOFF_SECS", 0.2)


async def test_success_is_acknowledged_after_everything_is_stored(tmp_path):
    script = """
import json, pathlib
print("hello")
print(json.dumps({"experiment": {"loss": 0.5}}))
pathlib.Path("../modeldir/model").write_text("m")
"""
    async with daemon(tmp_path) as it:
        await it.submit(script, project="p")
        await it.settled()
        assert it.output() == 'hello\n{"experiment": {"loss": 0.5}}\n'
        assert (it.storage / "experiments/exp/modeldir.tar").exists()
        assert not (it.storage / "experiments/exp/retval.tar").exists()
        (document,) = it.documents()
        assert document["studioml"]["status"] == "completed"
        assert document["studioml"]["experiment"] == "exp"
        assert document["experiment"] == {"loss": 0.5}
        assert document["runner"]["attempt"] == 1
        names = sorted(path.name.split("-host-")[0] for path in it.storage.glob("metadata/*"))
        assert names == ["output", "runner", "scrape"]
        records = [
            json.loads(line)
            for line in next(it.storage.glob("metadata/runner-host-*")).read_text().splitlines()
        ]
        assert {record["run"] for record in records} == {records[0]["run"]}
        assert not it.dead()
        assert not it.runs


async def test_a_run_is_measured_from_its_submission_to_its_end(tmp_path):
    async with daemon(tmp_path) as it:
        await it.submit("print('x')", time_added=time.time() - 5)
        await it.until(lambda: b"\nrunner_experiments_finished_total{" in it.service._metrics.render())
        told = it.service._metrics.render().decode()
        for stage in ("starting", "staging", "environment", "running", "uploading"):
            assert f'runner_stage_duration_seconds_count{{stage="{stage}"}} 1.0\n' in told
        waited = re.search(r"^runner_queue_wait_seconds_sum (\S+)$", told, re.MULTILINE)
        assert waited is not None
        assert float(waited[1]) >= 5
        for counted in ('deliveries_total{outcome="ack"}', "attempts_total", "upload_bytes_total"):
            assert f"\nrunner_{counted} " in told
        assert 'runner_experiments_finished_total{reason="exit",status="completed"} 1.0\n' in told
        assert "\nrunner_experiments_running 0.0\n" in told


async def test_a_workload_that_fails_by_itself_is_final(tmp_path):
    async with daemon(tmp_path) as it:
        await it.submit("import sys; print('no'); sys.exit(3)")
        await it.settled()
        (document,) = it.documents()
        assert (document["studioml"]["status"], document["studioml"]["reason"]) == ("failed", "exit")
        assert document["studioml"]["exit_code"] == 3
        assert it.output() == "no\n"  # the runner has not failed it, and adds nothing


async def test_a_workload_that_fails_is_tried_again_when_the_operator_asks_for_it(tmp_path):
    async with daemon(tmp_path, runs={"retries": 1}) as it:
        await it.submit("import sys; sys.exit(3)")
        await it.settled()
        assert [document["runner"]["attempt"] for document in it.documents()] == [1, 2]


async def test_a_workload_that_is_killed_by_somebody_else(tmp_path):
    async with daemon(tmp_path) as it:
        await it.submit("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        await it.settled()
        (document,) = it.documents()
        assert (document["studioml"]["status"], document["studioml"]["reason"]) == ("failed", "signal")


@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"[]", b'{"experiment": {"key": 1}}', b'{"experiment": {"key": "k"}}']
)
async def test_what_is_no_request_is_dead_lettered(tmp_path, body):
    async with daemon(tmp_path) as it:
        it.queue.declare("rmq_a")
        await it.queue.publish(it.queue.ref("rmq_a"), body)
        await it.until(it.dead)
        await it.settled()
        (letter,) = it.dead()
        assert letter["reason"] in {"malformed", "unsupported"}


async def test_a_missing_input_is_tried_three_times_and_says_why_each_time(tmp_path):
    async with daemon(tmp_path) as it:
        body = it.message("print()")
        (it.storage / "exp-ws.tar").unlink()
        it.queue.declare("rmq_a")
        await it.queue.publish(it.queue.ref("rmq_a"), body)
        await it.until(it.dead)
        await it.settled()
        (letter,) = it.dead()
        assert (letter["reason"], letter["attempts"]) == ("artifact", 3)
        assert [document["studioml"]["status"] for document in it.documents()] == ["failed"] * 3
        assert it.output().startswith("studio-runner: ")


async def test_a_hostile_archive_is_refused_at_once(tmp_path):
    async with daemon(tmp_path) as it:
        body = it.message("print()")
        with tarfile.open(it.storage / "exp-ws.tar", "w") as archive:
            archive.addfile(tarfile.TarInfo("../escaped"))
        it.queue.declare("rmq_a")
        await it.queue.publish(it.queue.ref("rmq_a"), body)
        await it.until(it.dead)
        await it.settled()
        assert (it.dead()[0]["reason"], it.dead()[0]["attempts"]) == ("archive", 1)


async def test_what_never_fits_is_left_to_other_hosts_and_never_counts(tmp_path):
    async with daemon(tmp_path) as it:
        await it.submit("print()", resources_needed={"gpus": 1})
        await it.until(lambda: any(each.redelivered for each in it.queue.broker.queues["rmq_a"].ready))
        assert not it.dead()
        assert not it.documents()
        await it.submit("print('small')", key="small", queue="rmq_b")
        await it.until(it.documents)
        it.queue.delete("rmq_a")


async def test_expired_before_it_could_start(tmp_path):
    async with daemon(tmp_path) as it:
        await it.submit("print('never')", time_added=time.time() - 60, config={"experimentLifetime": "10s"})
        await it.settled()
        (document,) = it.documents()
        assert (document["studioml"]["status"], document["studioml"]["reason"]) == ("failed", "expired")
        assert "never" not in it.output().splitlines()[0:1]
        assert not it.dead()


async def test_a_run_that_takes_longer_than_it_may_is_ended_and_final(tmp_path, monkeypatch):
    script = "import time; print('begun', flush=True); time.sleep(600)"
    async with daemon(tmp_path) as it:
        not_before_it_printed(it, monkeypatch)
        await it.submit(script, max_duration="1s")
        await it.settled()
        (document,) = it.documents()
        assert (document["studioml"]["status"], document["studioml"]["reason"]) == ("failed", "timeout")
        assert it.output().splitlines()[0] == "begun"
        assert it.output().splitlines()[-1].startswith("studio-runner: ")
        assert not it.dead()


async def test_the_same_bytes_published_again_run_again(tmp_path):
    async with daemon(tmp_path) as it:
        body = await it.submit("print(1)")
        for _ in range(4):
            await it.queue.publish(it.queue.ref("rmq_a"), body)
        await it.until(lambda: len(it.documents()) == 5)
        await it.settled()
        assert not it.dead()


async def test_a_dead_letter_that_cannot_be_written_keeps_the_message(tmp_path):
    async with daemon(tmp_path) as it:
        state = it.config.paths.state_dir
        await it.until(state.exists)
        (state / "dead-letter").write_text("in the way")
        it.queue.declare("rmq_a")
        await it.queue.publish(it.queue.ref("rmq_a"), b"nonsense")
        await it.until(lambda: len(it.queue._delayed))
        assert b"nonsense" in {message.body for _, message in it.queue._delayed.values()}


async def test_a_dead_letter_that_is_sent_again_runs_also_when_another_host_has_put_it_back(tmp_path):
    class Elsewhere(MemoryBackend):
        async def publish(self, queue, body):
            await super().publish(queue, body)
            self.broker.queues[queue.name].ready[-1].redelivered = marked

    queue, marked = Elsewhere(), False
    archive = tmp_path / "storage" / "exp-ws.tar"
    async with daemon(tmp_path, queue) as it:
        body = it.message("print('ran')")
        whole = archive.read_bytes()
        with tarfile.open(archive, "w") as tar:
            tar.addfile(tarfile.TarInfo("../escaped"))
        queue.declare("rmq_a")
        await queue.publish(queue.ref("rmq_a"), body)
        await it.until(it.dead)
        await it.settled()
        archive.write_bytes(whole)
        marked = True
        (letter,) = it.config.paths.state_dir.glob("dead-letter/*/*.json")
        address = json.loads((it.config.paths.working_dir / "studio-runner.json").read_text())["address"]
        again = urllib.request.Request(f"http://{address}/api/dead-letters/{letter.stem}", method="POST")
        await asyncio.to_thread(lambda: urllib.request.urlopen(again, timeout=LIMIT_SECS).close())
        await it.settled()
        assert it.output() == "ran\n"
        assert not it.dead()


async def test_a_message_without_metadata_artifact_runs_and_gets_no_objects(tmp_path):
    async with daemon(tmp_path) as it:
        body = json.loads(it.message("print('x')"))
        del body["experiment"]["artifacts"]["_metadata"]
        it.queue.declare("rmq_a")
        await it.queue.publish(it.queue.ref("rmq_a"), json.dumps(body).encode())
        await it.until((it.storage / "experiments/exp/output.tar").exists)
        await it.settled()
        assert not it.documents()


async def test_directories_of_runs_stay_for_who_wants_to_look_into_them(tmp_path):
    async with daemon(tmp_path, paths={"keep_runs": True}) as it:
        await it.submit("print('seen')")
        await it.until(it.documents)
        assert it.printed() == b"seen\n"
    async with daemon(tmp_path, paths={"keep_runs": True}) as it:
        await it.until((it.config.paths.working_dir / "studio-runner.json").exists)
        assert it.printed() == b"seen\n"
    async with daemon(tmp_path) as it:
        await it.until((it.config.paths.working_dir / "studio-runner.json").exists)
        assert not it.runs


@pytest.mark.parametrize("there_before", [False, True])
async def test_a_temporary_cache_goes_with_the_daemon_that_made_it(tmp_path, there_before):
    cache = tmp_path / "cache"
    if there_before:
        cache.mkdir()
    async with daemon(tmp_path, cache={"directory": cache, "size_bytes": 1 << 30, "temporary": True}) as it:
        await it.until((it.config.paths.working_dir / "studio-runner.json").exists)
        assert cache.is_dir()
        (cache / "entry").touch()
    assert cache.exists() == there_before


async def test_secrets_of_the_message_are_nowhere(tmp_path):
    script = "import os; print(os.environ['AWS_SECRET_ACCESS_KEY'][::-1] == 'vne-ni-yranac')"
    env = {"AWS_SECRET_ACCESS_KEY": "canary-in-env", "AWS_ACCESS_KEY_ID": "canary-key-id"}
    async with daemon(tmp_path, runs={"metadata_store": f"file://{tmp_path}/manifests"}) as it:
        await it.submit(script, config={"env": env, "cloud": {"queue": {"rmq": "amqp://u:canary-amqp@h/"}}})
        await it.settled()
        assert it.output() == "True\n"
        seen = [path for path in tmp_path.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
        assert seen == []
        (manifest,) = (tmp_path / "manifests").rglob("*.json")
        assert manifest.parent.parent.name == "_"
        assert json.loads(manifest.read_text())["status"] == "completed"
