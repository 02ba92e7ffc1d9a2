"""Which class serves which kind of queue; loaded when asked for, so that no vendor's library is imported unused."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.queues.base import QueueBackend

BACKENDS = {
    "local": "runner.queues.filequeue:FileBackend",
    "pubsub": "runner.queues.pubsub:PubsubBackend",
    "rabbitMQ": "runner.queues.rabbitmq:RabbitmqBackend",
    "sqs": "runner.queues.sqs:SqsBackend",
}


def load(kind: str) -> type[QueueBackend]:
    """The backend class of a kind. Raises KeyError for a kind that is not in `BACKENDS`."""
    module, _, name = BACKENDS[kind].partition(":")
    backend: type[QueueBackend] = getattr(importlib.import_module(module), name)
    return backend
