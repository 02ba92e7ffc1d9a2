"""What `/api/queues` tells of queues from which nothing comes; of capacity, tests/integration/test_fairness.py."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from typing import TYPE_CHECKING, Any

from runner.daemon import troubles
from runner.daemon.accounts import Accounts
from runner.queues.catalog import Catalog
from runner.queues.memory import MemoryBackend
from tests.integration.harness import LIMIT_SECS, Daemon, daemon

if TYPE_CHECKING:
    from runner.queues.base import Consumer, QueueRef


async def told(it: Daemon, name: str) -> Any:
    address = json.loads((it.config.paths.working_dir / "studio-runner.json").read_text())["address"]

    def get() -> Any:
        with urllib.request.urlopen(
            f"http://{address}/api/queues?queue={name}", timeout=LIMIT_SECS
        ) as answer:
            return json.load(answer)

    return await asyncio.to_thread(get)


class Troubled(MemoryBackend):
    """Lists its queues, and lets nobody consume them."""

    def __init__(self) -> None:
        super().__init__()
        self.troubled: list[Consumer] = []

    async def consumer(self, queue: QueueRef) -> Consumer:
        consumer = await super().consumer(queue)
        self.troubled.append(consumer)
        consumer._trouble = "refuses the user canary: amqp://u:canary@h/"
        return consumer


async def test_a_broker_that_lists_its_queues_and_gives_nothing(tmp_path):
    queue = Troubled()
    queue.declare("rmq_a")
    async with daemon(tmp_path, queue) as it:
        await it.until((tmp_path / "work/studio-runner.json").exists)
        async with asyncio.timeout(LIMIT_SECS):
            while not (found := (await told(it, "rmq_a"))["queues"]) or not found[0]["trouble"]:
                await asyncio.sleep(0.02)  # between questions
        assert found[0]["closed_because"] is None
        assert found[0]["trouble"].startswith("refuses the user")
        assert ":canary@" not in found[0]["trouble"]


async def test_a_broker_that_gives_nothing_for_long_makes_the_daemon_unready_until_it_gives(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(troubles, "LOOK_SECS", 0.02)
    monkeypatch.setattr(troubles, "TOLD_AFTER_SECS", 0.1)
    monkeypatch.setattr(troubles, "OVER_AFTER_SECS", 0.1)
    queue = Troubled()
    queue.declare("rmq_a")
    async with daemon(tmp_path, queue) as it:
        await it.until((tmp_path / "work/studio-runner.json").exists)

        async def ready(is_it: bool) -> str:
            async with asyncio.timeout(LIMIT_SECS):
                while (answer := await it.get("/readyz"))[1]["ready"] is not is_it:
                    await asyncio.sleep(0.02)  # between questions
            assert answer[0] == (200 if is_it else 503)
            return str(answer[1]["accounts"]["memory"])

        await it.listening("rmq_a")
        assert "nothing can come: refuses the user" in await ready(False)
        metrics = it.service._metrics.render().decode()
        assert "runner_queues_in_trouble 1.0" in metrics
        assert "runner_accounts_in_trouble 1.0" in metrics
        queue.troubled[0]._trouble = ""
        assert await ready(True) == "ok"


async def test_credentials_that_cannot_be_used_and_patterns_of_an_account(tmp_path, monkeypatch):
    monkeypatch.setattr(Accounts, "problems", {"broker.yaml": "has 'user'"})
    queue = MemoryBackend()

    def keep_out(self: Catalog, name: str) -> list[str]:
        return ["team.yaml"] if re.search("other", name) else []

    monkeypatch.setattr(Catalog, "kept_out", keep_out)
    async with daemon(tmp_path, queue) as it:
        await it.until((tmp_path / "work/studio-runner.json").exists)
        async with asyncio.timeout(LIMIT_SECS):
            while (found := await told(it, "rmq_other"))["accounts"][0]["error"] or "do not answer" in found[
                "why"
            ]:
                await asyncio.sleep(0.02)
        assert found["credentials"] == {"broker.yaml": "has 'user'"}
        assert "no account has a queue of that name" in found["why"]
        assert "team.yaml: its own `match` or `mismatch` leaves that name out" in found["why"]
        assert "team.yaml" not in (await told(it, "rmq_none"))["why"]
