"""Messages are held, lost, adopted, given back: DESIGN.md rules 1, 2, 3, 11 and 5.3."""

from __future__ import annotations

import asyncio
import signal

import pytest

from runner.daemon import dispatch, gates, queuestate
from runner.queues.memory import MemoryBackend
from tests.integration.harness import LIMIT_SECS, daemon

WAIT = "import pathlib, time; print('begun', flush=True)\nwhile not pathlib.Path('{go}').exists(): time.sleep(0.02)\nprint('done')"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(queuestate, "FIRST_BACKOFF_SECS", 0.05)
    monkeypatch.setattr(queuestate, "LAST_BACKOFF_SECS", 0.2)
    monkeypatch.setattr(dispatch, "EXISTENCE_SECS", 0.1)
    monkeypatch.setattr(gates, "LINGER_SECS", 0.05)


async def test_a_run_that_loses_its_message_adopts_the_redelivered_copy(tmp_path):
    go = tmp_path / "go"
    async with daemon(tmp_path) as it:
        await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        it.queue.break_connection()
        await it.until(lambda: it.queue.held)  # delivered again, and not run a second time
        assert len(it.runs) == 1
        go.touch()
        await it.settled()
        assert len(it.documents()) == 1
        assert it.output() == "begun\ndone\n"


async def test_what_finished_while_its_message_was_away_is_acknowledged_on_sight(tmp_path):
    go = tmp_path / "go"
    async with daemon(tmp_path) as it:
        await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        it.queue.set_away(True)
        go.touch()
        await it.until(lambda: not it.runs)
        assert it.queue.depth("rmq_a") == 1
        it.queue.set_away(False)
        await it.settled()
        assert len(it.documents()) == 1


async def test_draining_lets_runs_finish_and_takes_nothing_new(tmp_path):
    go = tmp_path / "go"
    async with daemon(tmp_path, machine={"max_cores": 1}) as it:
        await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        await it.submit("print('second')", key="second")
        it.service.stop.ask()
        await asyncio.sleep(0.3)
        assert not it.task.done()
        go.touch()
        assert await asyncio.wait_for(it.task, LIMIT_SECS) == 0
        assert it.output() == "begun\ndone\n"
        assert it.queue.depth("rmq_a") == 1


async def test_draining_with_a_grace_gives_the_message_back_uncounted(tmp_path):
    script = "import pathlib, time; pathlib.Path('../modeldir/half').write_text('x'); print('begun', flush=True); time.sleep(600)"
    queue = MemoryBackend()
    async with daemon(tmp_path, queue, runs={"grace_secs": 1.0}) as it:
        await it.submit(script)
        await it.until(it.printed)
        it.service.stop.ask(signal.SIGTERM)
        assert await asyncio.wait_for(it.task, LIMIT_SECS) == 0
        (document,) = it.documents()
        assert (document["studioml"]["status"], document["studioml"]["reason"]) == ("stopped", "drained")
        assert (it.storage / "experiments/exp/modeldir.tar").exists()
        assert queue.depth("rmq_a") == 1
    async with daemon(tmp_path, MemoryBackend(broker=queue.broker), runs={"grace_secs": 0.0}) as it:
        await it.until(it.printed)
        it.service.stop.ask(signal.SIGTERM)
        await asyncio.wait_for(it.task, LIMIT_SECS)
        assert it.documents()[-1]["runner"]["attempt"] == 1


async def test_a_second_signal_ends_at_once_and_the_message_comes_back(tmp_path):
    queue = MemoryBackend()
    async with daemon(tmp_path, queue) as it:
        await it.submit("import time; print('begun', flush=True); time.sleep(600)")
        await it.until(it.printed)
        it.service.stop.ask(15)
        it.service.stop.ask(15)
        assert await asyncio.wait_for(it.task, LIMIT_SECS) == 143
    assert queue.depth("rmq_a") == 1


@pytest.mark.parametrize("durable", [True, False])
async def test_deleting_the_queue_stops_its_runs_and_stores_what_there_is(tmp_path, durable):
    async with daemon(tmp_path) as it:
        it.queue.declare("rmq_a", durable=durable)
        await it.submit("import time; print('begun', flush=True); time.sleep(600)")
        await it.until(it.printed)
        it.queue.delete("rmq_a")
        await it.until(lambda: not it.runs)
        (document,) = it.documents()
        assert (document["studioml"]["status"], document["studioml"]["reason"]) == (
            "stopped",
            "queue-deleted",
        )
        assert it.output().startswith("begun\nstudio-runner: ")


async def test_a_broker_that_says_nothing_keeps_no_other_queue_from_being_cancelled(tmp_path, monkeypatch):
    class Silent(MemoryBackend):
        async def existence(self, queue):
            if queue.name == "rmq_silent":
                await asyncio.Event().wait()
            return await super().existence(queue)

    monkeypatch.setattr(dispatch, "EXISTENCE_LIMIT_SECS", 0.1)
    go = tmp_path / "go"
    async with daemon(tmp_path, Silent(), machine={"max_cores": 2}) as it:
        await it.submit(WAIT.format(go=go), key="silent", queue="rmq_silent")
        await it.submit(WAIT.format(go=go))
        await it.until(lambda: it.printed().count(b"begun") == 2)
        it.queue.delete("rmq_a")
        await it.until(lambda: "stopped" in [each["studioml"]["status"] for each in it.documents()])
        go.touch()
        await it.settled("rmq_silent")
        statuses = {each["studioml"]["experiment"]: each["studioml"]["status"] for each in it.documents()}
        assert statuses == {"exp": "stopped", "silent": "completed"}


async def test_a_transient_queue_that_was_lost_with_its_broker_kills_nothing(tmp_path):
    go = tmp_path / "go"
    async with daemon(tmp_path) as it:
        it.queue.declare("rmq_a", durable=False)
        await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        it.queue.restart_broker()
        await asyncio.sleep(10 * dispatch.EXISTENCE_SECS)
        go.touch()
        await it.until(lambda: not it.runs)
        assert it.documents()[0]["studioml"]["status"] == "completed"


async def test_a_message_that_does_not_fit_now_is_parked_and_starts_when_room_frees(tmp_path):
    go = tmp_path / "go"
    async with daemon(tmp_path, machine={"max_cores": 1}) as it:
        await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        await it.submit("print('next')", key="next", queue="rmq_b")
        go.touch()
        await it.settled("rmq_b")
        assert {document["studioml"]["experiment"] for document in it.documents()} == {"exp", "next"}


async def test_parked_too_long_it_is_put_back_once_and_not_asked_for_until_room_frees(tmp_path, monkeypatch):
    monkeypatch.setattr(queuestate, "PARK_SECS", 0.1)
    monkeypatch.setattr(gates, "LINGER_SECS", 60.0)
    go = tmp_path / "go"
    async with daemon(tmp_path, machine={"max_cores": 1}) as it:
        it.queue.declare("rmq_b")
        await it.listening("rmq_b")
        await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        await it.submit("print('next')", key="next", queue="rmq_b")
        await it.until(lambda: any(message.redelivered for message in it.queue.broker.queues["rmq_b"].ready))
        await asyncio.sleep(0.5)
        assert it.queue.depth("rmq_b") == 1
        go.touch()
        await it.settled("rmq_b")
        assert len(it.documents()) == 2


async def test_limits_end_the_daemon(tmp_path):
    async with daemon(tmp_path, limits={"tasks": 1, "interval_secs": 0.05}) as it:
        await it.submit("print()")
        assert await asyncio.wait_for(it.task, LIMIT_SECS) == 0
        assert len(it.documents()) == 1
    async with daemon(tmp_path, limits={"idle_secs": 0.2, "interval_secs": 0.05}) as it:
        assert await asyncio.wait_for(it.task, LIMIT_SECS) == 0


async def test_one_broken_account_does_not_stop_the_start(tmp_path):
    queue = MemoryBackend()
    queue.set_away(True)
    async with daemon(tmp_path, queue) as it:
        await it.until((tmp_path / "work/studio-runner.json").exists)
        assert not it.documents()
        queue.set_away(False)
        await it.submit("print()")
        await it.settled()
        assert [each["studioml"]["status"] for each in it.documents()] == ["completed"]
