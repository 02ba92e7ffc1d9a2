"""The thread that owns every pika connection of one account, and the connections that keep themselves up.

pika is not thread-safe and wants its heartbeats sent in time, so its connections live on an event loop of their own, in
a thread of their own: a daemon loop that is busy for a minute costs no connection. `Lane` is the only way across.
Everything here but `Lane` is used inside that thread only.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import random
import re
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from pika import exceptions
from pika.adapters.asyncio_connection import AsyncioConnection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pika.channel import Channel
    from pika.connection import Parameters

log = structlog.get_logger(__name__)

T = TypeVar("T")

FIRST_DELAY_SECS = 0.5
UNREACHABLE_DELAY_SECS = (
    5.0  #: longest pause while nobody answers: a broker that returns is used within seconds
)
REFUSED_DELAY_SECS = (
    30.0  #: longest pause while the broker refuses us (password, vhost): asking again changes little
)
CROSSING_SECS = 5.0  #: beyond a call's own limit, how long the thread may take to tell so
STOP_SECS = 5.0

NOT_FOUND = 404  #: AMQP's reply code


class Closed(Exception):  # noqa: N818 - a state, not a failure
    """The thread is not running: the backend was never opened, or has been closed."""


class Lane:
    """A thread with an event loop; calls cross into it from the daemon's loop, each with a time limit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()

    async def start(self) -> None:
        """Start the thread; returns when its loop runs."""
        # pika reports each failed attempt at ERROR, with stack traces; Link says it once, in our words.
        logging.getLogger("pika").setLevel(logging.CRITICAL)
        running: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._main, args=(running,), name=self._name, daemon=True)
        self._thread.start()
        self._loop = await asyncio.wrap_future(running)

    def _main(self, running: concurrent.futures.Future[asyncio.AbstractEventLoop]) -> None:
        async def until_stopped() -> None:
            running.set_result(asyncio.get_running_loop())
            await self._stop.wait()

        asyncio.run(until_stopped())

    def post(self, func: Callable[..., object], *args: object) -> None:
        """Run `func(*args)` in the thread, soon. Nothing happens when the thread has ended."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                self._loop.call_soon_threadsafe(func, *args)

    async def call(self, func: Callable[..., Awaitable[T]], *args: object, limit: float) -> T:
        """`await func(*args)` in the thread, for at most `limit` seconds.

        Raises TimeoutError, or `Closed`. Cancelling this call does not cancel the other side: it ends by its limit.
        """

        async def bounded() -> T:
            async with asyncio.timeout(limit):
                return await func(*args)

        if self._loop is None or self._loop.is_closed():
            raise Closed
        coroutine = bounded()
        try:
            future = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))
        except RuntimeError as error:  # closed between the question and the call
            coroutine.close()
            raise Closed from error
        future.add_done_callback(_seen)
        await asyncio.wait((future,), timeout=limit + CROSSING_SECS)
        if future.cancelled():  # the thread ended under it; its own CancelledError must not look like ours
            raise Closed
        if not future.done():
            raise TimeoutError
        return future.result()

    async def stop(self) -> None:
        """End the thread, cancelling what still runs there. Bounded and idempotent."""
        if self._thread is not None:
            self.post(self._stop.set)
            await asyncio.to_thread(self._thread.join, STOP_SECS)


def _seen(future: asyncio.Future[Any]) -> None:
    """An error that comes after its caller was cancelled concerns nobody."""
    if not future.cancelled():
        future.exception()


def settle(future: asyncio.Future[T], value: T) -> None:
    """Give `future` its result, unless it has ended already."""
    if not future.done():
        future.set_result(value)


def fail(future: asyncio.Future[Any], error: BaseException) -> None:
    """Let `future` raise, unless it has ended already."""
    if not future.done():
        future.set_exception(error)


def backoff(failures: int, longest: float) -> float:
    """Seconds to wait after so many failures in a row: doubling, capped, with half of it jitter."""
    return min(longest, FIRST_DELAY_SECS * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0)


def cause(error: BaseException) -> BaseException:
    """What really happened, out of the wrappings of pika's connection workflow."""
    while True:
        inner = getattr(error, "exceptions", None) or getattr(error, "exception", None) or error.args
        if isinstance(inner, (list, tuple)) and inner:
            inner = inner[-1]
        if not isinstance(inner, BaseException):
            return error
        error = inner


def is_refusal(error: BaseException) -> bool:
    """Whether somebody answered and will not have us, so that asking again soon is no use."""
    refusals = (
        exceptions.ConnectionClosedByBroker,
        exceptions.ProbableAuthenticationError,
        exceptions.ProbableAccessDeniedError,
        ssl.SSLError,
    )
    return isinstance(cause(error), refusals)


def describe(error: BaseException) -> str:
    """One line for a person. pika's errors carry no credentials."""
    inner = cause(error)
    return getattr(inner, "reply_text", "") or str(inner) or type(inner).__name__


def is_missing_queue(error: BaseException) -> bool:
    """Whether the broker closed a channel because a queue does not exist.

    Not every 404 says so: in a cluster a queue whose home node is down is "not found" as well.
    """
    return (
        isinstance(error, exceptions.ChannelClosedByBroker)
        and error.reply_code == NOT_FOUND
        and "no queue" in error.reply_text
    )


async def rpc(channel: Channel, method: Callable[..., object], **arguments: object) -> Any:
    """Call a method of `channel` that has an answer, and wait for it. Raises pika's reason when the channel closes."""
    answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    channel.add_on_close_callback(lambda _channel, reason: fail(answered, reason))
    method(callback=lambda frame: settle(answered, frame), **arguments)
    return await answered


class Link:
    """One AMQP connection to one vhost, opened at first need and reopened with back-off until it is closed."""

    def __init__(self, parameters: Parameters, label: str) -> None:
        self.label = label  #: account, vhost and purpose, for logs
        self.failure = "not connected yet"  #: why it is not up, in one line; empty while it is
        self._down_since = time.monotonic()
        self.seen: dict[
            str, int
        ] = {}  #: queue -> the generation of this connection on which it was last there
        self.generation = 0  #: counts connections: the same number means unbroken since
        self._parameters = parameters
        self._connection: AsyncioConnection | None = None
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def broker_version(self) -> tuple[int, ...]:
        """Of the broker that is, or was last, connected: (3, 10, 8); empty when not known."""
        properties = (self._connection.server_properties or {}) if self._connection is not None else {}
        numbers = re.match(r"\d+(\.\d+)*", str(properties.get("version", "")))
        return tuple(int(number) for number in numbers[0].split(".")) if numbers else ()

    @property
    def trouble(self) -> str:
        """Why it is not up, and for how long; empty while it is, or nobody has wanted it. May be read from any thread."""
        failure = self.failure if self._task is not None else ""
        return f"{failure} (for {time.monotonic() - self._down_since:.0f} s)" if failure else ""

    @property
    def channel_max(self) -> int:
        """How many channels the connection may have, as agreed with the broker; 0 before there was one."""
        return int(self._connection.params.channel_max) if self._connection is not None else 0

    def saw(self, queue: str) -> None:
        """The queue is there, now."""
        self.seen[queue] = self.generation

    def unbroken_since_seen(self, queue: str) -> bool:
        """Whether this very connection has seen the queue, so that no restart of the broker can have lost it."""
        return self._up.is_set() and self.seen.get(queue) == self.generation

    async def channel(self) -> Channel:
        """A new open channel; waits until the connection is up. Raises pika's AMQPError when that breaks under way."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_up(), name=self.label)
        connection = await self._open_connection()
        opened: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        channel = connection.channel(on_open_callback=lambda channel: settle(opened, channel))
        channel.add_on_close_callback(lambda _channel, reason: fail(opened, reason))
        try:
            return await opened
        except asyncio.CancelledError:
            discard(channel)
            raise

    async def _open_connection(self) -> AsyncioConnection:
        while True:
            await self._up.wait()
            if self._connection is not None and self._connection.is_open:
                return self._connection
            self._up.clear()  # it is breaking: its channels hear of that before `_keep_up` does

    async def close(self) -> None:
        """Close the connection, waiting for the broker's answer if it gives one. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _keep_up(self) -> None:
        failures = 0
        while True:
            try:
                connection, closed = await self._connect()
            except Exception as error:  # noqa: BLE001 - pika has no common root for these, and a link never gives up
                self._note_failure(error, first=failures == 0)
                longest = REFUSED_DELAY_SECS if is_refusal(error) else UNREACHABLE_DELAY_SECS
                await asyncio.sleep(backoff(failures, longest))
                failures += 1
                continue
            failures = 0
            self._connection = connection
            self.generation += 1
            self.failure = ""
            self._up.set()
            log.info("broker connection is up", link=self.label, connection=self.generation)
            try:
                reason = await asyncio.shield(closed)
            except asyncio.CancelledError:
                await _close(connection, closed)
                raise
            finally:
                self._up.clear()
            self._note_failure(reason, first=True)
            await asyncio.sleep(backoff(failures, UNREACHABLE_DELAY_SECS))

    def _note_failure(self, error: BaseException, *, first: bool) -> None:
        if not self.failure:
            self._down_since = time.monotonic()
        self.failure = describe(error)
        emit = log.warning if first else log.debug
        emit("broker connection is down", link=self.label, error=self.failure)

    async def _connect(self) -> tuple[AsyncioConnection, asyncio.Future[BaseException]]:
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[AsyncioConnection] = loop.create_future()
        closed: asyncio.Future[BaseException] = loop.create_future()
        connection = AsyncioConnection(
            self._parameters,
            on_open_callback=lambda connection: settle(opened, connection),
            on_open_error_callback=lambda _connection, error: fail(opened, _as_exception(error)),
            on_close_callback=lambda _connection, error: settle(closed, error),
            custom_ioloop=loop,
        )
        try:
            await opened
        except asyncio.CancelledError:
            with contextlib.suppress(exceptions.ConnectionWrongStateError):
                connection.close()
            raise
        return connection, closed


async def _close(connection: AsyncioConnection, closed: asyncio.Future[BaseException]) -> None:
    with contextlib.suppress(exceptions.ConnectionWrongStateError):
        connection.close()
    await asyncio.wait((closed,), timeout=STOP_SECS / 2)


def _as_exception(error: BaseException | str) -> BaseException:
    return error if isinstance(error, BaseException) else exceptions.AMQPConnectionError(error)


def discard(channel: Channel) -> None:
    """Close a channel, if it is still open, without waiting for the answer."""
    with contextlib.suppress(exceptions.ChannelWrongStateError, exceptions.ConnectionWrongStateError):
        channel.close()


async def close_all(links: list[Link]) -> None:
    """Close several connections at once."""
    await asyncio.gather(*(link.close() for link in links))
