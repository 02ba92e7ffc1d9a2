"""Accounts that come, change and go (a real directory of credentials: tests/e2e/test_credentials.py)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import pytest

from runner import config, errors
from runner.credentials import watch
from runner.credentials.accounts import QueueDirectory
from runner.daemon.accounts import Accounts
from runner.queues.catalog import Catalog
from runner.queues.memory import MemoryBackend
from tests.unit.queues.test_catalog import Counted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from runner.credentials.accounts import Account
    from runner.daemon.runs import Runs


class Served:
    """Accounts of a directory, beside one that an option opens; each path is a backend."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.opened: dict[str, MemoryBackend] = {}
        self.catalog = Catalog(
            config.Queues(), counters=Counted(), changed=lambda _: None, backends=[MemoryBackend("local")]
        )
        self.accounts = Accounts(
            catalog=self.catalog,
            runs=cast("Runs", ()),
            watches=[watch.Watch(directory)],
            backend=self.backend,
        )

    def backend(self, account: Account) -> MemoryBackend:
        assert isinstance(account, QueueDirectory)
        if account.root.name == "bad":
            raise errors.UsageError("is bad")
        self.opened[account.root.name] = MemoryBackend(account.label)
        return self.opened[account.root.name]

    async def until(self, claim: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not claim():
                await asyncio.sleep(0.01)


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setattr(watch, "LOOK_SECS", 0.01)
    served = Served(tmp_path)
    following = asyncio.create_task(served.accounts.run())
    yield served
    assert not following.done()
    following.cancel()
    await served.accounts.aclose()


async def test_a_change_that_cannot_be_used_leaves_the_account_as_it_was(served):
    (served.directory / "a").write_text("/one")
    await served.until(lambda: served.catalog.backend("a") is not None)
    (served.directory / "a").write_text("/bad")
    await served.until(lambda: served.accounts.problems.get("a") == "is bad")
    assert served.catalog.backend("a") is served.opened["one"]
    assert not served.opened["one"].closed
    (served.directory / "a").write_text("/two")
    await served.until(lambda: "two" in served.opened and served.catalog.backend("a") is served.opened["two"])
    assert not served.accounts.problems
    await served.until(lambda: served.opened["one"].closed)
    (served.directory / "a").unlink()
    await served.until(lambda: served.catalog.backend("a") is None)


async def test_a_file_does_not_take_the_place_of_an_account_that_an_option_opens(served):
    before = served.catalog.backend("local")
    (served.directory / "local").write_text("/one")
    await served.until(lambda: "rename it" in served.accounts.problems.get("local", ""))
    assert served.catalog.backend("local") is before
    (served.directory / "local").unlink()
    await served.until(lambda: not served.accounts.problems)
    assert served.catalog.backend("local") is before
