"""A web server that misbehaves as told: stalls, resets, ends early, is busy, redirects. It speaks enough S3 for reads."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import struct
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with one request: an answer of `status`, or a break after so many bytes of content."""

    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    after: int = 0
    how: str = ""  # "stall" | "reset" | "end"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are the point here."""


class FaultyHttp:
    """Serves `content` at every path. Each request takes the next fault of `faults`; without one it is served well."""

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        self.content = b""
        self.etag = "etag-1"
        self.extra: dict[str, str] = {}  # headers of every good answer
        self.ranges = True
        self.conditions = True  # whether it minds If-Match
        self.lengths = True
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None  # where `faults` is empty
        self.seen: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self.released = threading.Event()  # ends every stall
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="faulty-http")
        self._thread.start()
        self.endpoint = f"127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def do_GET(self) -> None:
                faulty.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
                length = int(self.headers.get("content-length") or 0)
                while length:
                    length -= len(self.rfile.read(min(length, 1 << 16)))
                fault = faulty.faults.popleft() if faulty.faults else faulty.always
                if fault and fault.status:
                    self._answer(fault.status, fault.headers, fault.body)
                else:
                    self._serve(fault)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_PUT(self) -> None:
                self.do_GET()

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *_: Any) -> None:
                pass

            def _serve(self, fault: Fault | None) -> None:
                content, status, headers = faulty.content, 200, {"ETag": f'"{faulty.etag}"'} | faulty.extra
                if faulty.ranges:
                    headers["Accept-Ranges"] = "bytes"
                    if faulty.conditions and self.headers.get("if-match") not in {None, f'"{faulty.etag}"'}:
                        self._answer(412, {}, b"")
                        return
                    if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or ""):
                        status, start = 206, int(found[1])
                        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                        content = content[start:]
                self._answer(status, headers, content, fault)

            def _answer(
                self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None = None
            ) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if faulty.lengths:
                    self.send_header("Content-Length", str(len(body)))
                else:
                    self.send_header("Connection", "close")
                    self.close_connection = True
                self.end_headers()
                if self.command == "HEAD":
                    return
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body[: fault.after] if fault else body)
                    self.wfile.flush()
                if fault:
                    self.close_connection = True
                    if fault.how == "stall":
                        faulty.released.wait(60)
                    if fault.how == "reset":  # an unclean end: the peer's next read fails
                        self.connection.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                        os.close(self.connection.detach())

        return Handler


@pytest.fixture
def faulty_http() -> Iterator[FaultyHttp]:
    """A misbehaving web server of this test's own."""
    server = FaultyHttp()
    try:
        yield server
    finally:
        server.close()
