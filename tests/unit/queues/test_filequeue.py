"""What only the directory queue has: two foreign layouts, hostile directories, claims of the dead."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
import uuid
from typing import TYPE_CHECKING

import pytest

from runner.errors import QueueUnavailable
from runner.queues import file_names
from runner.queues.base import Consumer, Delivery, Existence, QueueGone
from runner.queues.file_consumer import FileDelivery
from runner.queues.file_lock import locked
from runner.queues.file_messages import FileSettings
from runner.queues.file_messages import _read as read_message
from runner.queues.file_owner import Owner
from runner.queues.filequeue import FileBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

SOON = 30.0
QUICK = FileSettings(heartbeat_secs=0.1, stale_secs=1.0, sweep_secs=0.1, rescan_secs=0.5, partial_secs=1.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "queues" / "local_q").mkdir(parents=True)
    return tmp_path / "queues"


@pytest.fixture
def queue(root: Path) -> Path:
    return root / "local_q"


@pytest.fixture
async def connect(root: Path) -> AsyncIterator[Callable[..., FileBackend]]:
    backends: list[FileBackend] = []

    def make(settings: FileSettings = QUICK, host: str | None = None) -> FileBackend:
        backends.append(FileBackend(root, settings=settings, host=host))
        return backends[-1]

    yield make
    for backend in backends:
        await backend.aclose()


@pytest.fixture
async def backend(connect: Callable[..., FileBackend]) -> FileBackend:
    return connect()


@pytest.fixture
async def consumer(backend: FileBackend) -> Consumer:
    return await backend.consumer(backend.ref("local_q"))


async def take(consumer: Consumer) -> Delivery:
    return await asyncio.wait_for(consumer.next(), SOON)


async def nothing_comes(consumer: Consumer, secs: float = 0.3) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(consumer.next(), secs)


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON):
        while not check():
            await asyncio.sleep(0.01)


def waiting(queue: Path) -> list[str]:
    return [path.name for path in queue.iterdir() if file_names.is_message_name(path.name)]


def left(root: Path) -> list[Path]:
    """Every file that is neither a queue's nor an owner's record."""
    return [p for p in (root / ".claimed").rglob("*") if p.is_file() and p.name != ".owner"]


def aged(path: Path, secs: float) -> None:
    at = time.time() - secs
    os.utime(path, (at, at))


# -- the two foreign layouts ----------------------------------------------------------------------------------------


async def test_a_message_of_the_python_client_half_written_at_first(queue, connect):
    backend = connect(FileSettings(partial_secs=3600))
    consumer = await backend.consumer(backend.ref("local_q"))
    taking = asyncio.create_task(take(consumer))
    path = queue / str(uuid.uuid4())
    with path.open("w") as file:
        file.write('{"experiment": ')
        file.flush()
        await asyncio.sleep(0.2)
        assert not taking.done()
        file.write("NaN}")  # as Python's json writes it
    assert (await taking).body == b'{"experiment": NaN}'


async def test_what_never_becomes_json_is_delivered_when_it_is_old(queue, consumer):
    written = time.monotonic()
    (queue / str(uuid.uuid4())).write_text("{truncated")
    assert (await take(consumer)).body == b"{truncated"
    assert time.monotonic() - written > 0.8
    old = queue / str(uuid.uuid4())
    old.write_text("{truncated too")
    aged(old, 60)
    assert (await take(consumer)).body == b"{truncated too"


async def test_a_half_written_file_with_a_time_in_the_future_is_delivered_too(queue, consumer):
    path = queue / "from-a-host-with-a-wrong-clock"
    path.write_text("{")
    aged(path, -86400)
    assert (await take(consumer)).body == b"{"


async def test_a_half_written_file_does_not_hold_up_those_behind_it(queue, connect):
    backend = connect(FileSettings(partial_secs=3600))
    consumer = await backend.consumer(backend.ref("local_q"))
    partial, whole = queue / "partial", queue / "whole"
    partial.write_text("{")
    whole.write_text("{}")
    aged(partial, 100)
    assert (await take(consumer)).body == b"{}"
    await nothing_comes(consumer)


async def test_the_layout_of_the_go_publisher(queue, consumer):
    taking = asyncio.create_task(take(consumer))
    temporary = queue / "9m4e2mr0ui3e8a215n4g"
    temporary.mkdir(0o775)
    (temporary / "9m4e2mr0ui3e8a215n50").write_text("not json, yet whole: it was renamed")
    await asyncio.sleep(0.2)
    assert not taking.done()
    (temporary / "9m4e2mr0ui3e8a215n50").rename(queue / "9m4e2mr0ui3e8a215n50")
    temporary.rmdir()
    assert (await taking).body == b"not json, yet whole: it was renamed"


async def test_the_oldest_first_then_by_name(queue, consumer):
    for name, age in [("b", 20), ("a", 10), ("d", 20), ("c", 30)]:
        (queue / name).write_text(f'"{name}"')
        at = 1_700_000_000 - age
        os.utime(queue / name, (at, at))
    assert [(await take(consumer)).body for _ in range(4)] == [b'"c"', b'"b"', b'"d"', b'"a"']


async def test_a_returned_message_keeps_its_place(queue, consumer, backend):
    await backend.publish(backend.ref("local_q"), b"1")
    first = await take(consumer)
    await backend.publish(backend.ref("local_q"), b"2")
    (queue / "3").write_text("3")
    assert await first.requeue()
    assert [(await take(consumer)).body for _ in range(3)] == [b"1", b"2", b"3"]


# -- the lock of the Python client -----------------------------------------------------------------------------------


async def test_while_the_python_client_holds_its_lock_nothing_is_taken(queue, consumer):
    lock = queue / "lock.lock"
    lock.touch()
    (queue / "m").write_text("{}")
    await nothing_comes(consumer)
    assert waiting(queue) == ["m"]
    lock.unlink()
    assert await (await take(consumer)).ack()
    assert list(queue.iterdir()) == []  # ours is gone too


async def test_a_lock_left_by_a_crash_is_broken_by_its_age(queue, consumer):
    (queue / "lock.lock").touch()
    aged(queue / "lock.lock", 61)
    (queue / "m").write_text("{}")
    assert (await take(consumer)).body == b"{}"


async def test_a_lock_left_by_a_killed_daemon_is_broken_at_once(queue, consumer):
    dead = Owner.here()
    dead = Owner(
        host=dead.host, boot=dead.boot, namespace=dead.namespace, pid=dead.pid, started=dead.started - 1
    )
    (queue / "lock.lock").write_text(dead.to_json())
    (queue / "m").write_text("{}")
    assert (await take(consumer)).body == b"{}"


@pytest.mark.parametrize("links", [True, False])
def test_the_lock_of_a_living_daemon_is_respected_and_only_ours_is_removed(
    queue, tmp_path, monkeypatch, links
):
    owner, record = Owner.here(), tmp_path / ".owner"
    record.write_text(owner.to_json())
    if not links:

        def refused(self: Path, target: Path) -> None:
            raise PermissionError(1, "no hard links here")

        monkeypatch.setattr("pathlib.Path.hardlink_to", refused)
    with locked(queue, record, owner, stale_secs=60) as held:
        assert held
        assert Owner.from_json((queue / "lock.lock").read_text()) == owner
        with locked(queue, record, owner, stale_secs=60) as again:
            assert not again
        assert (queue / "lock.lock").exists()
        (queue / "lock.lock").unlink()  # broken while we slept ...
        (queue / "other").touch()
        (queue / "lock.lock").touch()  # ... and taken by somebody else
    assert (queue / "lock.lock").exists()


# -- hostile directories ---------------------------------------------------------------------------------------------


async def test_nothing_but_regular_files_is_taken_and_nothing_blocks(root, queue, consumer, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text('{"secret": 1}')
    (queue / "link").symlink_to(secret)
    (queue / "dangling").symlink_to(tmp_path / "nowhere")
    (queue / "loop").symlink_to("loop")
    (queue / "directory").mkdir()
    (queue / ".hidden").write_text("{}")
    os.mkfifo(queue / "fifo")
    before = sorted(path.name for path in queue.iterdir())
    await nothing_comes(consumer)
    (queue / "real").write_text("{}")
    assert await (await take(consumer)).ack()
    assert sorted(path.name for path in queue.iterdir()) == before
    assert secret.read_text() == '{"secret": 1}'


@pytest.mark.parametrize(
    "name",
    [
        b"two\nlines",
        b"\xff\xfe bytes",
        "ünïcødé 名".encode(),
        b"n" * 255,
        "名".encode() * 85,
        b"-rf",
        b"~",
        b"a" * 230 + b".redelivered-7-0123456789ab"[:25],
    ],
)
async def test_any_file_name_goes_the_whole_way(root, queue, consumer, name):
    (queue / os.fsdecode(name)).write_text("{}")
    delivery = await take(consumer)
    assert delivery.redelivered is False
    assert await delivery.requeue()
    for times in (1, 2):
        delivery = await take(consumer)
        assert delivery.redelivered is True
        assert isinstance(delivery, FileDelivery)
        assert delivery.claim.name.partition(".redelivered-")[2].startswith(f"{times}-")
        assert await (delivery.requeue() if times == 1 else delivery.ack())
    assert waiting(queue) == []
    assert left(root) == []


async def test_going_back_overwrites_no_other_message(queue, consumer):
    (queue / "same").write_text("1")
    first = await take(consumer)
    (queue / "same").write_text("2")
    second = await take(consumer)
    (queue / "same").write_text("3")
    assert await first.requeue()
    assert await second.requeue()
    assert len(waiting(queue)) == 3
    assert {(await take(consumer)).body for _ in range(3)} == {b"1", b"2", b"3"}


async def test_a_file_too_large_for_a_message_is_set_aside(root, queue, connect):
    backend = connect(FileSettings(message_bytes=1000))
    consumer = await backend.consumer(backend.ref("local_q"))
    (queue / "large").write_text('"' + "x" * 999 + '"')
    (queue / "right").write_text('"' + "x" * 998 + '"')
    assert len((await take(consumer)).body) == 1000
    await nothing_comes(consumer)
    (aside,) = (root / ".claimed" / ".oversize" / "local_q").iterdir()
    assert aside.stat().st_size == 1001


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
async def test_a_file_that_may_not_be_read_is_left(queue, consumer):
    (queue / "forbidden").write_text("{}")
    (queue / "forbidden").chmod(0)
    (queue / "allowed").write_text("{}")
    assert await (await take(consumer)).ack()
    await nothing_comes(consumer)
    assert waiting(queue) == ["forbidden"]


def test_what_takes_the_place_of_a_file_after_it_was_listed_is_not_read(queue, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (queue / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(queue / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(OSError):
            read_message(queue / name, 100)


async def test_only_visible_plain_directories_with_printable_names_are_queues(root, backend, tmp_path):
    for name in (".claimed", ".hidden", "two\nlines", os.fsdecode(b"\xff"), "rmq_ü", "q_response"):
        (root / name).mkdir(exist_ok=True)
    (root / "file").touch()
    (root / "link").symlink_to(tmp_path)
    assert [info.ref.name for info in await backend.discover()] == ["local_q", "rmq_ü"]


@pytest.mark.parametrize("name", ["", ".", "..", ".claimed", "a/b", "../x", "n\0l"])
async def test_names_that_lead_elsewhere_are_no_queues(backend, name):
    with pytest.raises(ValueError):
        await backend.declare(name)
    with pytest.raises(QueueGone):
        await backend.publish(backend.ref(name), b"{}")
    assert await backend.existence(backend.ref(name)) is not Existence.HERE


# -- queues and roots that vanish ------------------------------------------------------------------------------------


async def test_a_root_that_went_away_proves_nothing(root, queue, backend, consumer, tmp_path):
    ref = backend.ref("local_q")
    assert await backend.existence(ref) is Existence.HERE
    root.rename(tmp_path / "away")
    assert await backend.existence(ref) is Existence.UNKNOWN
    with pytest.raises(QueueUnavailable):
        await backend.discover()
    with pytest.raises(QueueUnavailable):
        await backend.publish(ref, b"{}")
    root.mkdir()  # an empty mount point
    assert await backend.existence(ref) is Existence.UNKNOWN
    await nothing_comes(consumer)
    root.rmdir()
    (tmp_path / "away").rename(root)
    await backend.publish(ref, b"{}")
    assert (await take(consumer)).body == b"{}"


async def test_what_could_not_be_ended_while_the_root_was_away_is_ended_later(
    root, queue, backend, consumer, tmp_path
):
    for body in (b"1", b"2"):
        await backend.publish(backend.ref("local_q"), body)
    first, second = await take(consumer), await take(consumer)
    claimed = root / ".claimed"
    claimed.rename(tmp_path / "aside")
    claimed.touch()  # every operation on a claim fails with ENOTDIR
    await first.ack()
    await second.requeue()
    claimed.unlink()
    (tmp_path / "aside").rename(claimed)
    again = await take(consumer)
    assert again.body == b"2"
    assert again.redelivered
    await until(lambda: len(left(root)) == 1)


async def test_a_message_whose_queue_was_removed_is_dropped(root, queue, backend, consumer):
    for body in (b"1", b"2"):
        await backend.publish(backend.ref("local_q"), body)
    first, second = await take(consumer), await take(consumer)
    shutil.rmtree(queue)
    assert await first.requeue() is False
    assert await second.requeue(delay_secs=5) is False
    assert left(root) == []
    with pytest.raises(QueueGone):
        await take(consumer)
    queue.mkdir()
    (queue / "new").write_text("{}")
    assert (await take(consumer)).body == b"{}"


# -- claims of the dead ----------------------------------------------------------------------------------------------

HOLDER = """
import asyncio, sys
from pathlib import Path
from runner.queues.filequeue import FileBackend

async def main():
    backend = FileBackend(Path(sys.argv[1]), host=sys.argv[2] or None)
    consumer = await backend.consumer(backend.ref("local_q"))
    for _ in range(2):
        delivery = await consumer.next()
    await delivery.requeue(delay_secs=float(sys.argv[3]))
    print("holding", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


async def holding(root: Path, *, host: str = "", delay: float = 0.0) -> asyncio.subprocess.Process:
    """A daemon that holds "1", and has given "2" back."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, str(root), host, str(delay), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout
    assert await asyncio.wait_for(process.stdout.readline(), SOON) == b"holding\n"
    return process


async def kill(process: asyncio.subprocess.Process) -> None:
    process.send_signal(signal.SIGKILL)
    await process.wait()


async def test_the_claims_of_a_killed_daemon_are_returned_at_once(root, queue, consumer):
    (queue / "a").write_text("1")
    (queue / "b").write_text("2")
    process = await holding(root)
    try:
        second = await take(consumer)
        assert second.body == b"2"
        await nothing_comes(consumer)  # the holder lives
    finally:
        await kill(process)
    first = await take(consumer)
    assert (first.body, first.redelivered) == (b"1", True)
    assert await first.ack()
    assert await second.ack()
    await until(lambda: len([p for p in (root / ".claimed").iterdir() if not p.name.startswith(".")]) == 1)


async def test_the_claims_of_another_host_are_returned_when_it_was_silent_for_long(root, queue, backend):
    (queue / "a").write_text("1")
    (queue / "b").write_text("2")
    process = await holding(
        root, host="elsewhere"
    )  # its heartbeat comes every 15 s; here 1 s counts as silence
    try:
        owner = next(
            p for p in (root / ".claimed").rglob(".owner") if json.loads(p.read_text())["host"] == "elsewhere"
        )
        consumer = await backend.consumer(
            backend.ref("local_q")
        )  # only now: it may take a slow start for silence
        assert {(await take(consumer)).body for _ in range(2)} == {b"1", b"2"}
        assert not owner.exists()
    finally:
        await kill(process)


async def test_a_heartbeat_keeps_claims_from_other_hosts(queue, connect):
    # This machine may stand still for some seconds, and both hosts are on it.
    settings = FileSettings(heartbeat_secs=0.1, stale_secs=8.0, sweep_secs=0.1)
    here, elsewhere = connect(settings), connect(settings, host="elsewhere")
    (queue / "a").write_text("{}")
    held = await take(await elsewhere.consumer(elsewhere.ref("local_q")))
    await nothing_comes(await here.consumer(here.ref("local_q")), 1.2 * settings.stale_secs)
    assert await held.ack()


async def test_a_delayed_message_survives_a_kill(root, queue, connect):
    (queue / "a").write_text("1")
    (queue / "b").write_text("2")
    given_back = time.monotonic()
    process = await holding(root, delay=2.0)
    await kill(process)
    backend = connect()
    consumer = await backend.consumer(backend.ref("local_q"))
    assert (await take(consumer)).body == b"1"
    second = await take(consumer)
    assert (second.body, second.redelivered) == (b"2", True)
    assert time.monotonic() - given_back > 1.9
    assert await second.ack()


async def test_a_daemon_whose_claims_were_taken_over_goes_on_under_a_new_name(root, queue, backend, consumer):
    (queue / "a").write_text("1")
    lost = await take(consumer)
    owner = next(p for p in (root / ".claimed").iterdir() if not p.name.startswith("."))
    owner.rename(owner.with_name(f".dead-{owner.name}"))  # what a sweeper does, before it dies itself
    await asyncio.wait_for(lost.lost.wait(), SOON)
    assert await lost.ack() is False
    again = await take(consumer)
    assert (again.body, again.redelivered) == (b"1", True)
    assert await again.ack()
    await backend.aclose()
    assert left(root) == []


async def test_rubbish_among_the_claims_is_survived(root, queue, consumer):
    area = root / ".claimed"
    (area / "nobody" / "local_q" / "1").mkdir(parents=True)
    (area / "nobody" / "local_q" / "1" / "m").write_text("1")
    (area / "nobody" / ".owner").write_text("[half")
    aged(area / "nobody" / ".owner", 3600)
    (area / "file").write_text("x")
    (area / ".delayed" / "local_q" / "soon").mkdir(parents=True)
    (area / ".delayed" / "local_q" / "soon" / "m").write_text("2")
    (area / ".delayed" / "local_q" / "file").write_text("x")
    (area / ".tmp").mkdir()
    (area / ".tmp" / "old").write_text("x")
    aged(area / ".tmp" / "old", 7200)
    assert {(await take(consumer)).body for _ in range(2)} == {b"1", b"2"}
    await until(lambda: not (area / ".tmp" / "old").exists())


async def test_notifications_need_no_rescan(root, queue, connect):
    backend = connect(FileSettings(rescan_secs=3600, sweep_secs=3600))
    consumer = await backend.consumer(backend.ref("local_q"))
    for write in (
        lambda: (queue / "in place").write_text("1"),
        lambda: (root / "m").rename(queue / "by rename"),
    ):
        (root / "m").write_text("1")
        taking = asyncio.create_task(take(consumer))
        await asyncio.sleep(0.2)
        assert not taking.done()
        write()
        assert await (await taking).ack()
    for remove in (lambda: shutil.rmtree(queue), lambda: queue.rename(root / "local_p")):
        taking = asyncio.create_task(take(consumer))
        await asyncio.sleep(0.2)
        assert not taking.done()
        remove()
        with pytest.raises(QueueGone):
            await taking
        queue.mkdir()


async def test_without_notifications_the_rescan_finds_messages(queue, connect, monkeypatch):
    def none_left() -> None:
        raise OSError(24, "no more instances")

    monkeypatch.setattr("runner.queues.file_watch.asyncinotify.Inotify", none_left)
    backend = connect()
    consumer = await backend.consumer(backend.ref("local_q"))
    taking = asyncio.create_task(take(consumer))
    await asyncio.sleep(0.2)
    (queue / "m").write_text("{}")
    assert (await taking).body == b"{}"


# -- small things ----------------------------------------------------------------------------------------------------


def test_names_are_those_of_xid_and_sort_in_the_order_of_making():
    source = file_names.NameSource()
    made = [source() for _ in range(1000)]
    assert made == sorted(set(made))
    assert all(file_names.is_whole(name) for name in made)
    assert not file_names.is_whole(str(uuid.uuid4()))


def test_an_owner_is_known_by_its_start_and_a_stranger_is_not_judged():
    here = Owner.here()
    assert here.is_alive(here) is True
    assert Owner.from_json(here.to_json()) == here
    assert Owner.here("elsewhere").is_alive(here) is None
    for text in ("", "[]", "{}", '{"host": 1}', "null"):
        assert Owner.from_json(text) is None


async def test_a_backend_that_only_publishes_leaves_no_trace(root, connect):
    backend = connect()
    await backend.open()
    await backend.publish(await backend.declare("rmq_new"), b"{}")
    await backend.aclose()
    assert left(root) == []
    assert [p.name for p in (root / ".claimed").iterdir()] == [".tmp"]
    assert await backend.existence(backend.ref("rmq_new")) is Existence.UNKNOWN


async def test_a_queue_that_is_made_or_removed_is_told_at_once(tmp_path):
    backend = FileBackend(tmp_path)
    told = asyncio.Event()
    backend.on_queues_changed(told.set)
    await asyncio.sleep(0)
    for change in ((tmp_path / "local_a").mkdir, (tmp_path / "local_a").rmdir):
        await asyncio.sleep(0.05)
        told.clear()
        change()
        async with asyncio.timeout(30):
            await told.wait()
    await backend.aclose()
