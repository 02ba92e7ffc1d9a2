"""What SQS alone has: its credentials, sizes, FIFO queues, paging, and messages held by renewing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from runner.errors import MalformedMessage, QueueUnavailable, UsageError
from runner.queues import sqs, sqs_access, sqs_account, sqs_delivery, sqs_service
from runner.queues.base import Existence, QueueRef
from runner.queues.sqs import SqsBackend
from runner.queues.sqs_access import SqsTiming
from runner.queues.sqs_account import SqsAccount, SqsKeys, SqsProfile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.servers.moto_sqs import SqsServer

pytestmark = pytest.mark.service

SOON = 30.0
#: A message is renewed after four seconds, and so kept by a machine that stands still for seven.
TIMING = SqsTiming(poll_secs=2, visibility_secs=12, confirm_secs=0.2, retry_secs=0.2)


@pytest.fixture
async def server(sqs_server: SqsServer) -> AsyncIterator[SqsServer]:
    yield sqs_server
    await asyncio.to_thread(sqs_server.clear)


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., Awaitable[SqsBackend]]]:
    backends = []

    async def one(account: SqsAccount, timing: SqsTiming = TIMING) -> SqsBackend:
        backend = SqsBackend(account, timing=timing)
        await backend.open()
        backends.append(backend)
        return backend

    yield one
    for backend in backends:
        await backend.aclose()


def ref(name: str) -> QueueRef:
    return QueueRef(account="account", name=name)


async def first(backend: SqsBackend, queue: QueueRef):
    return await asyncio.wait_for((await backend.consumer(queue)).next(), SOON)


def polls(backend: SqsBackend) -> tuple[threading.Event, threading.Event]:
    """Set when a long poll of it is under way, and when one has been answered."""
    service: Any = backend._service
    real, asked, answered = service.receive, threading.Event(), threading.Event()

    def receive(*args: Any, **more: Any) -> Any:
        asked.set()
        received = real(*args, **more)
        answered.set()
        return received

    service.receive = receive
    return asked, answered


async def reaches(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON):
        while not await asyncio.to_thread(check):
            await asyncio.sleep(0.05)


# -- credentials


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda keys: SqsKeys(access_key=keys.access_key, secret_key="wrong-canary"), "secret key is wrong"),
        (
            lambda keys: SqsKeys(access_key="AKIAUNKNOWN", secret_key="wrong-canary"),
            "does not know this access key",
        ),
    ],
)
async def test_wrong_keys_make_the_account_unavailable_and_say_why(server, opened, spoil, says):
    backend = await opened(server.account(keys=spoil(server.user)))
    with pytest.raises(QueueUnavailable, match=says) as told:
        await backend.discover()
    assert told.value.endpoint == "account"
    assert "canary" not in str(told.value)
    server.create("sqs_there")
    assert await backend.existence(ref("sqs_there")) is Existence.UNKNOWN


async def test_a_key_without_rights_says_which_is_missing_and_cancels_nothing(server, opened):
    backend = await opened(server.account(keys=server.stranger))
    with pytest.raises(QueueUnavailable, match=r"do not allow it: .*stranger.*ListQueues"):
        await backend.discover()
    assert await backend.existence(ref("sqs_none")) is Existence.UNKNOWN


def profile(directory: Path, keys: SqsKeys, config: str) -> SqsProfile:
    made = SqsProfile(credentials_file=directory / "credentials", config_file=directory / "config")
    made.credentials_file.write_text(
        f"[default]\naws_access_key_id = {keys.access_key}\naws_secret_access_key = {keys.secret_key}\n"
    )
    made.config_file.write_text(config)
    return made


async def test_a_pair_of_files_is_an_account_and_the_environment_does_not_disturb_it(
    server, opened, tmp_path, monkeypatch
):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "other",
        "AWS_SECRET_ACCESS_KEY": "other",
        "AWS_PROFILE": "none",
        "AWS_DEFAULT_REGION": "eu-west-3",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    }.items():
        monkeypatch.setenv(name, value)
    server.create("sqs_files")
    files = profile(tmp_path, server.user, f"[default]\nregion = us-east-1\nendpoint_url = {server.url}\n")
    backend = await opened(SqsAccount(label="account", profile=files))
    assert [info.ref for info in await backend.discover()] == [ref("sqs_files")]


async def test_credentials_from_the_environment_are_used_only_when_asked_for(
    server, opened, tmp_path, monkeypatch
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.user.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.user.secret_key)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server.create("sqs_ambient")
    ambient = await opened(SqsAccount(label="account", ambient=True, endpoint_url=server.url))
    assert [info.ref for info in await ambient.discover()] == [ref("sqs_ambient")]
    files = profile(tmp_path, server.user, "[default]\nregion = us-east-1\n")
    files.credentials_file.write_text("[default]\n")
    empty = await opened(SqsAccount(label="account", profile=files, endpoint_url=server.url))
    with pytest.raises(QueueUnavailable, match="no complete access key"):
        await empty.discover()


async def test_an_account_with_files_does_not_borrow_from_the_machine(
    opened, tmp_path, monkeypatch, faulty_http
):
    """As in a container with a role, or on a virtual machine with one."""
    key = {"AccessKeyId": "a", "SecretAccessKey": "s", "Token": "t", "Expiration": "2999-01-01T00:00:00Z"}
    faulty_http.content = json.dumps(key).encode()
    here = f"http://{faulty_http.endpoint}"
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{here}/container")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"{here}/machine/")
    files = profile(tmp_path, SqsKeys(access_key="", secret_key=""), "[default]\nregion = us-east-1\n")
    files.credentials_file.write_text("[default]\n")
    backend = await opened(SqsAccount(label="account", profile=files, endpoint_url=f"{here}/sqs"))
    with pytest.raises(QueueUnavailable, match="no complete access key"):
        await backend.discover()
    assert faulty_http.seen == []


def test_the_region_and_the_address_are_the_account_s_own(monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_PROFILE", "none")
    keys = SqsKeys(access_key="a", secret_key="s")
    for region, address in {"": "us-west-2", "eu-north-1": "eu-north-1"}.items():
        client = sqs_account.Connector(SqsAccount(label="account", keys=keys, region=region)).client()
        assert client.meta.endpoint_url == f"https://sqs.{address}.amazonaws.com"


async def test_files_that_cannot_be_used_say_so(opened, tmp_path):
    keys = SqsKeys(access_key="a", secret_key="canary")
    files = profile(tmp_path, keys, "[other]\nregion = us-east-1\n")
    files.credentials_file.write_text("")
    with pytest.raises(QueueUnavailable, match="no profile 'default'"):
        await (await opened(SqsAccount(label="account", profile=files))).discover()
    files.credentials_file.write_text("canary")
    with pytest.raises(QueueUnavailable, match="credentials") as told:
        await (await opened(SqsAccount(label="account", profile=files))).discover()
    assert "canary" not in str(told.value)


async def test_a_key_that_is_rotated_in_place_goes_on_holding(server, opened, tmp_path):
    server.create("sqs_rotated")
    old, new = server.another_key(), None
    try:
        files = profile(tmp_path, old, f"[default]\nregion = us-east-1\nendpoint_url = {server.url}\n")
        backend = await opened(SqsAccount(label="account", profile=files))
        await backend.publish(ref("sqs_rotated"), b"x")
        delivery = await first(backend, ref("sqs_rotated"))
        server.revoke(old)
        with pytest.raises(QueueUnavailable, match="does not know this access key"):
            await backend.discover()
        new = server.another_key()
        profile(tmp_path, new, files.config_file.read_text())
        until = delivery._until
        await reaches(lambda: delivery.lost.is_set() or delivery._until > until)
        assert await delivery.ack()
        # The account is removed, and its last run goes on.
        files.credentials_file.unlink()
        server.revoke(new)
        with pytest.raises(QueueUnavailable, match="does not know this access key"):
            await backend.discover()
    finally:
        for key in (old, new):
            with contextlib.suppress(server.iam.exceptions.NoSuchEntityException):
                if key is not None:
                    server.revoke(key)


def test_an_account_has_its_credentials_from_one_place_and_does_not_show_them():
    keys = SqsKeys(access_key="a", secret_key="canary", session_token="canary")
    with pytest.raises(UsageError):
        SqsAccount(label="account")
    with pytest.raises(UsageError):
        SqsAccount(label="account", keys=keys, ambient=True)
    assert "canary" not in repr(SqsAccount(label="account", keys=keys))


# -- queues


async def test_discovery_reads_every_page(server, opened, monkeypatch):
    monkeypatch.setattr(sqs_service, "_PAGE", 3)
    names = {f"sqs_{n}" for n in range(10)} | {"sqs_f.fifo"}
    for name in [*names, "sqs_1_response", "sqs_f_response.fifo"]:
        server.create(name)
    backend = await opened(server.account())
    assert {info.ref.name for info in await backend.discover()} == names


async def test_only_the_exact_name_counts_as_there(server, opened):
    for name in ("sqs_a", "sqs_a_1", "sqs_a.fifo"):
        server.create(name)
    backend = await opened(server.account())
    await asyncio.to_thread(server.delete, "sqs_a")
    assert await backend.existence(ref("sqs_a")) is Existence.GONE
    assert await backend.existence(ref("sqs_a_1")) is Existence.HERE
    assert await backend.existence(ref("qs_a_1")) is Existence.GONE


async def test_a_queue_that_comes_back_between_two_looks_is_not_gone(server, opened):
    backend = await opened(server.account())
    real = backend._service.is_listed

    def is_listed(name: str) -> bool:
        listed: bool = real(name)  # the end of the first look
        server.create("sqs_late")
        return listed

    backend._service.is_listed = is_listed
    assert await backend.existence(ref("sqs_late")) is Existence.HERE


async def test_what_sqs_cannot_carry_is_refused_with_its_limit(server, opened):
    server.create("sqs_small", MaximumMessageSize="1024")
    backend = await opened(server.account())
    with pytest.raises(MalformedMessage, match="1024 bytes"):
        await backend.publish(ref("sqs_small"), b"x" * 1025)
    for body, says in {
        b"x" * (sqs_service.MOST_BYTES + 1): "1048577 bytes",
        b"a\x0bb": "text",
        b"\xff": "text",
    }.items():
        with pytest.raises(MalformedMessage, match=says):
            await backend.publish(ref("sqs_small"), body)
    await backend.publish(ref("sqs_small"), "ünï\u2028 \U0001f600\r\n\t".encode())
    assert (await first(backend, ref("sqs_small"))).body == "ünï\u2028 \U0001f600\r\n\t".encode()


async def test_messages_of_a_fifo_queue_do_not_wait_for_each_other(server, opened):
    server.create("sqs_q.fifo", ContentBasedDeduplication="true")
    backend = await opened(server.account())
    for _ in range(2):
        await backend.publish(ref("sqs_q.fifo"), b"same")  # published anew, and meant
    one, two = await first(backend, ref("sqs_q.fifo")), await first(backend, ref("sqs_q.fifo"))
    assert await one.requeue()
    again = await first(backend, ref("sqs_q.fifo"))
    assert (again.body, again.redelivered) == (b"same", True)
    assert await again.ack()
    assert await two.ack()


async def test_with_more_queues_than_polls_each_has_its_turn(server, opened, monkeypatch):
    monkeypatch.setattr(sqs, "POLLS", 2)
    queues = [ref(f"sqs_{n}") for n in range(7)]
    for queue in queues:
        server.create(queue.name)
    backend = await opened(server.account(), SqsTiming(poll_secs=4))
    waiting = [asyncio.create_task((await backend.consumer(queue)).next()) for queue in queues]
    for queue in reversed(queues):
        await backend.publish(queue, queue.name.encode())
        got = await asyncio.wait_for(waiting[queues.index(queue)], 60)
        assert got.body.decode() == queue.name
        assert await got.ack()


# -- holding


async def test_a_message_is_held_for_as_long_as_its_run_takes(server, opened):
    server.create("sqs_long")
    here, there = await opened(server.account()), await opened(server.account())
    await here.publish(ref("sqs_long"), b"x")
    delivery = await first(here, ref("sqs_long"))
    with pytest.raises(TimeoutError):  # longer than the poll and the visibility of the receipt together
        await asyncio.wait_for((await there.consumer(ref("sqs_long"))).next(), 15)
    assert not delivery.lost.is_set()
    assert await delivery.ack()
    assert server.depth("sqs_long") + server.held("sqs_long") == 0


async def test_extending_holds_it_that_long_at_once(server, opened):
    server.create("sqs_extend")
    backend = await opened(server.account())
    await backend.publish(ref("sqs_extend"), b"x")
    delivery = await first(backend, ref("sqs_extend"))
    await delivery.extend(500)
    assert delivery._until - sqs_access.clock() > 490
    await delivery.extend(10**9)  # no longer than SQS allows
    assert delivery._until - delivery._since <= TIMING.hold_limit_secs
    assert not delivery.lost.is_set()
    assert await delivery.ack()


async def test_a_handle_whose_time_is_over_is_never_used(server, opened, monkeypatch):
    server.create("sqs_frozen")
    backend = await opened(server.account())
    for _ in range(3):
        await backend.publish(ref("sqs_frozen"), b"x")
    acked, requeued, held = [await first(backend, ref("sqs_frozen")) for _ in range(3)]
    real = sqs_access.clock
    monkeypatch.setattr(sqs_delivery, "clock", lambda: real() + 100)  # this machine was asleep
    assert await acked.ack() is False
    assert await requeued.requeue() is False
    await asyncio.wait_for(held.lost.wait(), SOON)
    assert held.superseded  # another runner had the time to take it
    await reaches(lambda: server.depth("sqs_frozen") == 3)


async def test_what_a_poll_brings_after_the_pause_goes_back(server, opened):
    server.create("sqs_pause")
    here, there = [await opened(server.account(), SqsTiming(poll_secs=20)) for _ in range(2)]
    asked, answered = polls(here)
    consumer = await here.consumer(ref("sqs_pause"))
    waiting = asyncio.create_task(consumer.next())
    assert await asyncio.to_thread(asked.wait, SOON)
    waiting.cancel()
    await asyncio.wait((waiting,))
    await consumer.pause()
    await there.publish(ref("sqs_pause"), b"x")
    assert await asyncio.to_thread(answered.wait, SOON)
    await reaches(lambda: server.depth("sqs_pause") == 1)
    delivery = await first(there, ref("sqs_pause"))
    assert delivery.redelivered
    assert await delivery.ack()


async def test_what_a_poll_brings_after_the_end_goes_back(server, opened):
    server.create("sqs_end")
    here, there = [await opened(server.account(), SqsTiming(poll_secs=20)) for _ in range(2)]
    asked, _ = polls(here)
    waiting = asyncio.create_task((await here.consumer(ref("sqs_end"))).next())
    assert await asyncio.to_thread(asked.wait, SOON)
    await here.aclose()
    with pytest.raises(QueueUnavailable):
        await asyncio.wait_for(waiting, SOON)
    await there.publish(ref("sqs_end"), b"x")
    assert await (await first(there, ref("sqs_end"))).ack()


async def test_what_is_put_back_at_the_end_is_not_hidden_by_a_poll_of_its_own(server, opened):
    server.create("sqs_drain")
    backend = await opened(server.account(), SqsTiming(poll_secs=20))
    real, under_way = backend._service.receive, []

    def receive(*args: Any, **more: Any) -> Any:
        under_way.append("poll")
        try:
            return real(*args, **more)
        finally:
            under_way.pop()

    backend._service.receive = receive
    await backend.publish(ref("sqs_drain"), b"x")
    consumer = await backend.consumer(ref("sqs_drain"))
    delivery = await asyncio.wait_for(consumer.next(), SOON)
    with pytest.raises(TimeoutError):  # it asks for one more
        await asyncio.wait_for(consumer.next(), 0.5)
    await consumer.close()
    assert await delivery.requeue()
    await backend.aclose()  # and the process ends
    assert not under_way  # it would get the message, and nobody would give it back
    assert (server.depth("sqs_drain"), server.held("sqs_drain")) == (1, 0)


async def test_what_a_poll_brings_after_its_account_was_removed_goes_back(server, opened, tmp_path):
    server.create("sqs_removed")
    files = profile(tmp_path, server.user, f"[default]\nregion = us-east-1\nendpoint_url = {server.url}\n")
    here = await opened(
        SqsAccount(label="account", profile=files), SqsTiming(poll_secs=20, visibility_secs=3600)
    )
    asked, answered = polls(here)
    await here.discover()
    waiting = asyncio.create_task((await here.consumer(ref("sqs_removed"))).next())
    assert await asyncio.to_thread(asked.wait, SOON)
    files.credentials_file.unlink()
    await here.aclose()
    with pytest.raises(QueueUnavailable):
        await waiting
    server.send("sqs_removed", b"x")
    assert await asyncio.to_thread(answered.wait, SOON)
    await reaches(lambda: (server.depth("sqs_removed"), server.held("sqs_removed")) == (1, 0))


async def in_a_process(server: SqsServer, script: str, *, queue: str) -> list[str]:
    """Words that a process prints in which `script` uses a backend."""
    program = f"""
import asyncio, sys, threading, time
from runner.queues.base import QueueRef
from runner.queues.sqs import SqsBackend
from runner.queues.sqs_account import SqsAccount, SqsKeys
async def main():
    keys = SqsKeys(access_key={server.user.access_key!r}, secret_key=sys.argv[1])
    account = SqsAccount(label="account", region="us-east-1", keys=keys, endpoint_url={server.url!r})
    backend = SqsBackend(account)
    await backend.open()
    queue = QueueRef(account="account", name={queue!r})
{textwrap.indent(textwrap.dedent(script), "    ")}
asyncio.run(main())
"""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program, server.user.secret_key],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


async def test_a_process_that_ends_does_not_wait_for_its_polls(server):
    server.create("sqs_exit")
    printed = await in_a_process(
        server,
        """
        polling, receive = threading.Event(), backend._service.receive
        def began(*args, **more):
            print(time.monotonic())
            polling.set()
            return receive(*args, **more)
        backend._service.receive = began
        waiting = asyncio.create_task((await backend.consumer(queue)).next())
        assert await asyncio.to_thread(polling.wait, 60)
        await backend.aclose()
        print("closed", "boto3" in sys.modules, "pika" in sys.modules)
        await asyncio.wait([waiting])
        print(type(waiting.exception()).__name__)
        """,
        queue="sqs_exit",
    )
    polling_since = float(printed.pop(0))
    assert printed == ["closed", "False", "False", "QueueUnavailable"]
    assert time.monotonic() - polling_since < 18  # a poll takes 20
