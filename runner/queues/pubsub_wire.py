"""What crosses between the Pub/Sub backend and Google's library (`pubsub_client`): values and errors, free of both."""

from __future__ import annotations

import dataclasses
import random
import time

FIRST_DELAY_SECS = 0.5
UNREACHABLE_DELAY_SECS = 5.0  #: longest pause while nobody answers
REFUSED_DELAY_SECS = (
    30.0  #: longest pause while we are refused (key, permission): asking again changes little
)

FIRST_LEASE_SECS = 10.0  #: for so long a stream grants a message; the least that Pub/Sub allows

SUFFIX = "_sub"  #: of every subscription that a StudioML client makes (INTEROP.md 2.6)


class WireError(Exception):
    """A call that failed. Its text holds no secret."""


class Missing(WireError):  # noqa: N818 - a state of the world
    """There is no such topic or subscription."""


class Lapsed(WireError):  # noqa: N818 - a state of the world
    """The ack id is not valid any more: the message is not ours. Only exactly-once subscriptions tell this."""


class Away(WireError):  # noqa: N818 - a state of the world
    """No answer, or one that says: not now. `refused`: the answer was that we may not."""

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Received:
    """One message as it arrived."""

    ack_id: str
    message_id: str  #: given by the service, unique in the topic, the same at each delivery
    body: bytes
    attributes: dict[str, str]
    attempt: int  #: deliveries so far, this one included; 0 unless the subscription has a dead-letter policy
    exactly_once: bool  #: the subscription confirms acks and lease extensions


def now() -> float:
    """Seconds of a clock that also runs while the machine is suspended: leases run out meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def backoff(failures: int, *, refused: bool = False) -> float:
    """Seconds to wait after so many failures in a row: doubling, capped, with half of it jitter."""
    longest = REFUSED_DELAY_SECS if refused else UNREACHABLE_DELAY_SECS
    return min(longest, FIRST_DELAY_SECS * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)
