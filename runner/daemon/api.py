"""What the daemon tells its clients over HTTP, behind the guard of `telemetry.http` (loopback, or a token).

`GET /api/runs`                  runs in progress and recent ones, newest last; `?digest=SHA256`: only those of that message
`GET /api/runs/RUN/output`       what a run in progress has printed; `?offset=BYTES` goes on from there
`GET /api/queues`                the queues that are served, and why one is closed
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import orjson
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from runner.telemetry import redact

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.routing import BaseRoute

    from runner.daemon.dispatch import Dispatcher
    from runner.daemon.runs import Active, Runs

#: At the most so much of the output in one answer; the client asks again.
CHUNK_BYTES = 1 << 20


class _Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, default=str)


class Api:
    """The pages. Each answers at once, from memory or with one bounded read."""

    def __init__(self, runs: Runs, dispatcher: Dispatcher) -> None:
        self._runs = runs
        self._dispatcher = dispatcher

    def routes(self) -> list[BaseRoute]:
        """For `telemetry.http.HttpServer`."""
        return [
            Route("/api/runs", self._list),
            Route("/api/runs/{run}/output", self._output),
            Route("/api/queues", self._queues),
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
            offset = max(0, int(request.query_params.get("offset", "0")))
        except ValueError:
            return _Json({"error": "offset takes a number of bytes"}, status_code=400)
        try:
            with active.experiment.workspace.output.open("rb") as file:
                file.seek(offset)
                content = file.read(CHUNK_BYTES)
        except FileNotFoundError:
            content = b""
        return Response(
            content, media_type="application/octet-stream", headers={"x-offset": str(offset + len(content))}
        )

    async def _queues(self, _request: Request) -> Response:
        return _Json(
            {
                "queues": [
                    {
                        "queue": str(state.ref),
                        "account": state.ref.account,
                        "kind": state.backend.kind,
                        "running": state.running,
                        "closed_because": redact.redact_text(self._dispatcher.closed_because(state)) or None,
                    }
                    for state in self._dispatcher.queues
                ]
            }
        )
