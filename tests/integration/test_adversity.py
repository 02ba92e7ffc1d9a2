"""What goes wrong at the worst moment: no message is lost, no result overwritten, no document left saying that it runs."""

from __future__ import annotations

import asyncio
import collections
import json
import signal
import threading
import time

import pytest

from runner import errors
from runner.daemon import dispatch, gates, interrupted, queuestate, service, settle
from runner.daemon.attempts import Ledger
from runner.daemon.runstate import RunStates
from runner.experiment import results
from runner.queues.memory import MemoryBackend, _MemoryConsumer
from runner.request import decode
from runner.storage.base import Forbidden
from runner.storage.files import FileStore
from tests.integration.harness import LIMIT_SECS, daemon
from tests.integration.test_fairness import explained

WAIT = "import pathlib, time; print('begun', flush=True)\nwhile not pathlib.Path('{go}').exists(): time.sleep(0.02)\nprint('done')"
LONG = "import time; print('begun', flush=True); time.sleep(600)"
#: Waits for a file, and has something to store meanwhile.
TRAINS = (
    "import pathlib, time; m = pathlib.Path('../modeldir/m'); m.write_text('early'); print('begun', flush=True)\n"
    "while not pathlib.Path('{go}').exists(): time.sleep(0.02)\n"
    "m.write_text('final'); print('done')"
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(queuestate, "FIRST_BACKOFF_SECS", 0.05)
    monkeypatch.setattr(queuestate, "LAST_BACKOFF_SECS", 0.2)
    monkeypatch.setattr(dispatch, "EXISTENCE_SECS", 0.1)
    monkeypatch.setattr(gates, "LINGER_SECS", 0.05)
    monkeypatch.setattr(dispatch, "RECONSUME_SECS", 0.05)
    monkeypatch.setattr(results, "FIRST_CHECKPOINT_SECS", 0.05)
    monkeypatch.setattr(results, "FIRST_RETRY_SECS", 0.05)
    monkeypatch.setattr(results, "LAST_RETRY_SECS", 0.2)


class Storage:
    """What `FileStore.put` does in this test: fails as told, or waits."""

    def __init__(self, monkeypatch) -> None:
        self.fails: dict[str, Exception] = {}  # a part of the key -> what is raised
        self.waits: dict[str, threading.Event] = {}  # a part of the key -> an event that is waited for
        self.failed: collections.Counter[str] = collections.Counter()
        self.arrived = threading.Event()
        self.stored: list[str] = []
        really = FileStore.put

        def put(store, key, source, size):
            for part, event in list(self.waits.items()):
                if part in key:
                    self.arrived.set()
                    assert event.wait(LIMIT_SECS)
            for part, error in list(self.fails.items()):
                if part in key:
                    self.failed[part] += 1
                    raise error
            really(store, key, source, size)
            self.stored.append(key)

        monkeypatch.setattr(FileStore, "put", put)


@pytest.fixture
def storage(monkeypatch):
    return Storage(monkeypatch)


AWAY = errors.StorageUnavailable("the server does not answer", endpoint="elsewhere")


# -- what is stored, and in which order


@pytest.mark.parametrize("slow", ["modeldir.tar", "metadata/scrape-"])
async def test_a_checkpoint_in_progress_never_overtakes_the_final_results(
    tmp_path, storage, monkeypatch, slow
):
    monkeypatch.setattr(decode, "_CHECKPOINT_SECS", (0.1, 0.1, 1.0))
    go, late = tmp_path / "go", threading.Event()
    async with daemon(tmp_path) as it:
        storage.waits[slow] = late
        await it.submit(TRAINS.format(go=go))
        await it.until(storage.arrived.is_set)
        storage.waits.clear()  # only what is on its way now is slow
        go.touch()
        await it.until(lambda: b"done" in it.printed())
        await asyncio.sleep(1.0)  # time enough for the final ones, if they did not wait
        late.set()
        await it.settled()
        await it.until(lambda: sum(slow in key for key in storage.stored) >= 2)
        assert it.documents()[0]["studioml"]["status"] == "completed"
        assert b"final" in (it.storage / "experiments/exp/modeldir.tar").read_bytes()


async def test_while_results_are_stored_the_next_one_runs_and_no_more_than_there_are_cores_wait_so(
    tmp_path, storage
):
    whole = {"cpus": 2}
    async with daemon(tmp_path) as it:
        stored = {key: threading.Event() for key in ("one", "two", "three")}
        for key, event in stored.items():
            storage.waits[f"experiments/{key}/output.tar"] = event
        for key in (*stored, "four"):
            await it.submit("print('x')", key=key, resources_needed=whole)
        await it.until(lambda: [bool(run.outcome) for run in states(it)] == [True] * 3)
        # The third one waits with its part of the machine; there is no room for the fourth.
        await explained(it, "rmq_a", lambda told: told["closed_because"] == "no core is free")
        assert it.queue.depth("rmq_a") == 1
        for event in stored.values():
            event.set()
        await it.settled()
        assert [each["studioml"]["status"] for each in it.documents()] == ["completed"] * 4


async def test_results_that_are_refused_end_the_document_and_are_kept_for_the_message(tmp_path, storage):
    script = "import pathlib; pathlib.Path('../modeldir/m').write_text('x'); print('once')"
    async with daemon(tmp_path) as it:
        storage.fails["modeldir.tar"] = Forbidden("no")
        body = await it.submit(script)
        (letter,) = await it.until(it.dead)
        await it.until(lambda: not it.queue.held)
        assert "kept in" in letter["text"]
        assert [each["studioml"]["status"] for each in it.documents()] == ["failed"]
        storage.fails.clear()
        ran = it.printed()
        await it.queue.publish(it.queue.ref("rmq_a"), body)  # as the operator does who has mended it
        await it.settled()
        assert (it.storage / "experiments/exp/modeldir.tar").exists()
        assert it.output() == ran.decode()  # not run again
        assert [each["studioml"]["status"] for each in it.documents()] == ["failed", "completed"]
        assert not it.runs


async def test_the_operators_metadata_store_decides_nothing(tmp_path, storage):
    async with daemon(tmp_path, runs={"metadata_store": f"file://{tmp_path}/manifests"}) as it:
        storage.fails["_/exp"] = Forbidden("no")
        await it.submit("print('x')")
        await it.settled()
        assert not it.dead()
        assert it.documents()[0]["studioml"]["status"] == "completed"


async def test_deleting_the_queue_while_results_wait_for_storage_gives_none_of_them_up(
    tmp_path, storage, monkeypatch
):
    async with daemon(tmp_path) as it:
        storage.fails["output.tar"] = AWAY
        await it.submit("print('x')")
        await it.until(lambda: [state.outcome for state in states(it)] not in ([], [None]))
        seen, cancel = asyncio.Event(), dispatch.Dispatcher._cancel_runs_of

        def cancel_and_tell(*args):
            cancel(*args)
            seen.set()

        monkeypatch.setattr(dispatch.Dispatcher, "_cancel_runs_of", cancel_and_tell)
        it.queue.delete("rmq_a")
        await asyncio.wait_for(seen.wait(), LIMIT_SECS)
        storage.fails.clear()
        await it.until(lambda: not it.runs)
        assert it.output() == "x\n"
        assert it.documents()[0]["studioml"]["status"] == "completed"


async def test_a_failed_attempt_whose_storage_was_away_does_not_run_for_ever_in_its_document(
    tmp_path, storage, monkeypatch
):
    go = tmp_path / "go"
    async with daemon(tmp_path, runs={"grace_secs": 0.5}) as it:
        await it.submit(WAIT.format(go=go))
        await it.until(lambda: [each["studioml"]["status"] for each in it.documents()] == ["running"])
        storage.fails["scrape-"] = AWAY
        it.service.stop.ask(signal.SIGTERM)
        await asyncio.wait_for(it.task, LIMIT_SECS)
    assert [state.corrected for state in states(it)] == [True]  # the attempt that was none is taken back once
    storage.fails.clear()
    async with daemon(tmp_path) as it:
        await it.until(lambda: [each["studioml"]["status"] for each in it.documents()] == ["stopped"])
        await it.until(lambda: not it.runs)


async def test_documents_of_interrupted_runs_wait_for_their_storage_and_not_for_each_other(
    tmp_path, storage, monkeypatch
):
    monkeypatch.setattr(interrupted, "RETRY_SECS", 0.01)
    monkeypatch.setattr(interrupted, "LAST_RETRY_SECS", 0.05)
    async with daemon(tmp_path, drain=False) as it:
        for key in ("first", "second"):
            await it.submit(WAIT.format(go=tmp_path / "go"), key=key)
        await it.until(lambda: [each["studioml"]["status"] for each in it.documents()] == ["running"] * 2)
        keys = [f"metadata/{path.name}" for path in sorted(it.storage.glob("metadata/scrape-*"))]
    storage.fails[keys[0]] = AWAY
    async with daemon(tmp_path) as it:
        await it.until(lambda: [d["studioml"]["status"] for d in it.documents()] == ["running", "stopped"])
        await it.until(lambda: storage.failed[keys[0]] > 20)
        storage.fails.clear()
        await it.until(lambda: [d["studioml"]["status"] for d in it.documents()] == ["stopped", "stopped"])
        await it.until(lambda: not it.runs)


async def test_what_was_stored_for_good_is_not_touched_after_a_restart(tmp_path, monkeypatch):
    """Killed between the last upload and the acknowledgement; meanwhile somebody has annotated the document."""
    queue = MemoryBackend()
    async with daemon(tmp_path, queue) as it:
        hold = asyncio.Event()
        monkeypatch.setattr(settle.Settler, "settle", lambda *_: hold.wait())
        await it.submit("print('x')")
        (document,) = await it.until(
            lambda: [d for d in it.documents() if d["studioml"]["status"] == "completed"]
        )
        it.service.stop.ask(15)
        it.service.stop.ask(15)
        await asyncio.wait_for(it.task, LIMIT_SECS)
    monkeypatch.undo()
    (path,) = it.storage.glob("metadata/scrape-*")
    document["experiment"]["annotated"] = True
    path.write_text(json.dumps(document))
    async with daemon(tmp_path, MemoryBackend(broker=queue.broker)) as it:
        await it.settled()
        assert it.documents() == [document]


async def test_inputs_that_were_never_complete_are_not_stored_after_a_restart(tmp_path, storage, monkeypatch):
    """Of an attempt that expired before its inputs were there, nothing but the output is stored: also by the next daemon."""
    queue = MemoryBackend()
    async with daemon(tmp_path, queue) as it:
        storage.fails["output.tar"] = AWAY
        await it.submit("print()", time_added=time.time() - 60, config={"experimentLifetime": "10s"})
        (run,) = await it.until(lambda: [p for p in it.runs if list(p.glob("experiments/*/output/output"))])
        (inner,) = run.glob("experiments/*")
        (inner / "modeldir").mkdir(exist_ok=True)
        (inner / "modeldir" / "half").write_text("of an input")
        await it.until(lambda: states(it)[0].outcome)
        it.service.stop.ask(15)
        it.service.stop.ask(15)
        await asyncio.wait_for(it.task, LIMIT_SECS)
    storage.fails.clear()
    async with daemon(tmp_path, MemoryBackend(broker=queue.broker)) as it:
        await it.settled()
        assert "lifetime" in it.output()
        assert not (it.storage / "experiments/exp/modeldir.tar").exists()


async def test_a_pipe_in_place_of_the_output_stops_nothing(tmp_path):
    script = "import os; os.remove('../output/output'); os.mkfifo('../output/output'); print(1)"
    async with daemon(tmp_path) as it:
        await it.submit(script, max_duration="20s")
        await it.settled()
        assert it.documents()[0]["studioml"]["status"] == "completed"


# -- the same bytes more than once


async def test_a_new_message_of_finished_bytes_survives_the_runner(tmp_path):
    queue = MemoryBackend()
    go = tmp_path / "go"
    go.touch()
    async with daemon(tmp_path, queue) as it:
        body = await it.submit(WAIT.format(go=go))
        await it.settled()
        go.unlink()
        await it.queue.publish(it.queue.ref("rmq_a"), body)
        await it.until(lambda: it.printed() and it.queue.held)
        it.service.stop.ask(15)
        it.service.stop.ask(15)
        await asyncio.wait_for(it.task, LIMIT_SECS)
    go.touch()
    async with daemon(tmp_path, MemoryBackend(broker=queue.broker)) as it:
        await it.settled()
        await it.until(lambda: [d["studioml"]["status"] for d in it.documents()].count("completed") == 2)


async def test_an_equal_message_that_was_put_back_is_no_second_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(queuestate, "PARK_SECS", 0.1)
    monkeypatch.setattr(gates, "LINGER_SECS", 60.0)
    go = tmp_path / "go"
    async with daemon(tmp_path, machine={"max_cores": 2}) as it:
        body = await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        await it.submit(WAIT.format(go=go), key="other", queue="rmq_b")
        await it.until(lambda: it.printed().count(b"begun") == 2)
        await it.queue.publish(it.queue.ref("rmq_a"), body)
        await it.until(lambda: any(message.redelivered for message in it.queue.broker.queues["rmq_a"].ready))
        go.touch()
        await it.settled()
        assert [each["studioml"]["experiment"] for each in it.documents()].count("exp") == 2


async def test_equal_messages_that_die_together_have_had_one_attempt_each(tmp_path):
    queue = MemoryBackend()
    async with daemon(tmp_path, queue, machine={"max_cores": 2}) as it:
        body = await it.submit(LONG)
        await it.queue.publish(it.queue.ref("rmq_a"), body)
        await it.until(lambda: it.printed().count(b"begun") == 2)
        written = {path: path.read_bytes() for path in (it.config.paths.state_dir / "runs").iterdir()}
        it.service.stop.ask(15)
        it.service.stop.ask(15)
        await asyncio.wait_for(it.task, LIMIT_SECS)
        for path, content in written.items():  # as if it had been killed
            path.write_bytes(content)
    async with daemon(tmp_path, MemoryBackend(broker=queue.broker), drain=False) as it:
        assert await it.until(lambda: len(attempts(it)) == 2 and attempts(it)) == [2, 2]
        assert not it.dead()


def attempts(it):
    """The attempts whose workloads run now."""
    return [each.attempt for each in states(it) if each.outcome is None and each.started > it.began]


def states(it):
    return RunStates(it.config.paths.state_dir / "runs").load()


# -- what the disk refuses


async def test_a_disk_that_fills_up_at_the_end_of_a_run_costs_no_results(tmp_path, monkeypatch):
    go = tmp_path / "go"
    async with daemon(tmp_path) as it:
        await it.submit(WAIT.format(go=go))
        await it.until(lambda: it.printed() and it.documents())  # the next document is the final one

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(RunStates, "save", full)
        for private in it.runs[0].glob("_runner"):
            for name in ("scrape.partial", "scrape.json"):
                (private / name).unlink(missing_ok=True)
            (private / "scrape.partial").mkdir()  # nobody can write a document there
        go.touch()
        await it.settled()
        assert not it.dead()
        (document,) = it.documents()
        assert (document["studioml"]["status"], document["runner"]["attempt"]) == ("completed", 1)
        assert it.output() == "begun\ndone\n"


async def test_a_ledger_that_cannot_be_written_ends_what_runs_and_starts_nothing(tmp_path, monkeypatch):
    go, opened = tmp_path / "go", []

    def opens(path):
        opened.append(Ledger(path))
        return opened[0]

    monkeypatch.setattr(service, "Ledger", opens)
    async with daemon(tmp_path) as it:
        await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        (ledger,) = opened
        ledger._db.execute("PRAGMA query_only=1")
        go.touch()
        await it.settled()
        assert it.output() == "begun\ndone\n"
        await it.queue.publish(it.queue.ref("rmq_a"), it.message("print('next')", "next"))
        await it.until(it.came_back)
        assert not it.runs  # and no directory of it is left
        assert len(it.documents()) == 1
        ledger._db.execute("PRAGMA query_only=0")
        await it.settled()
        assert it.documents()[-1]["runner"]["attempt"] == 1


async def test_a_state_that_cannot_be_saved_starts_nothing_and_leaves_nothing(tmp_path, monkeypatch):
    really, broken = RunStates.save, threading.Event()
    broken.set()

    def save(states, state):
        if broken.is_set():
            raise OSError(28, "No space left on device")
        really(states, state)

    monkeypatch.setattr(RunStates, "save", save)
    async with daemon(tmp_path) as it:
        await it.submit("print(1)")
        await it.until(it.came_back)
        assert not it.runs
        broken.clear()
        await it.settled()
        assert it.documents()[0]["runner"]["attempt"] == 1


# -- the daemon itself


async def test_a_service_that_fails_ends_the_daemon_and_loses_no_run(tmp_path, monkeypatch):
    queue = MemoryBackend()

    def broken(*_):
        raise RuntimeError("a defect")

    async with daemon(tmp_path, queue) as it:
        await it.submit(LONG)
        await it.until(it.printed)
        monkeypatch.setattr(dispatch.Dispatcher, "_cancel_runs_of", broken)
        existence = MemoryBackend.existence
        monkeypatch.setattr(MemoryBackend, "existence", broken)
        with pytest.raises(RuntimeError, match="a defect"):
            await asyncio.wait_for(asyncio.shield(it.task), LIMIT_SECS)
        monkeypatch.setattr(MemoryBackend, "existence", existence)
        it.task = asyncio.create_task(asyncio.sleep(0, 0))
    assert queue.depth("rmq_a") == 1
    async with daemon(tmp_path, MemoryBackend(broker=queue.broker), drain=False) as it:
        await it.until(
            lambda: it.printed() and it.queue.held
        )  # it runs again; nothing says that it has failed
        assert not [d for d in it.documents() if d["studioml"].get("reason") == "signal"]


async def test_a_consumer_that_fails_is_opened_again(tmp_path, monkeypatch):
    really, calls = MemoryBackend.consumer, []

    async def consumer(self, queue):
        calls.append(queue)
        if len(calls) == 1:
            raise RuntimeError("a defect of the adapter")
        return await really(self, queue)

    monkeypatch.setattr(MemoryBackend, "consumer", consumer)
    async with daemon(tmp_path) as it:
        await it.submit("print(1)")
        await it.settled()
        assert len(calls) == 2
        assert [each["studioml"]["status"] for each in it.documents()] == ["completed"]


async def test_a_message_that_comes_while_its_queue_is_left_goes_back(tmp_path, monkeypatch):
    """The wait for it had ended, and its worker was cancelled before it could look."""
    came = asyncio.Event()
    really = _MemoryConsumer.next

    async def next_(self):
        delivery = await really(self)
        came.set()
        return delivery

    monkeypatch.setattr(_MemoryConsumer, "next", next_)
    queue = MemoryBackend()
    async with daemon(tmp_path, queue) as it:
        it.queue.declare("rmq_a")
        await it.listening("rmq_a")
        body = it.message("print(1)")
        await queue.publish(queue.ref("rmq_a"), body)
        await came.wait()
        for task in asyncio.all_tasks():
            if task.get_name().startswith("queue "):
                task.cancel()
        await it.until(lambda: not queue.held)
        assert queue.depth("rmq_a") == 1 or it.documents()


async def test_closing_a_queue_and_draining_at_once_ends(tmp_path, monkeypatch):
    slow = asyncio.Event()
    really = _MemoryConsumer.next

    async def next_(self):
        try:
            return await really(self)
        except asyncio.CancelledError:
            slow.set()
            await asyncio.sleep(0.2)  # a consumer that takes its time to let go
            raise

    monkeypatch.setattr(_MemoryConsumer, "next", next_)
    go = tmp_path / "go"
    async with daemon(tmp_path, machine={"max_cores": 1}) as it:
        it.queue.declare("rmq_b")
        await it.listening("rmq_b")
        await it.submit(WAIT.format(go=go))
        await slow.wait()  # no core is left: the queue is being closed
        it.service.stop.ask(signal.SIGTERM)
        go.touch()
        assert await asyncio.wait_for(it.task, LIMIT_SECS) == 0


async def test_no_more_tasks_are_started_than_the_limit_says(tmp_path):
    async with daemon(tmp_path, limits={"tasks": 2, "interval_secs": 0.05}, runs={"grace_secs": 0.0}) as it:
        for queue in ("rmq_a", "rmq_b"):
            for number in range(5):
                await it.submit("import time; time.sleep(1.5)", key=f"{queue}{number}", queue=queue)
        assert await asyncio.wait_for(it.task, LIMIT_SECS) == 0
        # Those that had started were let finish: a limit is no signal, and --grace is for signals.
        assert [each["studioml"]["status"] for each in it.documents()] == ["completed"] * 2


async def test_what_is_parked_when_the_limit_is_reached_goes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "LINGER_SECS", 60.0)
    go = tmp_path / "go"
    queues = ("rmq_a", "rmq_b", "rmq_c")
    limits = {"tasks": 2, "interval_secs": 60.0}
    async with daemon(tmp_path, limits=limits, machine={"max_cores": 1}) as it:
        for queue in queues:
            it.queue.declare(queue)
        await it.listening(*queues)
        await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        for queue in queues[1:]:
            await it.submit(WAIT.format(go=go), key=queue, queue=queue)
        await it.until(lambda: len(it.queue.held) == 3)
        go.touch()
        await it.until(lambda: not it.queue.held and not it.runs)
        assert len(it.documents()) == 2
        assert sum(it.queue.depth(queue) for queue in queues) == 1


async def test_the_first_signal_after_a_limit_is_the_first_signal(tmp_path):
    go = tmp_path / "go"
    async with daemon(tmp_path, limits={"tasks": 1, "interval_secs": 0.05}) as it:
        await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        await it.until(it.service.stop.drain.is_set)
        it.service.stop.ask(signal.SIGTERM)
        await asyncio.sleep(0.3)
        go.touch()
        assert await asyncio.wait_for(it.task, LIMIT_SECS) == 0
        assert it.output() == "begun\ndone\n"


async def test_a_forced_stop_is_no_attempt(tmp_path):
    queue = MemoryBackend()
    for _ in range(4):
        async with daemon(tmp_path, MemoryBackend(broker=queue.broker)) as it:
            if not queue.broker.queues:
                await it.submit(LONG)
            assert await it.until(lambda: it.queue.held and attempts(it)) == [1]
            it.service.stop.ask(15)
            it.service.stop.ask(15)
            await asyncio.wait_for(it.task, LIMIT_SECS)
    async with daemon(tmp_path, MemoryBackend(broker=queue.broker), drain=False) as it:
        await it.until(lambda: [d["studioml"].get("reason") for d in it.documents()][:4] == ["drained"] * 4)
        assert not it.dead()


async def test_as_many_retries_as_the_operator_asks_for(tmp_path):
    async with daemon(tmp_path, runs={"retries": 4}) as it:
        await it.submit("import sys; sys.exit(3)")
        await it.settled()
        assert [document["runner"]["attempt"] for document in it.documents()] == [1, 2, 3, 4, 5]
        assert not it.dead()


async def test_large_documents_are_not_kept_in_memory(tmp_path, monkeypatch):
    script = "import json; print(json.dumps({'experiment': {'x': 'y' * 1000000}})); print(json.dumps({'experiment': {'z': 1}}))"
    made, really = [], settle.Settler.__init__

    def init(settler, **values):
        really(settler, **values)
        made.append(settler)

    monkeypatch.setattr(settle.Settler, "__init__", init)
    async with daemon(tmp_path) as it:
        await it.submit(script)
        await it.settled()
        assert len(it.documents()[0]["experiment"]["x"]) == 1000000
        (settler,) = made
        assert len(json.dumps(list(settler.recent), default=str)) < 100_000
