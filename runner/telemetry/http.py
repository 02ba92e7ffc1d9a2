"""The daemon's HTTP port, served in its own loop: metrics and health for everybody, all else behind a guard (DESIGN.md 5.10)."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import hmac
import ipaddress
import socket
import time
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute

from runner import errors
from runner.telemetry import metrics
from runner.telemetry.redact import redact_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from starlette.requests import Request
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Receive, Scope, Send

    from runner import config

#: How long `stop` waits for answers that are under way.
STOP_SECS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readiness:
    """Whether the daemon can take work, and what is wrong with each account (None: nothing)."""

    ready: bool
    accounts: Mapping[str, str | None] = dataclasses.field(default_factory=dict)


class HttpServer:
    """Serves /metrics, /healthz, /readyz openly, and `routes` to whom `Guard` lets in.

    `render_metrics` and `readiness` are called in the loop for each request and must not block.
    `/healthz` says only that the loop turns; `/readyz` answers 503 while `readiness` says no.
    """

    def __init__(
        self,
        options: config.Http,
        *,
        render_metrics: Callable[[], bytes],
        readiness: Callable[[], Readiness],
        routes: Sequence[BaseRoute] = (),
    ) -> None:
        self._options = options
        self._render_metrics = render_metrics
        self._readiness = readiness
        self._started_at = time.monotonic()
        open_routes = [
            Route("/metrics", self._metrics),
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz),
        ]
        self._app = Starlette(
            routes=[*open_routes, *(_guarded(route, options.token) for route in routes)],
            exception_handlers={HTTPException: _refused},
        )
        #: Set when `stop` begins: an answer that would not end by itself (a log that is followed) ends then.
        self.closing = asyncio.Event()
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> tuple[str, int]:
        """Listen; returns where a client on this machine finds it (loopback where it listens on all interfaces).

        Raises UsageError, naming the address, when it cannot be bound.
        """
        listener = _bind(self._options.host, self._options.port)
        port: int = listener.getsockname()[1]
        self._server = _Server(
            self.closing,
            uvicorn.Config(
                self._app,
                http="h11",
                ws="none",
                loop="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # the guard decides by the real peer
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=STOP_SECS,
            ),
        )
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="http")
        listening = asyncio.create_task(self._server.listening.wait(), name="http-listening")
        try:
            await asyncio.wait({self._task, listening}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listening.cancel()
        if self._task.done():
            await self._task
        return _local(self._options.host), port

    async def stop(self) -> None:
        """Close the port; answers under way get `STOP_SECS`. Idempotent."""
        if self._server is None or self._task is None:
            return
        self.closing.set()
        await self._task
        self._server = None

    async def _metrics(self, _request: Request) -> Response:
        return Response(self._render_metrics(), headers={"content-type": metrics.CONTENT_TYPE})

    async def _healthz(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok", "uptime_secs": round(time.monotonic() - self._started_at, 3)})

    async def _readyz(self, _request: Request) -> Response:
        state = self._readiness()
        accounts = {
            redact_text(name): redact_text(text) if text else "ok" for name, text in state.accounts.items()
        }
        return JSONResponse(
            {"ready": state.ready, "accounts": accounts}, status_code=200 if state.ready else 503
        )


class Guard:
    """Lets a request pass that carries the token, or that a program of this machine made on purpose.

    On purpose: from a loopback peer, not forwarded by a proxy, addressed to this machine by a local name (a web page
    whose name was made to resolve to 127.0.0.1 is not), and not sent by a page of another origin.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401 (a token is configured) or 403."""
        headers = Headers(scope=scope)
        if self._has_token(headers) or _is_local(scope, headers):
            await self._app(scope, receive, send)
        elif self._token:
            answer = {"error": "a valid token is needed: Authorization: Bearer <http-token>"}
            await JSONResponse(answer, 401, {"www-authenticate": "Bearer"})(scope, receive, send)
        else:
            answer = {"error": "only for local programs; elsewhere start the daemon with --http-token"}
            await JSONResponse(answer, 403)(scope, receive, send)

    def _has_token(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if not self._token or scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode(), self._token.encode())


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers (the daemon has its own) and without its ten wake-ups a second."""

    def __init__(self, closing: asyncio.Event, options: uvicorn.Config) -> None:
        super().__init__(options)
        self.listening = asyncio.Event()
        self._closing = closing

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        await self._closing.wait()
        self.should_exit = True


def _bind(host: str, port: int) -> socket.socket:
    try:
        if not host and socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # the kernel knows IPv6, but this host has none
                return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as exc:
        why = exc.strerror or str(exc)
        raise errors.UsageError(
            f"--prom-address={host}:{port}: {why}: choose another, :0 takes any free port"
        ) from exc


def _local(host: str) -> str:
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - recognised, not bound


def _guarded(route: BaseRoute, token: str | None) -> BaseRoute:
    if not isinstance(route, Route | Mount | WebSocketRoute):
        raise TypeError(f"cannot guard a {type(route).__name__}")
    copied = copy.copy(route)
    copied.app = Guard(route.app, token)
    return copied


def _is_local(scope: Scope, headers: Headers) -> bool:
    client = scope.get("client")
    if client is None or not _is_loopback(client[0]):
        return False
    if "forwarded" in headers or "x-forwarded-for" in headers:
        return False
    host = headers.get("host", "")
    origin = headers.get("origin")
    return _is_local_name(host) and (origin is None or origin.partition("://")[2] == host)


def _is_local_name(host: str) -> bool:
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name == "localhost" or name.endswith(".localhost") or _is_loopback(name)


def _is_loopback(name: str) -> bool:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


async def _refused(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return JSONResponse({"error": exc.detail}, exc.status_code, dict(exc.headers or {}))
