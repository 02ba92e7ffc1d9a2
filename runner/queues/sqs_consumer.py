"""Long polls for one queue. A poll that is under way is never broken off: what it brings is handed out later, or given back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.queues import base
from runner.queues.sqs_access import backoff
from runner.queues.sqs_service import AccountRefused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = structlog.get_logger(__name__)

UNREACHABLE_DELAY_SECS = (
    5.0  #: longest pause while nobody answers: a broker that returns is used within seconds
)
SILENT_FAILURES = (
    5  #: so many in a row, some ten seconds, are no news: discovery tells of an account that is away
)
REFUSED_DELAY_SECS = 30.0  #: longest pause while we are refused: asking again changes little


class SqsConsumer(base.Consumer):
    """One queue. At most one poll is under way, and only while somebody waits is another one begun."""

    def __init__(
        self,
        queue: base.QueueRef,
        *,
        receive: Callable[[base.QueueRef], Awaitable[base.Delivery | None]],
        give_back: Callable[[base.Delivery], None],
        on_close: Callable[[SqsConsumer], None],
    ) -> None:
        """`receive` is one long poll; `give_back` requeues beside the work."""
        self._queue = queue
        self._receive = receive
        self._give_back = give_back
        self._on_close = on_close
        self._polling: asyncio.Task[base.Delivery | None] | None = None
        self._wanted = False  # somebody is in `next`
        self._resting = True  # what arrives is given back
        self._failure: errors.QueueUnavailable | None = None
        self._closed = False

    async def next(self) -> base.Delivery:
        """As the contract says. Raises `errors.QueueUnavailable` only when the account is closed under it."""
        assert not self._closed, "next() after close()"
        self._wanted, self._resting = True, False
        try:
            while True:
                if self._failure is not None:
                    raise self._failure
                if self._polling is None:
                    self._polling = asyncio.create_task(self._poll(), name=f"poll {self._queue}")
                    self._polling.add_done_callback(self._ended)
                polling = self._polling
                await asyncio.wait({polling})
                self._polling = None
                if not polling.cancelled():
                    delivery = polling.result()
                    if delivery is not None and not delivery.lost.is_set():
                        return delivery
        finally:
            self._wanted = False

    async def pause(self) -> None:
        """As the contract says. A poll goes on for up to 20 seconds; what it still brings is given back at once."""
        self._resting = True
        polling = self._polling
        if polling is not None and polling.done():
            self._polling = None
            if (delivery := _result(polling)) is not None:
                await delivery.requeue()

    async def close(self) -> None:
        """As the contract says."""
        if not self._closed:
            self._closed = True
            self._on_close(self)
            await self.pause()

    def fail(self, error: errors.QueueUnavailable) -> None:
        """The account is closed: whoever waits in `next` gets this error."""
        self._failure = error
        if self._polling is not None:
            self._polling.cancel()

    def _ended(self, polling: asyncio.Task[base.Delivery | None]) -> None:
        delivery = _result(polling)
        if self._resting and polling is self._polling:
            self._polling = None
            if delivery is not None:
                self._give_back(delivery)

    async def _poll(self) -> base.Delivery | None:
        """Poll until something has come, or nobody waits any more. Raises `QueueGone`."""
        failures = 0
        while True:
            try:
                delivery = await self._receive(self._queue)
            except errors.QueueUnavailable as error:
                refused = isinstance(error, AccountRefused)
                self._trouble = str(error)
                if failures == (0 if refused else SILENT_FAILURES):
                    log.warning("queue cannot be received from", queue=str(self._queue), error=str(error))
                await asyncio.sleep(
                    backoff(failures, REFUSED_DELAY_SECS if refused else UNREACHABLE_DELAY_SECS)
                )
                failures += 1
                delivery = None
            else:
                failures, self._trouble = 0, ""
            if delivery is not None or not self._wanted:
                return delivery


def _result(polling: asyncio.Task[base.Delivery | None]) -> base.Delivery | None:
    """What a poll that has ended brought; its error concerns only who waits for it."""
    if polling.cancelled() or polling.exception() is not None:
        return None
    return polling.result()
