"""What is asked of a broker does not wait for other work of the daemon (all else: tests/service/test_rabbitmq_discovery.py)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.server
import threading

import pytest

from runner import errors
from runner.credentials import watch
from runner.queues.rabbitmq_management import Management


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None:
        pass


async def test_uploads_that_take_all_threads_hold_up_neither_discovery_nor_credentials(tmp_path):
    busy, over = threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(1))

    def upload() -> None:
        busy.set()
        over.wait()

    uploading = loop.run_in_executor(None, upload)
    (tmp_path / "shared").write_text("/mnt/queues")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        management = Management(f"http://127.0.0.1:{server.server_port}", user="u", password="p")
        try:
            busy.wait(30)
            assert await management.work_queues() == []
            event = await asyncio.wait_for(anext(watch.Watch(tmp_path).events()), 30)
            assert isinstance(event, watch.Added)
        finally:
            over.set()
            await uploading
            server.shutdown()
            serving.join()
            management.close()
    with pytest.raises(errors.QueueUnavailable, match="not asked any more"):
        await management.work_queues()
