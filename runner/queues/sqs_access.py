"""How the parts of the SQS backend reach SQS from the daemon's loop, and the times they keep."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from runner import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from runner.queues.sqs_service import Service
    from runner.queues.sqs_threads import Threads

T = TypeVar("T")
P = ParamSpec("P")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqsTiming:
    """Seconds. The defaults are for AWS."""

    call_secs: float = 15.0  #: a call's deadline (`--sqs-timeout`)
    poll_secs: int = 20  #: a long poll: the most that SQS allows
    visibility_secs: int = 45  #: how long a message stays ours without renewal; renewed when a third is over
    hold_limit_secs: float = 12 * 3600.0  #: SQS's own limit for one receipt, renewals included
    margin_secs: float = 600.0  #: so long before that limit the message is kept here instead
    offer_secs: float = (
        60.0  #: so long what an earlier daemon kept is offered here first, before it is sent again
    )
    confirm_secs: float = 3.0  #: between the two looks that prove a queue gone
    retry_secs: float = 2.0  #: after a renewal or a deletion that got no answer


def clock() -> float:
    """Seconds that go on while the machine sleeps, as the broker's do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def backoff(failures: int, longest: float) -> float:
    """Seconds to wait after so many failures in a row: doubling, capped, with half of it jitter."""
    return min(longest, 0.5 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """SQS, for the loop: short calls, each with a deadline."""

    label: str
    service: Service
    threads: Threads
    timing: SqsTiming

    async def call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work(*args, **kwargs)` in a thread. Raises what it raises, and `errors.QueueUnavailable` at the deadline.

        Neither the deadline nor a cancellation stops the call itself: it may still have its effect.
        """
        secs = self.timing.call_secs
        try:
            async with asyncio.timeout(secs):
                return await self.threads.run(work, *args, **kwargs)
        except TimeoutError as error:
            raise errors.QueueUnavailable(
                f"{self.label}: no answer within {secs:g} s", endpoint=self.label
            ) from error
