"""Following by what lies in storage, and what an ending means for a program that waited."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from runner import config, errors
from runner.client import follow, views
from runner.client.api import Daemon
from runner.client.submit import Submitted
from runner.client.views import Ending, Seen, StorageView
from runner.storage.base import Location
from runner.storage.registry import Stores

ADDED = 1_700_000_000.25


@pytest.fixture
def submitted(tmp_path: Path) -> Submitted:
    bucket = tmp_path / "bucket"
    (bucket / "metadata").mkdir(parents=True)
    location = Location(scheme="file", bucket=str(bucket), key="experiments/k/_metadata.tar")
    return Submitted(
        key="k",
        queue="local_a",
        digest="d",
        time_added=ADDED,
        durable=True,
        locations={"_metadata": location},
    )


def store(submitted: Submitted, second: str, output: bytes = b"", **studioml: Any) -> None:
    """What a runner stores: the output first, then the document."""
    added = studioml.pop("added", ADDED)
    attempt = studioml.pop("attempt", 1)
    metadata = Path(submitted.locations["_metadata"].bucket, "metadata")
    (metadata / f"output-host-h-{second}.log").write_bytes(output)
    document = {
        "runner": {"attempt": attempt, "request": {"experiment": {"time_added": added}}},
        "studioml": {"experiment": "k", "status": "running"} | studioml,
    }
    (metadata / ".new").write_text(json.dumps(document))
    (metadata / ".new").replace(metadata / f"scrape-host-h-{second}.json")


async def look(view: StorageView) -> Seen | None:
    view._next = 0.0  # do not wait for the next time to look
    return await view.look()


async def test_documents_of_other_messages_are_none_of_ours(submitted: Submitted):
    view = StorageView(Stores(config.S3()), submitted)
    assert await look(view) is None
    store(submitted, "1r31eq", added=ADDED - 5, status="completed", reason="exit", exit_code=0)
    store(submitted, "1r31er", experiment="other")
    assert await look(view) is None
    store(submitted, "1r31es")
    seen = await look(view)
    assert seen is not None
    assert (seen.stage, seen.accession, seen.ending) == ("running", "h-1r31es", None)


async def test_rubbish_under_the_same_name_is_passed_over(submitted: Submitted):
    metadata = Path(submitted.locations["_metadata"].bucket, "metadata")
    for number, content in enumerate(
        (b"", b"[]", b"{", b'{"studioml": 3}', b'{"studioml": {"experiment": null}}')
    ):
        (metadata / f"scrape-host-h-{number}.json").write_bytes(content)
    assert await look(StorageView(Stores(config.S3()), submitted)) is None


@pytest.mark.parametrize(
    ("reason", "attempt", "final"),
    [
        ("exit", 1, True),
        ("timeout", 1, True),
        ("unsupported", 1, True),
        ("oom", 1, True),
        ("cancelled", 1, True),
        ("artifact", 1, False),
        ("environment", 2, False),
        ("environment", 3, True),
        ("runner", 1, False),
        ("drained", 3, False),
        ("storage", 3, False),
        ("lease-lost", 1, False),
        ("gpu", 1, False),
        ("gpu", 3, True),
        ("no-engine", 3, False),
    ],
)
async def test_attempts_that_go_back_to_the_queue_are_not_the_end(
    submitted: Submitted, reason: str, attempt: int, final: bool
):
    store(submitted, "1r31eq", status="failed", reason=reason, attempt=attempt)
    seen = await look(StorageView(Stores(config.S3()), submitted))
    assert seen is not None
    assert (seen.ending is not None) == final


def test_each_error_that_puts_a_message_back_is_known_for_that():
    tree, found = [errors.RunnerError], set()
    while tree:
        cls = tree.pop()
        tree += cls.__subclasses__()
        if cls.fate is errors.Fate.REQUEUE:
            found.add((cls.reason, cls.counts))
    assert {reason for reason, counts in found if not counts} <= views._NEVER_FINAL | {
        errors.Reason.RUNNER,
        errors.Reason.CANCELLED,
    }
    assert {reason for reason, counts in found if counts} == views._TRIED_AGAIN | {errors.Reason.DISK}


async def test_results_that_were_refused_are_the_end_of_what_has_run(submitted: Submitted):
    store(submitted, "1r31eq", status="failed", reason="artifact", exit_code=0)
    seen = await look(StorageView(Stores(config.S3()), submitted))
    assert seen is not None
    assert seen.ending is not None
    assert seen.ending.code == 1


async def test_the_latest_attempt_counts_also_when_its_number_is_the_same(submitted: Submitted):
    store(submitted, "1r31eq", status="stopped", reason="drained")
    store(submitted, "1r31fa", status="completed", reason="exit", exit_code=0)
    store(submitted, "1r31ea", status="stopped", reason="drained")
    seen = await look(StorageView(Stores(config.S3()), submitted))
    assert seen is not None
    assert seen.ending is not None
    assert seen.ending.code == 0


async def test_a_whole_run_followed_by_its_storage(submitted: Submitted, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(follow, "INTERVAL_SECS", 0.01)
    monkeypatch.setattr(views, "_OUTPUT_SECS", 0.01)
    long = b"".join(b'{"experiment": {"n": %d}}\n' % number for number in range(200_000))
    events: list[follow.Event] = []

    async def collect() -> None:
        async for event in follow.follow(submitted, Stores(config.S3()), None):
            events.append(event)  # noqa: PERF401 - looked at meanwhile

    async with asyncio.timeout(60):
        collecting = asyncio.create_task(collect())
        store(submitted, "1r31eq", b"one\ntw")
        while not any(isinstance(event, follow.Output) for event in events):
            await asyncio.sleep(0.01)
        store(submitted, "1r31eq", b"one\ntwo\n" + long, status="failed", reason="exit", exit_code=7)
        await collecting
    assert (
        b"".join(event.data for event in events if isinstance(event, follow.Output)) == b"one\ntwo\n" + long
    )
    assert [event.stage for event in events if isinstance(event, follow.Stage)] == ["running"]
    last = [event for event in events if isinstance(event, follow.Metric)][-1]
    assert last.values == {"n": 199_999}
    assert isinstance(events[-1], follow.End)
    assert events[-1].ending.code == 7


async def test_a_second_attempt_prints_from_its_own_beginning(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(follow, "INTERVAL_SECS", 0.01)
    store(submitted, "1r31eq", b"first attempt, a long line\n", status="failed", reason="environment")
    printed = b""
    async with asyncio.timeout(60):
        async for event in follow.follow(submitted, Stores(config.S3()), None):
            if isinstance(event, follow.Output):
                printed += event.data
                store(
                    submitted,
                    "1r31et",
                    b"second\n",
                    status="completed",
                    reason="exit",
                    exit_code=0,
                    attempt=2,
                )
    assert printed == b"first attempt, a long line\nsecond\n"


async def test_that_nobody_answers_is_told_once_and_the_storage_is_believed(
    submitted: Submitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(follow, "INTERVAL_SECS", 0.01)
    events: list[follow.Event] = []
    async with asyncio.timeout(60):
        async for event in follow.follow(submitted, Stores(config.S3()), Daemon(working_dir=tmp_path)):
            events.append(event)
            if len(events) == 1:
                store(submitted, "1r31eq", status="completed", reason="exit", exit_code=0)
    first, last = events
    assert isinstance(first, follow.Stage)
    assert f"no daemon works in {tmp_path}: start one" in first.note
    assert isinstance(last, follow.End)


async def test_what_one_daemon_has_put_back_and_another_one_runs_is_followed_there(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch
):
    """The one that is asked knows of its own attempt only; the clock of the other one's host is behind."""
    monkeypatch.setattr(follow, "INTERVAL_SECS", 0.01)

    class Told(Daemon):
        def get_json(self, path: str) -> Any:
            put_back = {"attempt": 1, "final": False, "text": "its GPU failed\nin many words"}
            return {"running": [], "recent": [put_back | {"accession": "h-1r31et"}]}

    store(submitted, "1r31et", status="failed", reason="gpu")
    events: list[follow.Event] = []
    async with asyncio.timeout(60):
        async for event in follow.follow(submitted, Stores(config.S3()), Told(address="h:1")):
            events.append(event)
            store(submitted, "1r31eq", b"ran\n", status="completed", reason="exit", exit_code=0, attempt=2)
    assert events[0] == follow.Stage(stage="queued", note="attempt 1 did not succeed: its GPU failed")
    assert events[1] == follow.Output(data=b"ran\n")
    assert isinstance(events[-1], follow.End)
    assert len(events) == 3


@pytest.mark.parametrize(
    ("reason", "exit_code", "code"),
    [
        ("exit", 0, 0),
        ("exit", 3, 3),
        ("signal", 137, 137),
        ("timeout", None, 1),
        ("storage", 0, 1),
        ("artifact", None, 1),
    ],
)
def test_the_code_is_the_workloads_only_when_it_ended_by_itself(
    reason: str, exit_code: int | None, code: int
):
    assert Ending(status="failed", reason=reason, text="", exit_code=exit_code).code == code


@pytest.mark.parametrize(
    ("queues", "why", "note"),
    [
        ([{"queue": "local_a", "closed_because": None}], None, ""),
        ([{"queue": "/v?local_a", "closed_because": "no core is free"}], None, "no core is free"),
        ([{"queue": "local_a", "closed_because": "backing off for 9 s more: x for 8 s"}], None, "x"),
        (
            [{"queue": "local_a", "closed_because": None, "trouble": "its broker is away"}],
            None,
            "its broker is away",
        ),
        (
            [
                {
                    "queue": "local_a",
                    "closed_because": None,
                    "parked": "1 message is parked: a (for 3 s); b (for 9 s)",
                }
            ],
            None,
            "1 message is parked: a; b",
        ),
        ([], "it does not match", "the daemon at h:1 does not serve its queue yet: it does not match"),
    ],
)
async def test_why_it_waits_is_asked_of_the_daemon(
    submitted: Submitted, queues: list[dict[str, str | None]], why: str | None, note: str
):
    class Told(Daemon):
        def get_json(self, path: str) -> Any:
            if path == "/api/runs?digest=d":
                return {"running": [], "recent": []}
            assert path == "/api/queues?queue=local_a"
            return {"queues": queues, "why": why}

    seen = await views.DaemonView(Told(address="h:1"), submitted).look()
    assert seen == Seen(stage="queued", note=note)


async def test_listing_is_not_done_at_every_look(submitted: Submitted):
    view = StorageView(Stores(config.S3()), submitted)
    await view.look()
    assert view._next > time.monotonic()
    store(submitted, "1r31eq")
    assert await view.look() is None
