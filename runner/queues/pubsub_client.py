"""Google's Pub/Sub library, and the only module that imports it: some 50 MB and 0.7 s, paid when an account is used.

The library's low-level clients over `grpc.aio`, in the daemon's loop; not its `SubscriberClient.subscribe`, which has
threads of its own, ends leases after an hour, and cannot stop at one message.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, NamedTuple

import grpc
import structlog
from google.api_core import grpc_helpers_async
from google.auth import exceptions as auth_exceptions
from google.oauth2 import service_account
from google.pubsub_v1 import PublisherAsyncClient, SubscriberAsyncClient, types
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport

from runner.queues import pubsub_errors
from runner.queues import pubsub_wire as wire
from runner.queues.pubsub_stream import Stream, StreamChannel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from runner.queues.pubsub_account import PubsubAccount, PubsubTimes

log = structlog.get_logger(__name__)

PAGE_SIZE = 1000
#: Google's servers take 100 calls at a time on a connection, and further ones wait: acks must never be among those.
STREAMS_PER_CHANNEL = 90


class Key(NamedTuple):
    """An account's key as it was at one moment; no credentials for an emulator."""

    credentials: service_account.Credentials | None = None
    written: tuple[int, ...] = ()  #: changes when somebody writes or replaces the file


def load(account: PubsubAccount) -> Key:
    """Read the account's key. Blocks. Raises `wire.Away`."""
    if account.emulator or account.key is None:
        return Key()
    try:
        found = account.key.stat()
        credentials: service_account.Credentials = service_account.Credentials.from_service_account_file(
            str(account.key), scopes=SubscriberGrpcAsyncIOTransport.AUTH_SCOPES
        ).with_always_use_jwt_access(True)  # noqa: FBT003 - signed here: no request to a token server
    except (OSError, ValueError, auth_exceptions.GoogleAuthError) as error:
        raise wire.Away(
            f"the key {account.key} cannot be used: {type(error).__name__}", refused=True
        ) from None
    return Key(credentials, (found.st_ino, found.st_size, found.st_mtime_ns))


class Client:
    """The calls of one account, each with a deadline, none repeated here. Raises `pubsub_wire`'s errors only.

    Made and used in one event loop. Calls go by one connection, streams by others. A key that is refused is read again, once its
    file is another: keys are rotated while messages are held.
    """

    def __init__(self, account: PubsubAccount, key: Key, times: PubsubTimes) -> None:
        self._account = account
        self._key = key
        self._times = times
        self._options = _options(times)
        self._former: list[grpc.aio.Channel] = []  #: opened by an earlier key; calls may be under way there
        self._reading: asyncio.Task[None] | None = None
        self._closed = False
        self._down = False
        self._open()

    def _open(self) -> None:
        self._calls = self._channel()
        self._subscriber = SubscriberAsyncClient(
            transport=SubscriberGrpcAsyncIOTransport(channel=self._calls)
        )
        self._publisher = PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=self._calls))
        self._pool: list[StreamChannel] = []

    @property
    def _channels(self) -> list[grpc.aio.Channel]:
        return [self._calls, *(one.channel for one in self._pool)]

    async def close(self) -> None:
        """Close every connection. Idempotent."""
        self._closed = True
        if self._reading is not None:
            self._reading.cancel()
        await asyncio.gather(*(channel.close() for channel in (*self._channels, *self._former)))

    async def work_subscriptions(self) -> list[str]:
        """The short names of the subscriptions that messages can be pulled from. One request per thousand."""
        names = []
        with self._told():
            request = types.ListSubscriptionsRequest(
                project=f"projects/{self._account.project}", page_size=PAGE_SIZE
            )
            pager = await self._subscriber.list_subscriptions(
                request=request, retry=None, timeout=self._times.call_secs
            )
            async for page in pager.pages:
                # The plain protobuf messages: proto-plus's wrappers cost more than the request.
                for subscription in types.ListSubscriptionsResponse.pb(page).subscriptions:
                    pushed = subscription.push_config.push_endpoint
                    if not (pushed or subscription.detached):
                        names.append(subscription.name.rpartition("/")[2])
        return names

    async def has_subscription(self, subscription: str) -> bool:
        """Whether it is there."""
        try:
            with self._told():
                await self._subscriber.get_subscription(
                    subscription=self._subscription(subscription), retry=None, timeout=self._times.call_secs
                )
        except wire.Missing:
            return False
        return True

    async def publish(self, topic: str, body: bytes, attributes: Mapping[str, str]) -> None:
        """Publish one message; returns when the service has it."""
        message = types.PubsubMessage(data=body, attributes=dict(attributes))
        with self._told():
            await self._publisher.publish(
                topic=f"projects/{self._account.project}/topics/{topic}",
                messages=[message],
                retry=None,
                timeout=self._times.call_secs,
            )

    async def acknowledge(self, subscription: str, ack_id: str) -> None:
        """Acknowledge one message. Raises `wire.Lapsed` where the service can tell that it was too late."""
        with self._told(lease=True):
            await self._subscriber.acknowledge(
                subscription=self._subscription(subscription),
                ack_ids=[ack_id],
                retry=None,
                timeout=self._times.call_secs,
            )

    async def hold(self, subscription: str, ack_id: str, secs: int) -> None:
        """Keep one message for `secs` from now; 0 gives it back. Raises `wire.Lapsed` like `acknowledge`."""
        with self._told(lease=True):
            await self._subscriber.modify_ack_deadline(
                subscription=self._subscription(subscription),
                ack_ids=[ack_id],
                ack_deadline_seconds=secs,
                retry=None,
                timeout=self._times.call_secs,
            )

    def stream(self, subscription: str) -> Stream:
        """A stream for one message; it waits for its connection as long as that takes."""
        if self._closed:
            raise wire.Away("closed")
        channel = next((one for one in self._pool if one.streams < STREAMS_PER_CHANNEL), None)
        if channel is None:
            channel = StreamChannel(self._channel())
            self._pool.append(channel)
        return Stream(channel, self._subscription(subscription))

    def _subscription(self, name: str) -> str:
        return f"projects/{self._account.project}/subscriptions/{name}"

    def _channel(self) -> grpc.aio.Channel:
        if self._account.emulator:
            return grpc.aio.insecure_channel(self._account.emulator, options=self._options)
        endpoint = self._account.endpoint
        host, colon, _ = endpoint.partition(":")
        return grpc_helpers_async.create_channel(
            endpoint if colon else f"{endpoint}:443",
            credentials=self._key.credentials,
            default_host=host,
            options=self._options,
        )

    async def _read_key_again(self) -> None:
        """A file that is gone or damaged leaves the key as it is: the account was removed, and its runs go on to their end."""
        with contextlib.suppress(wire.Away):
            key = await asyncio.to_thread(load, self._account)
            if key.written != self._key.written and not self._closed:
                self._key = key
                self._former += self._channels
                self._open()

    @contextlib.contextmanager
    def _told(self, *, lease: bool = False) -> Iterator[None]:
        """Turn the library's errors into ours, and say once when the service stops and begins to answer."""
        if self._closed:
            raise wire.Away("closed")
        try:
            yield
        except (*pubsub_errors.ERRORS, grpc.aio.UsageError) as error:
            ours = pubsub_errors.translated(error, lease=lease)
            if isinstance(ours, wire.Away) and not self._down and not self._closed:
                self._down = True
                log.warning("pubsub does not answer", account=self._account.label, error=str(ours))
            if isinstance(ours, wire.Away) and ours.refused and (not self._reading or self._reading.done()):
                self._reading = asyncio.create_task(self._read_key_again(), name="read key again")
            raise ours from error
        if self._down:
            self._down = False
            log.info("pubsub answers again", account=self._account.label)


def _options(times: PubsubTimes) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", -1),  # a message may have 10 MB, grpc's own limit is 4
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", int(times.keepalive_secs * 1000)),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # the one that counts: 60 s by default
        ("grpc.http2.max_pings_without_data", 0),  # a stream may be silent for days
        ("grpc.initial_reconnect_backoff_ms", int(wire.FIRST_DELAY_SECS * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(wire.UNREACHABLE_DELAY_SECS * 1000)),
        ("grpc.use_local_subchannel_pool", 1),  # else channels to one address share one connection
    ]
