"""What RabbitMQ's management API tells: which queues there are, and whether one is durable (INTEROP.md 2.3)."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import socket
import ssl
import time
import urllib.parse
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import orjson

from runner import errors

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
P = ParamSpec("P")

DEADLINE_SECS = 10.0
MAX_BYTES = 128 * 1024 * 1024  #: an answer about 10 000 queues has 4 MB
EXCHANGE = "StudioML.topic"
KEY_PREFIX = "StudioML."

_CHUNK_BYTES = 256 * 1024
_THREADS = 4  #: discovery, counts, and questions about single queues


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueueFacts:
    """What was decided of a queue when it was declared."""

    durable: bool  #: it survives its broker
    quorum: bool  #: it is replicated


class Listed(NamedTuple):
    """A queue in the list of all."""

    ready: int | None  #: messages that wait, as of some seconds ago; None where that is not told
    facts: QueueFacts | None  #: None where they are not told


class Management:
    """The management API of one broker. Each call is one HTTP request with a deadline; redirects are not followed."""

    def __init__(self, url: str, *, user: str, password: str, tls: ssl.SSLContext | None = None) -> None:
        """`url` may have credentials and a path of its own; `user` and `password` serve when it has none. No I/O.

        Raises `errors.UsageError`.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise errors.UsageError(f"the management URL is not one: {error}") from error
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise errors.UsageError("the management URL must read http://host:port or https://host:port")
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._host = parts.hostname
        self._port = port or (15671 if self._tls else 15672)
        self._path = parts.path.rstrip("/")
        self.label = (
            f"{parts.scheme}://{bracket(self._host)}:{self._port}{self._path}"  #: without credentials
        )
        if parts.username is not None:
            user = urllib.parse.unquote(parts.username)
            password = urllib.parse.unquote(parts.password or "")
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._headers = {"Authorization": f"Basic {token}", "Accept": "application/json"}
        # Of its own: the loop's common threads may all be busy with uploads, or with a storage server that is silent.
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix=self.label)

    def close(self) -> None:
        """Let go of the threads; requests under way end by their deadline."""
        self._threads.shutdown(wait=False)

    async def work_queues(self) -> list[tuple[str, str]]:
        """(vhost, queue) of everything bound as a StudioML client binds, sorted, response queues left out.

        One request whatever the number of vhosts and queues. Raises `errors.QueueUnavailable`.
        """
        status, body = await self._get("/api/bindings")
        return await self._run(_work_queues, self._answer(status, body))

    async def queues(self) -> dict[tuple[str, str], Listed]:
        """Every (vhost, queue) there is, with the messages that wait in it.

        One request whatever the number of vhosts and queues. Raises `errors.QueueUnavailable`.
        """
        # Without the statistics it costs the broker half; brokers that do not know these words ignore them.
        status, body = await self._get(
            "/api/queues?disable_stats=true&enable_queue_totals=true"
            "&columns=vhost,name,durable,type,messages_ready"
        )
        return await self._run(_listed, self._answer(status, body))

    async def queue(self, vhost: str, queue: str) -> QueueFacts | None:
        """What kind of queue that is; None when there is no such queue. Raises `errors.QueueUnavailable`."""
        path = "/".join(urllib.parse.quote(part, safe="") for part in (vhost, queue))
        status, body = await self._get(f"/api/queues/{path}?columns=durable,type")
        if status == http.HTTPStatus.NOT_FOUND:
            return None
        answer = orjson.loads(self._answer(status, body))
        return _facts(answer) if isinstance(answer, dict) else None

    def _answer(self, status: int, body: bytes) -> bytes:
        if status == http.HTTPStatus.OK:
            return body
        if status == http.HTTPStatus.UNAUTHORIZED:
            raise self._unavailable(
                "refuses the user (401): its password is wrong, or it lacks the `management` tag "
                "(rabbitmqctl set_user_tags USER management)"
            )
        raise self._unavailable(f"answers with status {status}")

    def _unavailable(self, text: str) -> errors.QueueUnavailable:
        return errors.QueueUnavailable(f"the management API at {self.label} {text}", endpoint=self.label)

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work(*args)` in a thread. Raises what it raises, and `errors.QueueUnavailable` once it is closed."""
        try:
            future = self._threads.submit(work, *args, **kwargs)
        except RuntimeError as error:
            raise self._unavailable("is not asked any more") from error
        return await asyncio.wrap_future(future)

    async def _get(self, path: str) -> tuple[int, bytes]:
        connection: http.client.HTTPConnection
        if self._tls is not None:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=DEADLINE_SECS, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=DEADLINE_SECS)
        try:
            async with asyncio.timeout(DEADLINE_SECS):
                return await self._run(self._exchange, connection, self._path + path)
        except TimeoutError as error:
            raise self._unavailable(f"does not answer within {DEADLINE_SECS:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise self._unavailable(f"does not answer: {error}") from error
        finally:
            # Ends the thread's read too, when the wait for it was given up.
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _exchange(self, connection: http.client.HTTPConnection, path: str) -> tuple[int, bytes]:
        until = time.monotonic() + DEADLINE_SECS
        with contextlib.closing(connection):
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            body = bytearray()
            while chunk := response.read1(_CHUNK_BYTES):
                body += chunk
                if len(body) > MAX_BYTES:
                    raise http.client.HTTPException(f"more than {MAX_BYTES} bytes")
                if time.monotonic() > until:
                    raise TimeoutError
            return response.status, bytes(body)


def bracket(host: str) -> str:
    """The host as a URL writes it."""
    return f"[{host}]" if ":" in host else host


def _list(body: bytes) -> list[Any]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise errors.QueueUnavailable(f"the management API's answer is not JSON: {error}") from error
    return found if isinstance(found, list) else []


def _work_queues(body: bytes) -> list[tuple[str, str]]:
    return sorted({work for binding in _list(body) if (work := _work_queue(binding))})


def _listed(body: bytes) -> dict[tuple[str, str], Listed]:
    found = {}
    for queue in _list(body):
        if isinstance(queue, dict):
            ready = queue.get("messages_ready")
            found[str(queue.get("vhost")), str(queue.get("name"))] = Listed(
                ready if isinstance(ready, int) else None, _facts(queue)
            )
    return found


def _facts(queue: dict[str, Any]) -> QueueFacts | None:
    if not isinstance(durable := queue.get("durable"), bool):
        return None
    return QueueFacts(durable=durable, quorum=queue.get("type") == "quorum")


def _work_queue(binding: Any) -> tuple[str, str] | None:
    """(vhost, queue) of one binding, if a client of StudioML made it for work."""
    if not isinstance(binding, dict) or binding.get("source") != EXCHANGE:
        return None
    queue, vhost = binding.get("destination"), binding.get("vhost")
    if not isinstance(queue, str) or not isinstance(vhost, str) or queue.endswith("_response"):
        return None
    if binding.get("destination_type") != "queue" or binding.get("routing_key") != KEY_PREFIX + queue:
        return None
    return vhost, queue
