"""What the daemon tells its clients over HTTP, behind the guard of `telemetry.http` (loopback, or a token).

`GET /api/runs`                  runs in progress and recent ones, newest last; `?digest=SHA256`: only those of that message
`GET /api/runs/RUN/output`       what a run in progress has printed; `?offset=BYTES` goes on from there
`GET /api/queues`                the queues that are served, and why one is closed; `?queue=NAME` explains that name
`POST /api/dead-letters/ID`      publish a dead letter anew, at the end of its queue, and remove it
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import sys
import time
from typing import TYPE_CHECKING, Any

import orjson
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from runner import errors
from runner.daemon.queuestate import QueueState
from runner.process.tail import open_regular
from runner.queues.base import QueueGone
from runner.telemetry import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.requests import Request
    from starlette.routing import BaseRoute

    from runner.daemon.active import Active
    from runner.daemon.deadletters import DeadLetters, Entry
    from runner.daemon.dispatch import Dispatcher
    from runner.daemon.runs import Runs
    from runner.queues.base import QueueBackend, QueueRef
    from runner.queues.catalog import Catalog

#: At the most so much of the output in one answer; the client asks again.
CHUNK_BYTES = 1 << 20


class _Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, default=str)


class Api:
    """The pages. Each answers at once, from memory or with one bounded read."""

    def __init__(
        self,
        runs: Runs,
        dispatcher: Dispatcher,
        catalog: Catalog,
        dead_letters: DeadLetters,
        problems: Callable[[], Mapping[str, str]],
    ) -> None:
        """`problems`: credentials that cannot be used, and why."""
        self._problems = problems
        self._runs = runs
        self._dispatcher = dispatcher
        self._catalog = catalog
        self._dead_letters = dead_letters
        self._sending: set[str] = set()  # ids of those that are being published anew

    def routes(self) -> list[BaseRoute]:
        """For `telemetry.http.HttpServer`."""
        return [
            Route("/api/runs", self._list),
            Route("/api/runs/{run}/output", self._output),
            Route("/api/queues", self._queues),
            Route("/api/dead-letters/{id}", self._requeue, methods=["POST"]),
        ]

    async def _list(self, request: Request) -> Response:
        digest = request.query_params.get("digest")
        running = [active for active in self._runs if digest in {None, active.state.digest}]
        recent = [done for done in self._runs.recent if digest in {None, done["digest"]}]
        return _Json(
            {"running": [self._shown(active) for active in running], "recent": redact.redact_value(recent)}
        )

    def _shown(self, active: Active) -> dict[str, Any]:
        summary = active.experiment.summary()
        shown: dict[str, Any] = redact.redact_value(
            summary
            | {
                "queue": str(active.queue.ref),
                "digest": active.state.digest,
                "attempt": active.attempt,
                "status": "running",
                "elapsed_secs": round(time.time() - active.started, 3),
            }
        )
        return shown

    async def _output(self, request: Request) -> Response:
        active = next(
            (active for active in self._runs if active.state.run_id == request.path_params["run"]), None
        )
        if active is None:
            return _Json({"error": "no such run in progress"}, status_code=404)
        try:
            offset = min(max(0, int(request.query_params.get("offset", "0"))), sys.maxsize)
        except ValueError:
            return _Json({"error": "offset takes a number of bytes"}, status_code=400)
        try:
            with open_regular(active.experiment.workspace.output) as file:
                file.seek(offset)
                content = file.read(CHUNK_BYTES)
        except FileNotFoundError:
            content = b""
        return Response(
            content, media_type="application/octet-stream", headers={"x-offset": str(offset + len(content))}
        )

    async def _queues(self, request: Request) -> Response:
        name = request.query_params.get("queue")
        accounts = [
            {
                "account": status.account,
                "kind": status.kind,
                "unavailable_since": status.unavailable_since,
                "error": redact.redact_text(status.error) or None,
                "queues": status.taken,
                "ignored": status.ignored,
            }
            for status in self._catalog.status()
        ]
        queues = [
            self._told(state)
            for state in self._dispatcher.queues
            if name in {None, str(state.ref), state.ref.name}
        ]
        return _Json(
            {
                "queues": queues,
                "accounts": accounts,
                "credentials": {
                    redact.redact_text(name): redact.redact_text(why)
                    for name, why in self._problems().items()
                },
                "why": None if queues or name is None else self._why_not(name),
            }
        )

    def _told(self, state: QueueState) -> dict[str, Any]:
        return {
            "queue": str(state.ref),
            "account": state.ref.account,
            "kind": state.backend.kind,
            "running": state.running,
            "closed_because": redact.redact_text(self._dispatcher.closed_because(state)) or None,
            "parked": self._dispatcher.parked(state) or None,
            "trouble": redact.redact_text(state.consumer.trouble if state.consumer else "") or None,
        }

    def _why_not(self, name: str) -> str:
        """Why nothing is taken from a queue that is not served."""
        bare = name.rpartition("?")[2]
        if not self._catalog.matches(bare):
            return f"the name {bare!r} does not match --queue-match, or matches --queue-mismatch, or is a response queue"
        away = [status for status in self._catalog.status() if not status.ok]
        if away:
            told = "; ".join(
                f"{each.account}: {redact.redact_text(each.error) or 'not asked yet'}" for each in away
            )
            return f"no account that answers has a queue of that name, and some do not answer: {told}"
        why = "no account has a queue of that name (a RabbitMQ queue must be bound to StudioML.topic to be found)"
        if out := self._catalog.kept_out(bare):
            why += f"; {', '.join(out)}: its own `match` or `mismatch` leaves that name out"
        return why

    async def _requeue(self, request: Request) -> Response:
        try:
            entry = await asyncio.to_thread(self._dead_letters.find, request.path_params["id"])
        except (errors.UsageError, OSError) as exc:
            return _Json({"error": str(exc)}, status_code=404)
        if entry.id in self._sending:
            return _Json({"error": "it is being requeued already"}, status_code=409)
        self._sending.add(entry.id)
        try:
            return await self._send(entry)
        finally:
            self._sending.discard(entry.id)

    async def _send(self, entry: Entry) -> Response:
        try:  # only now: whoever sent it before has removed it
            body = await asyncio.to_thread(lambda: entry.original)
        except OSError as exc:
            return _Json({"error": str(exc)}, status_code=404)
        try:
            ref, backend = self._home(entry)
            # Known as finished, it would be acknowledged on sight where it comes marked: another host may have put it back.
            state = QueueState(ref=ref, backend=backend)
            self._runs.published_anew(state, hashlib.sha256(body).hexdigest())
            await backend.publish(ref, body)
        except (OSError, errors.QueueUnavailable) as exc:
            return _Json({"error": redact.redact_text(str(exc))}, status_code=503)
        except errors.UsageError as exc:
            return _Json({"error": str(exc)}, status_code=409)
        except QueueGone:
            return _Json({"error": f"the queue {entry.ref} does not exist any more"}, status_code=409)
        await asyncio.to_thread(self._dead_letters.drop, entry)
        return _Json({"requeued": entry.id, "queue": str(entry.ref)})

    def _home(self, entry: Entry) -> tuple[QueueRef, QueueBackend]:
        """The queue that it came from, by an account of that broker, whatever that is called now.

        Raises errors.UsageError when there is none, errors.QueueUnavailable when it is not known yet.
        """
        account, identity = entry.ref.account, entry.document.get("identity")
        backend = self._catalog.backend_of(str(identity), entry.ref) or self._catalog.backend(account)
        if backend is None or backend.identity not in {identity or backend.identity, ""}:
            raise errors.UsageError(f"the account {account} is not configured here")
        if not backend.identity:
            raise errors.QueueUnavailable(f"{backend.account} has not been asked for its queues yet")
        return dataclasses.replace(entry.ref, account=backend.account), backend
