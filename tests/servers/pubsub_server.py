"""A Pub/Sub service for the tests, a program of its own: `python pubsub_server.py PORT [JSON of TLS and key files]`.

Real gRPC, with the real messages. Faithful in what a runner can see: leases that run out, redelivery, flow control of
streams, paging, limits of names and sizes, delivery counts with a dead-letter policy, exactly-once subscriptions.
`/test.Control/Do` is for the tests: JSON in, JSON out.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import datetime as dt
import itertools
import json
import pathlib
import re
import sys

import grpc
from google.protobuf import any_pb2, empty_pb2
from google.pubsub_v1 import types as t
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

Code = grpc.StatusCode
ENDED = "ENDED"  # of a stream, as a fault: the service ends it, and says that all is well
NAME = re.compile(r"projects/[^/]+/(topics|subscriptions)/[A-Za-z][A-Za-z0-9._~+%-]{2,254}")


@dataclasses.dataclass(eq=False)
class Message:
    data: t.PubsubMessage
    attempts: int = 0


@dataclasses.dataclass(eq=False)
class Lease:
    message: Message
    stream: object
    timer: asyncio.TimerHandle


class Subscription:
    def __init__(self, wanted):
        self.wanted = wanted  # the resource as it was asked for
        self.topic = wanted.topic  # the same, without the price of proto-plus
        self.ready: collections.deque[Message] = collections.deque()
        self.leases: dict[str, Lease] = {}
        self.deleted = False
        self.changed = asyncio.Event()
        self.ids = itertools.count(1)

    def notify(self):
        self.changed.set()
        self.changed = asyncio.Event()

    def lease(self, stream, secs):
        message = self.ready.popleft()
        message.attempts += 1
        ack_id = f"{self.wanted.name}:{next(self.ids)}"
        timer = asyncio.get_running_loop().call_later(secs, self.expire, ack_id)
        self.leases[ack_id] = Lease(message, stream, timer)
        counted = message.attempts if self.wanted.dead_letter_policy.dead_letter_topic else 0
        return t.ReceivedMessage(ack_id=ack_id, message=message.data, delivery_attempt=counted)

    def end(self, ack_id):
        lease = self.leases.pop(ack_id, None)
        if lease:
            lease.timer.cancel()
            self.notify()
        return lease

    def expire(self, ack_id):
        lease = self.end(ack_id)
        if lease:
            self.ready.appendleft(lease.message)
            self.notify()

    def extend(self, ack_id, secs):
        lease = self.leases.get(ack_id)
        if lease:
            lease.timer.cancel()
            lease.timer = asyncio.get_running_loop().call_later(secs, self.expire, ack_id)


class Service:
    def __init__(self, verify=None):
        self.topics: set[str] = set()
        self.subscriptions: dict[str, Subscription] = {}
        self.calls: collections.Counter[str] = collections.Counter()
        self.faults: dict[str, str] = {}  # method, or "": the code it fails with
        self.streams: set[asyncio.Task[None] | None] = set()
        self.ids = itertools.count(1)
        self.verify = verify

    async def check(self, method, context):
        self.calls[method] += 1
        if self.verify:
            await self.verify(context)
        fault = self.faults.get(method) or self.faults.get("")
        if fault and fault != ENDED:
            await context.abort(Code[fault], "a fault that the test ordered")

    async def find(self, name, context):
        found = self.subscriptions.get(name)
        if not found:
            await context.abort(Code.NOT_FOUND, f"Resource not found (resource={name.rpartition('/')[2]}).")
        return found

    async def need_name(self, name, context):
        if not NAME.fullmatch(name):
            await context.abort(Code.INVALID_ARGUMENT, f"Invalid resource name given (name={name}).")

    # -- Publisher --------------------------------------------------------------------------------------------------

    async def CreateTopic(self, topic, context):
        await self.need_name(topic.name, context)
        if topic.name in self.topics:
            await context.abort(Code.ALREADY_EXISTS, "Resource already exists in the project")
        self.topics.add(topic.name)
        return topic

    async def GetTopic(self, request, context):
        if request.topic not in self.topics:
            await context.abort(Code.NOT_FOUND, "Resource not found")
        return t.Topic(name=request.topic)

    async def ListTopics(self, request, context):
        return t.ListTopicsResponse(topics=[t.Topic(name=name) for name in sorted(self.topics)])

    async def DeleteTopic(self, request, context):
        await self.GetTopic(request, context)
        self.topics.remove(request.topic)
        for subscription in self.subscriptions.values():
            if subscription.topic == request.topic:
                subscription.topic = subscription.wanted.topic = "_deleted-topic_"
        return empty_pb2.Empty()

    async def Publish(self, request, context):
        if any(not m.data and not m.attributes for m in request.messages):
            await context.abort(Code.INVALID_ARGUMENT, "The request contains an empty message.")
        if sum(len(m.data) for m in request.messages) > 10_000_000:
            await context.abort(
                Code.INVALID_ARGUMENT, "Request payload size exceeds the limit: 10485760 bytes."
            )
        if request.topic not in self.topics:
            await context.abort(Code.NOT_FOUND, "Resource not found")
        ids = [str(next(self.ids)) for _ in request.messages]
        for message, number in zip(request.messages, ids, strict=True):
            message.message_id, message.publish_time = number, dt.datetime.now(dt.UTC)
            for subscription in self.subscriptions.values():
                if subscription.topic == request.topic:
                    subscription.ready.append(Message(message))
                    subscription.notify()
        return t.PublishResponse(message_ids=ids)

    # -- Subscriber -------------------------------------------------------------------------------------------------

    async def CreateSubscription(self, wanted, context):
        await self.need_name(wanted.name, context)
        if wanted.name in self.subscriptions:
            await context.abort(Code.ALREADY_EXISTS, "Resource already exists in the project")
        if wanted.topic not in self.topics:
            await context.abort(Code.NOT_FOUND, "Resource not found")
        wanted.ack_deadline_seconds = wanted.ack_deadline_seconds or 10
        if not 10 <= wanted.ack_deadline_seconds <= 600:
            await context.abort(Code.INVALID_ARGUMENT, "Invalid ack deadline given")
        self.subscriptions[wanted.name] = Subscription(wanted)
        return wanted

    async def GetSubscription(self, request, context):
        return (await self.find(request.subscription, context)).wanted

    async def ListSubscriptions(self, request, context):
        prefix = request.project + "/subscriptions/"
        names = sorted(name for name in self.subscriptions if name.startswith(prefix))
        start, size = int(request.page_token or 0), min(request.page_size or 100, 1000)
        return t.ListSubscriptionsResponse(
            subscriptions=[self.subscriptions[name].wanted for name in names[start : start + size]],
            next_page_token=str(start + size) if start + size < len(names) else "",
        )

    async def DeleteSubscription(self, request, context):
        subscription = await self.find(request.subscription, context)
        del self.subscriptions[request.subscription]
        subscription.deleted = True
        subscription.notify()
        return empty_pb2.Empty()

    async def Pull(self, request, context):
        subscription = await self.find(request.subscription, context)
        while not subscription.ready and not request.return_immediately and not subscription.deleted:
            await subscription.changed.wait()
        count = min(len(subscription.ready), request.max_messages)
        secs = subscription.wanted.ack_deadline_seconds
        return t.PullResponse(received_messages=[subscription.lease(None, secs) for _ in range(count)])

    async def Acknowledge(self, request, context):
        subscription = await self.find(request.subscription, context)
        await self.end(subscription, request.ack_ids, context, subscription.end)
        return empty_pb2.Empty()

    async def ModifyAckDeadline(self, request, context):
        subscription, secs = await self.find(request.subscription, context), request.ack_deadline_seconds
        if not 0 <= secs <= 600:
            await context.abort(Code.INVALID_ARGUMENT, "Invalid ack deadline given")

        def modify(ack_id):
            subscription.extend(ack_id, secs) if secs else subscription.expire(ack_id)

        await self.end(subscription, request.ack_ids, context, modify)
        return empty_pb2.Empty()

    async def end(self, subscription, ack_ids, context, how):
        """Unknown ids are passed over in silence, but for exactly-once subscriptions."""
        invalid = [ack_id for ack_id in ack_ids if ack_id not in subscription.leases]
        for ack_id in ack_ids:
            how(ack_id)
        if invalid and subscription.wanted.enable_exactly_once_delivery:
            info = error_details_pb2.ErrorInfo(
                reason="EXACTLY_ONCE_ACKID_FAILURE",
                domain="pubsub.googleapis.com",
                metadata=dict.fromkeys(invalid, "PERMANENT_FAILURE_INVALID_ACK_ID"),
            )
            detail = any_pb2.Any()
            detail.Pack(info)
            text = "Some acknowledgement ids in the request were invalid."
            status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message=text, details=[detail])
            await context.abort_with_status(rpc_status.to_status(status))

    async def StreamingPull(self, requests, context):
        await self.check("StreamingPull", context)
        first = await anext(requests)
        if not 10 <= first.stream_ack_deadline_seconds <= 600:
            await context.abort(Code.INVALID_ARGUMENT, "Invalid stream ack deadline given")
        subscription, stream, half_closed = (
            await self.find(first.subscription, context),
            object(),
            asyncio.Event(),
        )
        most = first.max_outstanding_messages if first.max_outstanding_messages > 0 else sys.maxsize

        async def listen():
            async for request in requests:
                self.calls["heartbeat"] += 1
                assert not request.subscription, "only in the first request"
                for ack_id in request.ack_ids:
                    subscription.end(ack_id)
            half_closed.set()
            subscription.notify()

        listening = asyncio.create_task(listen())
        task = asyncio.current_task()
        self.streams.add(task)
        try:
            while not half_closed.is_set():
                changed = subscription.changed
                if subscription.deleted:
                    await context.abort(Code.NOT_FOUND, "The subscription was deleted.")
                held = sum(lease.stream is stream for lease in subscription.leases.values())
                if subscription.ready and held < most:
                    message = subscription.lease(stream, first.stream_ack_deadline_seconds)
                    properties = t.StreamingPullResponse.SubscriptionProperties(
                        exactly_once_delivery_enabled=subscription.wanted.enable_exactly_once_delivery
                    )
                    yield t.StreamingPullResponse(
                        received_messages=[message], subscription_properties=properties
                    )
                elif self.faults.get("StreamingPull") == ENDED:
                    return
                elif "StreamingPull" in self.faults:
                    await context.abort(Code[self.faults["StreamingPull"]], "a fault that the test ordered")
                else:
                    await changed.wait()
        finally:
            self.streams.discard(task)
            listening.cancel()

    # -- for the tests ----------------------------------------------------------------------------------------------

    async def Do(self, request, _context):
        order = json.loads(request)
        return json.dumps(getattr(self, "do_" + order.pop("do"))(**order)).encode()

    def do_ready(self, subscription):
        return len(self.subscriptions[subscription].ready)

    def do_held(self, subscription):
        return len(self.subscriptions[subscription].leases)

    def do_expire(self, subscription):
        """All leases run out at once."""
        for ack_id in list(self.subscriptions[subscription].leases):
            self.subscriptions[subscription].expire(ack_id)

    def do_fault(self, faults):
        self.faults = faults
        for subscription in self.subscriptions.values():
            subscription.notify()

    def do_calls(self):
        return self.calls

    def do_streams(self):
        return len(self.streams)


def handlers(service):
    def unary(name, wanted, answer):
        async def call(request, context):
            await service.check(name, context)
            return await getattr(service, name)(request, context)

        serialize = answer.serialize if answer else empty_pb2.Empty.SerializeToString
        return grpc.unary_unary_rpc_method_handler(
            call, request_deserializer=wanted.deserialize, response_serializer=serialize
        )

    publisher = [
        ("CreateTopic", t.Topic, t.Topic),
        ("GetTopic", t.GetTopicRequest, t.Topic),
        ("ListTopics", t.ListTopicsRequest, t.ListTopicsResponse),
        ("DeleteTopic", t.DeleteTopicRequest, None),
        ("Publish", t.PublishRequest, t.PublishResponse),
    ]
    subscriber = [
        ("CreateSubscription", t.Subscription, t.Subscription),
        ("GetSubscription", t.GetSubscriptionRequest, t.Subscription),
        ("ListSubscriptions", t.ListSubscriptionsRequest, t.ListSubscriptionsResponse),
        ("DeleteSubscription", t.DeleteSubscriptionRequest, None),
        ("Pull", t.PullRequest, t.PullResponse),
        ("Acknowledge", t.AcknowledgeRequest, None),
        ("ModifyAckDeadline", t.ModifyAckDeadlineRequest, None),
    ]
    streaming = grpc.stream_stream_rpc_method_handler(
        service.StreamingPull,
        request_deserializer=t.StreamingPullRequest.deserialize,
        response_serializer=t.StreamingPullResponse.serialize,
    )
    rooms = {
        "google.pubsub.v1.Publisher": {one[0]: unary(*one) for one in publisher},
        "google.pubsub.v1.Subscriber": {one[0]: unary(*one) for one in subscriber}
        | {"StreamingPull": streaming},
        "test.Control": {"Do": grpc.unary_unary_rpc_method_handler(service.Do)},
    }
    return [grpc.method_handlers_generic_handler(name, methods) for name, methods in rooms.items()]


def verifier(public_key):
    """Refuses calls that do not carry a token signed by the account's key, for this service."""
    from google.auth import jwt

    async def verify(context):
        token = dict(context.invocation_metadata()).get("authorization", "").removeprefix("Bearer ")
        claims = {}
        try:
            claims = jwt.decode(token, certs=public_key, verify=True)
        except ValueError:
            await context.abort(Code.UNAUTHENTICATED, "Request had invalid authentication credentials.")
        if "aud" not in claims and "pubsub" not in claims.get("scope", ""):
            await context.abort(Code.PERMISSION_DENIED, "User not authorized to perform this action.")

    return verify


async def main(port, files=None):
    options = {
        "grpc.so_reuseport": 0,
        "grpc.max_concurrent_streams": 100,  # as Google's front ends
        "grpc.max_receive_message_length": 12_000_000,
        "grpc.http2.min_recv_ping_interval_without_data_ms": 500,
        "grpc.keepalive_permit_without_calls": 1,
    }
    server = grpc.aio.server(options=list(options.items()))
    read = {name: pathlib.Path(path).read_bytes() for name, path in (files or {}).items()}
    server.add_generic_rpc_handlers(handlers(Service(verifier(read["public"]) if read else None)))
    if read:
        server.add_secure_port(
            f"localhost:{port}", grpc.ssl_server_credentials([(read["tls_key"], read["tls_certificate"])])
        )
    else:
        server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else None))
