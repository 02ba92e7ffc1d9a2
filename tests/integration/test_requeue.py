"""`POST /api/dead-letters/ID`: a dead letter is one message, however often it is asked for (the verb: tests/e2e/test_dlq.py)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from runner.queues.memory import MemoryBackend
from tests.integration.harness import daemon

if TYPE_CHECKING:
    from runner.queues.base import QueueRef


class Slow(MemoryBackend):
    """Publishes when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = asyncio.Event()
        self.published = 0

    async def publish(self, queue: QueueRef, body: bytes) -> None:
        await self.let.wait()
        self.published += 1
        await super().publish(queue, body)


async def test_two_at_the_same_moment_publish_it_once(tmp_path):
    queue = Slow()
    queue.let.set()
    async with daemon(tmp_path, queue) as it:
        queue.declare("rmq_a")
        await queue.publish(queue.ref("rmq_a"), b"no message")
        await it.until(it.dead)
        (path,) = it.config.paths.state_dir.glob("dead-letter/*/*.json")
        queue.let.clear()
        queue.published = 0
        answers = {asyncio.create_task(it.post(f"/api/dead-letters/{path.stem}")) for _ in range(2)}
        answered, waiting = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result()[0] for task in answered] == [409]
        queue.let.set()
        assert [(await task)[0] for task in waiting] == [200]
        assert queue.published == 1
