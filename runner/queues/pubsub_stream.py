"""One StreamingPull of Google's library, for one message. Imports the library."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
from google.api_core import exceptions
from google.pubsub_v1 import types
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport

from runner.queues import pubsub_errors
from runner.queues import pubsub_wire as wire

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

#: A message that was sent but never seen here (its connection broke) is sent again after this: the least that is allowed.
STREAM_DEADLINE_SECS = int(wire.FIRST_LEASE_SECS)
HEARTBEAT_SECS = 30.0  #: an open stream that says nothing for longer is ended by the service
FINISH_SECS = 2.0  #: how long a stream may take to end after we said that we want no more


class StreamChannel:
    """A connection for streams, and how many use it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.transport = SubscriberGrpcAsyncIOTransport(channel=channel)
        self.streams = 0


class Stream:
    """One StreamingPull. The service sends one message and no further before that is ended; then comes `finish`.

    A stream is not kept for the next message: how many it may have outstanding is fixed when it opens, and a message
    is held here for as long as its run lives.
    """

    def __init__(self, channel: StreamChannel, subscription: str) -> None:
        self._channel = channel
        self._subscription = subscription
        self._finish = asyncio.Event()
        self._cancel: Callable[[], object] = self._finish.set

    def finish(self) -> None:
        """Ask for no more. What is already on its way still comes, then `messages` ends, at the latest after two seconds."""
        if not self._finish.is_set():
            self._finish.set()
            asyncio.get_running_loop().call_later(FINISH_SECS, self._cancel)

    async def messages(self) -> AsyncGenerator[list[wire.Received], None]:
        """What arrives, as it arrives, until the stream ends. Raises `pubsub_wire`'s errors.

        Closing it early (`contextlib.aclosing`) abandons what is on its way: that comes again after ten seconds.
        """
        self._channel.streams += 1
        streaming_pull: Any = self._channel.transport.streaming_pull  # annotated as if it were a unary call
        call = streaming_pull(
            self._requests(),
            metadata=(("x-goog-request-params", f"subscription={self._subscription}"),),
            wait_for_ready=True,
        )
        self._cancel = call.cancel
        try:
            while True:
                # A task of its own, because grpc ends the whole call when a reader is cancelled.
                reading = asyncio.ensure_future(call.read())
                await asyncio.wait((reading,))
                if reading.cancelled():  # by `finish`
                    return
                response = reading.result()
                if response is grpc.aio.EOF:
                    if not self._finish.is_set():
                        raise wire.Away("the stream was ended")
                    return
                if response.received_messages:
                    yield _received(response)
        except grpc.aio.AioRpcError as error:
            raise pubsub_errors.translated(exceptions.from_grpc_error(error)) from error
        finally:
            call.cancel()
            self._channel.streams -= 1

    async def _requests(self) -> AsyncIterator[types.StreamingPullRequest]:
        # Without a client_id: the next stream must not inherit this one's outstanding message.
        yield types.StreamingPullRequest(
            subscription=self._subscription,
            stream_ack_deadline_seconds=STREAM_DEADLINE_SECS,
            max_outstanding_messages=1,
        )
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_SECS):
                    await self._finish.wait()
            except TimeoutError:
                yield types.StreamingPullRequest()
            else:
                return


def _received(response: types.StreamingPullResponse) -> list[wire.Received]:
    exactly_once = response.subscription_properties.exactly_once_delivery_enabled
    return [
        wire.Received(
            ack_id=one.ack_id,
            message_id=one.message.message_id,
            body=one.message.data,
            attributes=dict(one.message.attributes),
            attempt=one.delivery_attempt,
            exactly_once=exactly_once,
        )
        for one in response.received_messages
    ]
