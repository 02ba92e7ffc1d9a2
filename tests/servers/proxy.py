"""A TCP proxy that can cut, swallow and hold back: network faults for tests, in threads of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING

from tests.servers.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _none(_: bytes) -> float:
    return 0.0


class Proxy:
    """Forwards 127.0.0.1:`port` to a target until told otherwise."""

    def __init__(self, host: str, port: int, *, delay: Callable[[bytes], float] = _none) -> None:
        self._target = (host, port)
        self._delay = delay  #: of answers
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._to_client = threading.Event()
        self._to_server = threading.Event()
        self.connections = 0  #: how many were made in all
        (self.port,) = free_ports(1)
        self.resume()
        self.listen()

    def listen(self) -> None:
        """Accept connections (again), on the same port."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def refuse(self) -> None:
        """Accept no more: new connections are refused. Those that stand stay."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def cut(self) -> int:
        """Break every connection that stands; how many there were."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for one in pair:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        return len(pairs)

    def blackhole(self) -> None:
        """Forward nothing in either direction, not even the end of a connection; bytes wait."""
        self._to_client.clear()
        self._to_server.clear()

    def hold_answers(self) -> None:
        """Forward to the server, but nothing back."""
        self._to_client.clear()

    def resume(self) -> None:
        """Forward everything, first of all what waited."""
        self._to_client.set()
        self._to_server.set()

    def close(self) -> None:
        self.refuse()
        self.resume()
        self.cut()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target, timeout=10)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                if (
                    self._listener is not listener
                ):  # it was on its way when the rest was cut: `cut` has not seen it
                    client.close()
                    server.close()
                    continue
                self.connections += 1
                self._pairs.append((client, server))
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            done = threading.Semaphore(0)
            for source, sink, gate, delay in (
                (client, server, self._to_server, _none),
                (server, client, self._to_client, self._delay),
            ):
                threading.Thread(
                    target=self._pump, args=(source, sink, gate, delay, done), daemon=True
                ).start()
            threading.Thread(target=self._bury, args=(client, server, done), daemon=True).start()

    @staticmethod
    def _pump(
        source: socket.socket,
        sink: socket.socket,
        gate: threading.Event,
        delay: Callable[[bytes], float],
        done: threading.Semaphore,
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                time.sleep(delay(chunk))
                gate.wait()
                sink.sendall(chunk)
        gate.wait()  # nor does a black hole pass on that somebody has hung up
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        done.release()

    def _bury(self, client: socket.socket, server: socket.socket, done: threading.Semaphore) -> None:
        done.acquire()
        done.acquire()
        client.close()
        server.close()
        with self._lock, contextlib.suppress(ValueError):
            self._pairs.remove((client, server))


@contextlib.contextmanager
def proxy(host: str, port: int, *, delay: Callable[[bytes], float] = _none) -> Iterator[Proxy]:
    """A proxy to host:port, closed afterwards. `delay`: how many seconds that piece of an answer takes."""
    one = Proxy(host, port, delay=delay)
    try:
        yield one
    finally:
        one.close()
