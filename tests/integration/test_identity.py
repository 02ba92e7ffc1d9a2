"""A queue is the same one whatever the account is called by which it is seen: DESIGN.md 5.3, rule 3."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from runner.credentials import watch
from runner.daemon import dispatch, gates, settle
from runner.daemon.attempts import Ledger
from runner.queues.memory import MemoryBackend
from tests.integration.harness import LIMIT_SECS, daemon

WAIT = "import pathlib, time; print('begun', flush=True)\nwhile not pathlib.Path('{go}').exists(): time.sleep(0.02)\nprint('done')"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(watch, "LOOK_SECS", 0.02)
    monkeypatch.setattr(dispatch, "EXISTENCE_SECS", 0.1)
    monkeypatch.setattr(gates, "LINGER_SECS", 0.05)


@pytest.fixture
def certs(tmp_path):
    """A directory of credentials; any path stands for the one broker there is."""
    directory = tmp_path / "certs"
    directory.mkdir()
    return directory


async def test_a_run_whose_credentials_file_was_renamed_keeps_its_message(tmp_path, certs):
    (certs / "broker").write_text("/any")
    opened: dict[str, MemoryBackend] = {}
    async with daemon(tmp_path, certs=opened, machine={"max_cores": 1}) as it:
        await it.submit("print('begun', flush=True); import time; time.sleep(600)")
        await it.until(it.printed)
        (certs / "broker").rename(certs / "broker.yaml")
        await it.until(lambda: "broker.yaml" in opened)
        opened["broker"].break_connection()
        # Delivered again, by the new account, although the machine is full; the old one is needed no more.
        await it.until(lambda: opened["broker.yaml"].held and opened["broker"].closed)
        assert len(it.runs) == 1
        it.queue.delete("rmq_a")  # seen by the new account, too
        await it.until(lambda: not it.runs)
        (document,) = it.documents()
        assert (document["studioml"]["status"], document["studioml"]["reason"]) == (
            "stopped",
            "queue-deleted",
        )


async def test_an_adopted_message_is_of_one_run(tmp_path):
    go = tmp_path / "go"
    async with daemon(tmp_path) as it:
        await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        it.queue.break_connection()
        await it.until(lambda: it.queue.held)
        (told,) = (await it.get("/api/queues"))[1]["queues"]
        assert told["running"] == 1
        go.touch()
        await it.settled()
        async with asyncio.timeout(LIMIT_SECS):
            while (await it.get("/api/queues"))[1]["queues"][0]["running"]:
                await asyncio.sleep(0.02)  # between questions


async def test_of_two_accounts_of_a_broker_either_gets_a_lost_message_back(tmp_path, certs):
    go = tmp_path / "go"
    (certs / "new").write_text("/any")
    (certs / "old").write_text("/any")
    opened: dict[str, MemoryBackend] = {}
    async with daemon(tmp_path, certs=opened, machine={"max_cores": 1}) as it:
        await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        first = next(backend for backend in opened.values() if backend.held)
        (second,) = (backend for backend in opened.values() if backend is not first)
        first.set_away(True)  # its password is a new one
        await it.until(lambda: second.held)
        go.touch()
        await it.settled()
        await it.until(lambda: not second.held)
        assert len(it.documents()) == 1


async def test_while_draining_no_account_listens_any_more_when_the_lost_message_has_come_by_another(
    tmp_path, certs
):
    go = tmp_path / "go"
    (certs / "new").write_text("/any")
    (certs / "old").write_text("/any")
    opened: dict[str, MemoryBackend] = {}
    async with daemon(tmp_path, certs=opened) as it:
        await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        first = next(backend for backend in opened.values() if backend.held)
        (second,) = (backend for backend in opened.values() if backend is not first)
        second.set_away(True)
        it.service.stop.drain.set()
        await it.until(lambda: tasks("return ") == 2)
        first.break_connection()
        await it.until(lambda: first.held)
        await it.until(lambda: not tasks("next "))
        go.touch()
        await it.task
        assert len(it.documents()) == 1


def tasks(prefix: str) -> int:
    return sum(task.get_name().startswith(prefix) for task in asyncio.all_tasks())


async def test_what_finished_under_one_name_is_acknowledged_on_sight_under_another(tmp_path, certs):
    go = tmp_path / "go"
    (certs / "broker").write_text("/any")
    opened: dict[str, MemoryBackend] = {}
    async with daemon(tmp_path, certs=opened) as it:
        await it.submit(WAIT.format(go=go))
        await it.until(it.printed)
        opened["broker"].set_away(True)
        go.touch()
        await it.until(lambda: not it.runs)
        assert it.queue.depth("rmq_a") == 1
        (certs / "broker").rename(certs / "broker.yaml")
        await it.until(
            lambda: "broker.yaml" in opened and not it.queue.depth("rmq_a") and not opened["broker.yaml"].held
        )
        await it.until(lambda: not it.runs)
        assert len(it.documents()) == 1


async def test_attempts_that_an_older_version_counted_count(tmp_path):
    async with daemon(tmp_path) as it:
        body = it.message("print(1)")
    ledger = Ledger(it.config.paths.state_dir / "ledger.sqlite")
    for _ in range(3):
        ledger.begin("broker//rmq_a", hashlib.sha256(body).hexdigest())
    ledger.close()
    async with daemon(tmp_path, MemoryBackend("broker")) as it:
        await it.submit("print(1)")
        (letter,) = await it.until(it.dead)
        assert (letter["reason"], letter["attempts"]) == ("attempts", 3)


async def test_results_that_an_older_version_kept_are_stored_and_not_made_again(tmp_path, monkeypatch):
    queue = MemoryBackend("broker")
    async with daemon(tmp_path, queue) as it:
        never = asyncio.Event()
        monkeypatch.setattr(settle.Settler, "settle", lambda *_: never.wait())
        await it.submit("print('x')")
        (document,) = await it.until(
            lambda: [each for each in it.documents() if each["studioml"]["status"] == "completed"]
        )
        it.service.stop.ask(15)
        it.service.stop.ask(15)
        await asyncio.wait_for(it.task, LIMIT_SECS)
    monkeypatch.undo()
    (path,) = it.config.paths.state_dir.glob("runs/*.json")
    path.write_bytes(path.read_bytes().replace(queue.identity.encode(), b"broker"))
    async with daemon(tmp_path, MemoryBackend("broker", broker=queue.broker)) as it:
        await it.settled()
        assert it.documents() == [document]


async def test_a_dead_letter_goes_back_to_its_queue_by_an_account_of_another_name(tmp_path, certs):
    (certs / "broker").write_text("/any")
    opened: dict[str, MemoryBackend] = {}
    async with daemon(tmp_path, certs=opened) as it:
        it.queue.declare("rmq_a")
        await it.queue.publish(it.queue.ref("rmq_a"), b"no message")
        (letter,) = await it.until(it.dead)
        assert letter["account"] == "broker"
        (certs / "broker").rename(certs / "broker.yaml")
        await it.until(lambda: opened["broker"].closed and "broker.yaml" in opened)
        (path,) = it.config.paths.state_dir.glob("dead-letter/*/*.json")
        assert (await it.post(f"/api/dead-letters/{path.stem}"))[0] == 200
        # It is as bad as it was.
        (letter,) = await it.until(lambda: [each for each in it.dead() if each["account"] == "broker.yaml"])
        await it.until(lambda: not path.exists())
