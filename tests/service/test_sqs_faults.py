"""Networks and servers that fail: SQS away, cut off, silent, or answering something odd."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from runner.errors import MalformedMessage, QueueUnavailable
from runner.queues import base, sqs_service
from runner.queues.base import Existence, QueueRef
from runner.queues.sqs import SqsBackend
from runner.queues.sqs_access import SqsTiming
from runner.queues.sqs_account import SqsAccount, SqsKeys
from tests.servers.faulty_http import Fault
from tests.servers.proxy import proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.servers.faulty_http import FaultyHttp
    from tests.servers.moto_sqs import SqsServer
    from tests.servers.proxy import Proxy

SOON = 40.0
#: A message is renewed after six seconds, and so kept by a machine that stands still for ten.
TIMING = SqsTiming(call_secs=2, poll_secs=1, visibility_secs=18, confirm_secs=0.1, retry_secs=0.2)
QUEUE = QueueRef(account="account", name="sqs_faults")


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
async def backend(server: SqsServer, way: Proxy) -> AsyncIterator[SqsBackend]:
    backend = SqsBackend(server.account(port=way.port), timing=TIMING)
    await backend.open()
    yield backend
    way.resume()
    await backend.aclose()


@pytest.fixture
async def forgetful(server: SqsServer, way: Proxy) -> AsyncIterator[SqsBackend]:
    """One whose holds run out within the test."""
    backend = SqsBackend(server.account(port=way.port), timing=dataclasses.replace(TIMING, visibility_secs=6))
    await backend.open()
    yield backend
    way.resume()
    await backend.aclose()


async def first(backend: SqsBackend):
    return await asyncio.wait_for((await backend.consumer(QUEUE)).next(), SOON)


def away(way: Proxy) -> None:
    way.refuse()
    way.cut()


@pytest.mark.service
async def test_a_consumer_outlasts_an_outage(server, backend, way):
    waiting = asyncio.create_task(first(backend))
    await asyncio.sleep(0.5)
    away(way)
    await asyncio.sleep(1)
    assert not waiting.done()
    for question in (backend.discover(), backend.publish(QUEUE, b"x")):
        with pytest.raises(QueueUnavailable):
            await asyncio.wait_for(question, SOON)
    assert await backend.existence(QUEUE) is Existence.UNKNOWN
    server.admin.send_message(QueueUrl=server.of(QUEUE.name), MessageBody="x")
    way.listen()
    assert await (await waiting).ack()


@pytest.mark.service
async def test_a_connection_that_is_only_half_there_is_noticed(server, backend, way):
    waiting = asyncio.create_task(first(backend))
    await asyncio.sleep(0.5)
    way.blackhole()  # connections stand, and nothing comes
    with pytest.raises(QueueUnavailable, match="no answer within 2 s"):
        await backend.discover()
    way.cut()
    way.resume()
    server.admin.send_message(QueueUrl=server.of(QUEUE.name), MessageBody="x")
    assert await (await waiting).ack()


@pytest.mark.service
async def test_a_hold_outlasts_a_short_outage(server, backend, way):
    """One in which a renewal fails, and that is over before the hold is."""
    server.send(QUEUE.name, b"x")
    delivery = await first(backend)
    away(way)
    async with asyncio.timeout(SOON):
        while not delivery._retrying:
            await asyncio.sleep(0.02)
    held_until = delivery._until
    way.listen()
    async with asyncio.timeout(SOON):
        while delivery._until == held_until:
            await asyncio.sleep(0.02)
    assert not delivery.lost.is_set()
    assert (server.depth(QUEUE.name), server.held(QUEUE.name)) == (0, 1)
    assert await delivery.ack()


@pytest.mark.service
async def test_an_acknowledgement_waits_for_sqs_while_the_message_is_ours(server, backend, way):
    server.send(QUEUE.name, b"x")
    delivery = await first(backend)
    away(way)
    ending = asyncio.create_task(delivery.ack())
    await asyncio.sleep(1)
    assert not ending.done()
    way.listen()
    assert await asyncio.wait_for(ending, SOON) is True
    assert server.depth(QUEUE.name) + server.held(QUEUE.name) == 0


@pytest.mark.service
async def test_an_acknowledgement_that_is_too_late_says_so(server, forgetful, backend, way):
    server.send(QUEUE.name, b"x")
    delivery = await first(forgetful)
    away(way)
    assert await asyncio.wait_for(delivery.ack(), SOON) is False
    way.listen()
    again = await first(backend)
    assert again.redelivered
    assert await again.ack()


@pytest.mark.service
async def test_a_hold_that_sqs_says_is_lost_is_lost(server, backend, monkeypatch):
    def refuse(*_: object) -> None:
        raise sqs_service.HoldLost

    server.send(QUEUE.name, b"x")
    delivery = await first(backend)
    monkeypatch.setattr(backend._service, "hold", refuse)
    await asyncio.wait_for(delivery.lost.wait(), SOON)
    assert await delivery.ack() is False
    assert await delivery.requeue() is False
    assert server.held(QUEUE.name) == 1


@pytest.mark.service
async def test_closing_is_bounded_while_sqs_is_silent(server, backend, way):
    server.send(QUEUE.name, b"x")
    delivery = await first(backend)
    waiting = asyncio.create_task(first(backend))
    await asyncio.sleep(0.3)
    way.blackhole()
    await asyncio.wait_for(backend.aclose(), SOON)
    assert delivery.lost.is_set()
    with pytest.raises(QueueUnavailable):
        await waiting


# -- answers


@pytest.fixture
async def answering(faulty_http: FaultyHttp) -> AsyncIterator[Callable[..., SqsBackend]]:
    """A backend to whom every question is answered alike, or by these answers in turn."""
    keys = SqsKeys(access_key="AKIACANARY", secret_key="secret-canary", session_token="token-canary")
    account = SqsAccount(label="account", keys=keys, endpoint_url=f"http://{faulty_http.endpoint}")
    # The answer counts here, not its time: a repeat waits for up to a second, and the first call loads boto3.
    backend = SqsBackend(account, timing=dataclasses.replace(TIMING, call_secs=SOON))
    await backend.open()
    backend._service._urls[QUEUE.name] = "http://queue"

    def answer(*faults: Fault) -> SqsBackend:
        faulty_http.always = faults[-1]
        faulty_http.faults.extend(faults[:-1])
        return backend

    yield answer
    await backend.aclose()


def fault(status: int, code: str = "", message: str = "") -> Fault:
    headers = {"Content-Type": "application/x-amz-json-1.0"}
    if code.startswith(("AWS.", "KMS.")):  # how AWS tells the older names of its errors
        headers["x-amzn-query-error"] = f"{code};Sender"
    body = {"__type": f"com.amazonaws.sqs#{code.rpartition('.')[2]}", "message": message}
    return Fault(status=status, headers=headers, body=json.dumps(body).encode())


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (fault(403, "SignatureDoesNotMatch", "x-amz-security-token:token-canary"), "secret key is wrong"),
        (
            fault(403, "InvalidClientTokenId", "The security token is invalid."),
            "does not know this access key",
        ),
        (fault(403, "ExpiredToken", "expired"), "session token has expired"),
        (
            fault(403, "AccessDenied", "User: u is not authorized to perform: sqs:x"),
            "do not allow it: User: u",
        ),
        (fault(400, "KMS.DisabledException", "it is disabled"), "key that encrypts .*: it is disabled"),
        (fault(400, "ThrottlingException", "Rate exceeded"), "ThrottlingException"),
        (fault(503, "ServiceUnavailable", "busy"), "503"),
        (Fault(status=500, body=b"<html>"), "500"),
        (Fault(status=200, headers={"Content-Type": "text/html"}, body=b"<html>"), "not SQS"),
        (fault(400, "InvalidAddress", "odd"), "InvalidAddress"),
    ],
)
async def test_every_answer_that_is_no_help_is_unavailability_without_secrets(answering, told, says):
    backend = answering(told)
    for question in (
        backend.discover(),
        backend.publish(QUEUE, b"x"),
        asyncio.to_thread(backend._service.receive, QUEUE.name, wait_secs=0, visibility_secs=1),
        asyncio.to_thread(backend._service.delete, QUEUE.name, "handle"),
    ):
        with pytest.raises(QueueUnavailable, match=says) as error:
            await question
        assert "canary" not in str(error.value).lower()
    assert await backend.existence(QUEUE) is Existence.UNKNOWN


@pytest.mark.parametrize(
    ("told", "meaning"),
    [
        (fault(400, "ReceiptHandleIsInvalid"), sqs_service.HoldLost),
        (fault(400, "AWS.SimpleQueueService.MessageNotInflight"), sqs_service.HoldLost),
        (
            fault(400, "InvalidParameterValue", "Reason: The receipt handle has expired."),
            sqs_service.HoldLost,
        ),
        (
            fault(
                400,
                "InvalidParameterValue",
                "Reason: Message does not exist or is not available for visibility timeout change.",
            ),
            sqs_service.HoldLost,
        ),
        (
            fault(
                400,
                "InvalidParameterValue",
                "Total VisibilityTimeout for the message is beyond the limit [43200 seconds]",
            ),
            sqs_service.HoldAtItsEnd,
        ),
        (fault(400, "AWS.SimpleQueueService.NonExistentQueue"), base.QueueGone),
        (fault(400, "QueueDoesNotExist"), base.QueueGone),
        (fault(400, "InvalidParameterValue", "anything else"), QueueUnavailable),
    ],
)
async def test_what_aws_says_of_a_hold(answering, told, meaning):
    backend = answering(told)
    with pytest.raises(meaning):
        await asyncio.to_thread(backend._service.hold, QUEUE.name, "handle", 30)


@pytest.mark.parametrize("code", ["InvalidMessageContents", "InvalidParameterValue"])
async def test_a_message_that_sqs_refuses_is_the_message_s_fault(answering, code):
    with pytest.raises(MalformedMessage, match="because"):
        await answering(fault(400, code, "because")).publish(QUEUE, b"x")


def listing(*names: str) -> Fault:
    body = {"QueueUrls": [f"http://sqs/1/{name}" for name in names]}
    return Fault(
        status=200, headers={"Content-Type": "application/x-amz-json-1.0"}, body=json.dumps(body).encode()
    )


NOT_FOUND = fault(
    400, "AWS.SimpleQueueService.NonExistentQueue", "does not exist or you do not have access to it."
)


@pytest.mark.parametrize(
    ("answers", "existence"),
    [
        # who may not see the queue is told that it does not exist
        ([NOT_FOUND, listing("sqs_faults")], Existence.UNKNOWN),
        ([NOT_FOUND, fault(403, "AccessDenied")], Existence.UNKNOWN),
        ([NOT_FOUND, listing(), NOT_FOUND, fault(503, "ServiceUnavailable")], Existence.UNKNOWN),
        ([NOT_FOUND, listing("sqs_faults_2"), NOT_FOUND, listing("sqs_faults_2")], Existence.GONE),
        # who may only list still learns it
        ([fault(403, "AccessDenied"), listing(), fault(403, "AccessDenied"), listing()], Existence.GONE),
    ],
)
async def test_a_queue_is_gone_only_when_it_is_neither_found_nor_listed(answering, answers, existence):
    assert await answering(*answers).existence(QUEUE) is existence
