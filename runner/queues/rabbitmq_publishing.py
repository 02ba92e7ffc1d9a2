"""Publishing to RabbitMQ with confirms, in the thread of `rabbitmq_connection.Lane`."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

from pika import exceptions, spec

from runner.queues import rabbitmq_connection as wire

if TYPE_CHECKING:
    from pika.channel import Channel


class Publisher:
    """One channel in confirm mode; one message at a time, so that a return needs no guess which message it means."""

    def __init__(self, link: wire.Link) -> None:
        self.link = link
        self._turn = asyncio.Lock()
        self._channel: Channel | None = None
        self._answer: asyncio.Future[bool] | None = None
        self._returned = False

    async def publish(
        self, routes: list[tuple[str, str]], body: bytes, properties: spec.BasicProperties
    ) -> bool:
        """Publish by the first of `routes` (exchange, routing key) that leads to a queue; False when none does.

        Returns when the broker has confirmed. Raises pika's AMQPError when it did not.
        """
        async with self._turn:
            for exchange, key in routes:
                try:
                    if await self._publish(exchange, key, body, properties):
                        return True
                except exceptions.ChannelClosedByBroker as error:
                    # The client's exchange deletes itself with its last queue: not there is just not routable.
                    if error.reply_code != wire.NOT_FOUND:
                        raise
            return False

    async def _publish(self, exchange: str, key: str, body: bytes, properties: spec.BasicProperties) -> bool:
        channel = await self._ready_channel()
        self._answer = asyncio.get_running_loop().create_future()
        self._returned = False
        try:
            channel.basic_publish(exchange, key, body, properties, mandatory=True)
            accepted = await self._answer
        except BaseException:
            self._channel = None  # an answer that is still to come would be taken for the next message's
            wire.discard(channel)
            raise
        if not accepted:
            raise exceptions.AMQPError("the broker refused the message")
        return not self._returned

    async def _ready_channel(self) -> Channel:
        if self._channel is not None and self._channel.is_open:
            return self._channel
        channel = await self.link.channel()
        channel.add_on_return_callback(self._on_return)
        channel.add_on_close_callback(self._on_closed)
        await wire.rpc(
            channel, channel.confirm_delivery, ack_nack_callback=functools.partial(self._on_answer, channel)
        )
        self._channel = channel
        return channel

    def _on_return(self, channel: Channel, *_returned: object) -> None:
        if channel is self._channel:
            self._returned = True

    def _on_answer(self, channel: Channel, frame: object) -> None:
        if channel is self._channel and self._answer is not None:
            wire.settle(self._answer, isinstance(getattr(frame, "method", None), spec.Basic.Ack))

    def _on_closed(self, channel: Channel, reason: BaseException) -> None:
        if channel is self._channel and self._answer is not None:
            wire.fail(self._answer, reason)
