"""What a client of StudioML does on RabbitMQ, and the runner never does: declare a queue, and delete it (INTEROP.md 2.2)."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Self

import pika
from pika import exceptions

from runner import errors
from runner.queues import base, rabbitmq, rabbitmq_connection, rabbitmq_management

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PRECONDITION_FAILED = 406  #: AMQP's reply code
BLOCKED_SECS = 30.0  #: how long a broker that is out of memory or disk may keep us waiting


class RabbitmqPublisher:
    """One blocking connection, for programs that submit. Used from one thread, as a context manager.

    Every method raises `errors.QueueUnavailable` when the broker does not answer or refuses.
    """

    def __init__(self, url: str) -> None:
        """As `rabbitmq.RabbitmqBackend` takes it; queues are those of its vhost. Raises `errors.UsageError`. No I/O."""
        self._parameters = rabbitmq.parameters(url)
        if self._parameters.blocked_connection_timeout is None:
            self._parameters.blocked_connection_timeout = BLOCKED_SECS
        self._label = f"amqp://{rabbitmq_management.bracket(self._parameters.host)}:{self._parameters.port}"
        self._connection: pika.BlockingConnection | None = None

    def __enter__(self) -> Self:
        """Connect."""
        with self._translated():
            self._connection = pika.BlockingConnection(self._parameters)
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect."""
        assert self._connection is not None
        with contextlib.suppress(exceptions.AMQPError):
            self._connection.close()

    def declare_like_client(self, queue: str, *, durable: bool) -> None:
        """Make sure that the exchange, the queue and its binding are there, made as the real client makes them.

        What is there already is used as it is: declaring it with other properties would be an error. The exchange
        deletes itself with its last binding, as the real client's does.
        """
        exchange, key = rabbitmq_management.EXCHANGE, rabbitmq_management.KEY_PREFIX + queue
        with self._translated():
            self._ensure(
                lambda channel: channel.exchange_declare(exchange, passive=True),
                lambda channel: channel.exchange_declare(exchange, "topic", durable=True, auto_delete=True),
            )
            self._ensure(
                lambda channel: channel.queue_declare(queue, passive=True),
                lambda channel: channel.queue_declare(queue, durable=durable),
            )
            with self._channel() as channel:
                channel.queue_bind(queue, exchange, key)

    def is_durable(self, queue: str) -> bool:
        """Whether an existing queue survives the broker: messages in it should then do so too. Declares nothing new.

        AMQP has no question for it: declaring the queue as a durable one is refused when it is none.
        """
        with self._translated():
            try:
                with self._channel() as channel:
                    channel.queue_declare(queue, passive=True)
                    channel.queue_declare(queue, durable=True)
            except exceptions.ChannelClosedByBroker as error:
                # Other arguments of its own (a quorum queue's type) are objected to only when durability agrees.
                if error.reply_code != PRECONDITION_FAILED:
                    raise
                return "inequivalent arg 'durable'" not in error.reply_text
        return True

    def publish(self, queue: str, body: bytes, *, durable: bool) -> None:
        """Publish as the real client does, confirmed; the message survives the broker iff `durable`.

        Raises `base.QueueGone` when no queue is bound under that name.
        """
        properties = pika.BasicProperties(
            content_type="application/json", app_id="studioml", delivery_mode=2 if durable else None
        )
        with self._translated(), self._channel() as channel:
            channel.confirm_delivery()
            try:
                channel.basic_publish(
                    rabbitmq_management.EXCHANGE,
                    rabbitmq_management.KEY_PREFIX + queue,
                    body,
                    properties,
                    mandatory=True,
                )
            except exceptions.UnroutableError as error:
                raise base.QueueGone(queue) from error

    def delete(self, queue: str) -> None:
        """Delete the queue and what it holds: how experimenters cancel. Does nothing when there is none."""
        with self._translated(), self._channel() as channel:
            channel.queue_delete(queue)

    @contextlib.contextmanager
    def _channel(self) -> Iterator[pika.adapters.blocking_connection.BlockingChannel]:
        assert self._connection is not None, "used outside of its `with`"
        channel = self._connection.channel()
        try:
            yield channel
        finally:
            if channel.is_open:
                channel.close()

    def _ensure(self, look: Callable[..., object], declare: Callable[..., object]) -> None:
        try:
            with self._channel() as channel:
                look(channel)
        except exceptions.ChannelClosedByBroker as error:
            if error.reply_code != rabbitmq_connection.NOT_FOUND:
                raise
            with self._channel() as channel:
                declare(channel)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (exceptions.AMQPError, OSError) as error:
            text = f"{self._label}: {rabbitmq_connection.describe(error)}"
            raise errors.QueueUnavailable(text, endpoint=self._label) from error
