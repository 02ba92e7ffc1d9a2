"""Runs that take longer than SQS's 12 hours (LEASE.md): seconds here, by SqsTiming."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import stat
from typing import TYPE_CHECKING, Any

import pytest

from runner.queues import sqs_keeper, sqs_service
from runner.queues.base import QueueRef
from runner.queues.sqs import SqsBackend
from runner.queues.sqs_access import SqsTiming
from tests.servers.proxy import proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from runner.queues.base import Delivery
    from tests.servers.moto_sqs import SqsServer
    from tests.servers.proxy import Proxy

pytestmark = pytest.mark.service

SOON = 30.0
TIMING = SqsTiming(
    poll_secs=1,
    visibility_secs=20,
    hold_limit_secs=20,
    margin_secs=19,  # handed over a second after it was received
    offer_secs=3600,
    confirm_secs=0.1,
    retry_secs=0.2,
    call_secs=30,
)
QUEUE = QueueRef(account="account", name="sqs_days")


@pytest.fixture
async def server(sqs_server: SqsServer) -> AsyncIterator[SqsServer]:
    sqs_server.create(QUEUE.name)
    yield sqs_server
    await asyncio.to_thread(sqs_server.clear)


@pytest.fixture
def way(sqs_server: SqsServer):
    with proxy("127.0.0.1", sqs_server.port) as one:
        yield one


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "state" / "sqs"


@pytest.fixture
async def opened(
    server: SqsServer, way: Proxy, kept: Path
) -> AsyncIterator[Callable[..., Awaitable[SqsBackend]]]:
    backends = []

    async def one(keep: Path | None = kept, **timing: Any) -> SqsBackend:
        backend = SqsBackend(
            server.account(port=way.port), keep=keep, timing=dataclasses.replace(TIMING, **timing)
        )
        await backend.open()
        backends.append(backend)
        return backend

    yield one
    for backend in backends:
        await backend.aclose()


async def first(backend: SqsBackend, queue: QueueRef = QUEUE) -> Delivery:
    return await asyncio.wait_for((await backend.consumer(queue)).next(), SOON)


async def reaches(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON):
        while not await asyncio.to_thread(check):
            await asyncio.sleep(0.05)


def files(kept: Path) -> list[Path]:
    return sorted(kept.glob("*")) if kept.exists() else []


async def handed_over(server: SqsServer, kept: Path, name: str = QUEUE.name) -> None:
    await reaches(lambda: len(files(kept)) == 1 and server.depth(name) + server.held(name) == 0)


async def run_until_kept(backend: SqsBackend, server: SqsServer, kept: Path) -> Delivery:
    await backend.publish(QUEUE, b"long")
    delivery = await first(backend)
    await delivery.began(1)
    await handed_over(server, kept)
    return delivery


async def crash(backend: SqsBackend) -> None:
    """What is left of a daemon that was killed: nothing runs any more, nothing was given back."""
    for delivery in tuple(backend._held):
        delivery._holding.cancel()
        backend._held.discard(delivery)
    await backend.aclose()


async def test_it_is_deleted_in_time_and_done_with_when_acknowledged(server, opened, kept):
    backend = await opened()
    await backend.publish(QUEUE, b"long canary")
    delivery = await first(backend)
    await handed_over(server, kept)
    (file,) = files(kept)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert b"long canary" in file.read_bytes()
    await delivery.extend(60)
    assert not delivery.lost.is_set()
    assert await delivery.ack() is True
    assert await delivery.ack() is False
    assert await delivery.requeue() is False
    assert files(kept) == []
    assert server.depth(QUEUE.name) + server.held(QUEUE.name) == 0


async def test_given_up_it_is_in_its_queue_again_as_a_redelivery(server, opened, kept):
    backend = await opened()
    await backend.publish(QUEUE, b"long")
    delivery = await first(backend)
    await handed_over(server, kept)
    delivery.attempts = 2
    assert await delivery.requeue() is True
    assert files(kept) == []
    again = await first(await opened(margin_secs=0))
    assert (again.body, again.redelivered, again.attempts) == (b"long", True, 2)
    assert await again.ack()


async def test_a_backend_that_closes_sends_it_again(server, opened, kept):
    backend = await opened()
    await backend.publish(QUEUE, b"long")
    delivery = await first(backend)
    await handed_over(server, kept)
    await backend.aclose()
    assert await delivery.ack() is False
    assert delivery.lost.is_set()
    assert (files(kept), server.depth(QUEUE.name)) == ([], 1)


async def test_on_a_fifo_queue_it_returns_to_its_group_and_is_not_taken_for_a_duplicate(server, opened, kept):
    queue = QueueRef(account="account", name="sqs_days.fifo")
    url = server.create(queue.name, ContentBasedDeduplication="true")
    server.admin.send_message(QueueUrl=url, MessageBody="long", MessageGroupId="theirs")
    backend = await opened()
    delivery = await first(backend, queue)
    await handed_over(server, kept, queue.name)
    assert await delivery.requeue() is True
    (message,) = server.admin.receive_message(QueueUrl=url, AttributeNames=["All"], WaitTimeSeconds=5)[
        "Messages"
    ]
    assert (message["Body"], message["Attributes"]["MessageGroupId"]) == ("long", "theirs")
    assert message["Attributes"]["MessageDeduplicationId"] != hashlib.sha256(b"long").hexdigest()


async def test_the_next_daemon_offers_what_the_last_one_kept_to_itself_first(server, opened, kept):
    last = await opened()
    await run_until_kept(last, server, kept)
    await crash(last)
    backend = await opened()
    assert await backend.reclaim(QUEUE, b"other") is None
    assert await backend.reclaim(dataclasses.replace(QUEUE, name="other"), b"long") is None
    again = await backend.reclaim(QUEUE, b"long")
    assert again is not None
    assert (again.body, again.redelivered, again.attempts) == (b"long", True, 1)
    assert await backend.reclaim(QUEUE, b"long") is None  # it is offered once
    assert server.depth(QUEUE.name) + server.held(QUEUE.name) == 0
    await again.began(2)
    await crash(backend)  # killed as well
    again = await (await opened()).reclaim(QUEUE, b"long")
    assert again is not None
    assert again.attempts == 2
    await again.extend(60)
    assert await again.ack() is True
    assert await again.requeue() is False
    assert files(kept) == []


async def test_what_the_next_daemon_does_not_want_is_sent_again(server, opened, kept):
    last = await opened()
    await run_until_kept(last, server, kept)
    await crash(last)
    await opened(offer_secs=0.2)  # and nobody asks it for work of that queue
    await reaches(lambda: server.depth(QUEUE.name) == 1 and files(kept) == [])
    again = await first(await opened(margin_secs=0))
    assert (again.body, again.redelivered, again.attempts) == (b"long", True, 1)
    assert await again.ack()


async def test_an_offer_that_is_declined_is_sent_again(server, opened, kept):
    last = await opened()
    await run_until_kept(last, server, kept)
    await crash(last)
    offered = await (await opened()).reclaim(QUEUE, b"long")
    assert offered is not None
    assert await offered.requeue() is True
    assert (files(kept), server.depth(QUEUE.name)) == ([], 1)


async def test_an_account_does_not_touch_what_others_kept(server, opened, kept):
    last = await opened()
    await last.publish(QUEUE, b"long")
    await first(last)
    await handed_over(server, kept)
    await crash(last)
    (kept / "damaged.json").write_text("{")
    other = SqsBackend(
        dataclasses.replace(server.account(), label="other"),
        keep=kept,
        timing=dataclasses.replace(TIMING, offer_secs=0),
    )
    await other.open()
    assert await other.reclaim(dataclasses.replace(QUEUE, account="other"), b"long") is None
    await asyncio.sleep(0.5)
    await other.aclose()
    assert len(files(kept)) == 2


async def test_an_account_that_is_opened_anew_leaves_alone_what_its_runs_still_have(
    server, opened, kept, monkeypatch
):
    """As when its credentials change: the old backend stays open until its last run has ended."""
    monkeypatch.setattr(sqs_keeper, "LOOK_SECS", 0.1)
    old = await opened()
    delivery = await run_until_kept(old, server, kept)
    new = await opened(offer_secs=0.2)
    assert await new.reclaim(QUEUE, b"long") is None
    await asyncio.sleep(1)
    assert len(files(kept)) == 1
    assert server.depth(QUEUE.name) == 0
    assert not delivery.lost.is_set()
    await crash(old)  # it could not send its message again; the new one looks for such
    await reaches(lambda: server.depth(QUEUE.name) == 1 and files(kept) == [])


async def test_it_waits_on_disk_while_sqs_is_away(server, opened, kept, way, monkeypatch):
    monkeypatch.setattr(sqs_keeper, "RESEND_SECS", 0.5)
    backend = await opened()
    await backend.publish(QUEUE, b"long")
    delivery = await first(backend)
    await handed_over(server, kept)
    way.refuse()
    way.cut()
    assert await delivery.requeue() is True
    assert len(files(kept)) == 1
    way.listen()
    await reaches(lambda: server.depth(QUEUE.name) == 1 and files(kept) == [])


async def test_of_a_queue_that_was_deleted_nothing_is_kept(server, opened, kept):
    backend = await opened()
    await backend.publish(QUEUE, b"long")
    delivery = await first(backend)
    await handed_over(server, kept)
    await asyncio.to_thread(server.delete, QUEUE.name)
    assert await delivery.requeue() is True
    assert files(kept) == []


async def test_when_sqs_does_not_answer_the_deletion_it_is_kept_all_the_same(server, opened, kept, way):
    backend = await opened(margin_secs=17)
    await backend.publish(QUEUE, b"long")
    delivery = await first(backend)
    way.blackhole()
    await reaches(lambda: len(files(kept)) == 1)
    way.resume()
    await reaches(lambda: server.held(QUEUE.name) == 0)
    assert not delivery.lost.is_set()
    assert await delivery.ack() is True
    assert files(kept) == []


async def test_without_a_directory_the_message_comes_back_and_the_run_hears_of_it(server, opened):
    backend = await opened(keep=None, hold_limit_secs=4, visibility_secs=3)
    await backend.publish(QUEUE, b"long")
    delivery = await first(backend)
    await asyncio.wait_for(delivery.lost.wait(), SOON)
    assert await delivery.ack() is False
    again = await first(await opened())
    assert (again.body, again.redelivered) == (b"long", True)
    assert await again.ack()


async def test_on_a_full_disk_it_is_as_without_a_directory(server, opened, kept, monkeypatch):
    backend = await opened(hold_limit_secs=6, margin_secs=5, visibility_secs=3)
    kept.parent.mkdir()
    kept.write_text("no directory")
    await backend.publish(QUEUE, b"long")
    delivery = await first(backend)
    await asyncio.wait_for(delivery.lost.wait(), SOON)
    await reaches(lambda: server.depth(QUEUE.name) == 1)


async def test_sqs_may_end_the_hold_before_we_expect_it(server, opened, kept, monkeypatch):
    def refuse(*_: object) -> None:
        raise sqs_service.HoldAtItsEnd

    backend = await opened(visibility_secs=15, hold_limit_secs=3600, margin_secs=60)
    await backend.publish(QUEUE, b"long")
    monkeypatch.setattr(backend._service, "hold", refuse)
    delivery = await first(backend)
    await handed_over(server, kept)
    assert await delivery.ack() is True
    assert files(kept) == []


async def test_a_message_of_the_largest_size_is_sent_again_without_our_attribute(server, opened, kept):
    largest = QueueRef(account="account", name="sqs_largest")
    server.create(largest.name, MaximumMessageSize="1024")
    backend = await opened()
    await backend.publish(largest, b"x" * 1024)
    delivery = await first(backend, largest)
    await handed_over(server, kept, largest.name)
    real = backend._service.send

    def send(name: str, body: str, *, attempts: int | None = None, **more: Any) -> None:
        if attempts is not None:  # what AWS does, and moto does not: attributes count
            body += "attribute"
        real(name, body, attempts=attempts, **more)

    backend._service.send = send
    assert await delivery.requeue() is True
    assert (files(kept), server.depth(largest.name)) == ([], 1)
