"""Accounts that come and go while the daemon runs: each becomes a backend of the catalog.

An account that goes is no longer asked for work; its backend stays open until the last run that holds one of its messages has
ended, so that these can be acknowledged.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.credentials.accounts import Rabbitmq
from runner.credentials.watch import Added, Changed, Removed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from runner.credentials.accounts import Account
    from runner.credentials.watch import Watch
    from runner.daemon.runs import Runs
    from runner.queues.base import QueueBackend
    from runner.queues.catalog import Catalog

log = structlog.get_logger(__name__)

#: How often it is looked whether a backend that has gone is still needed.
RETIRE_SECS = 1.0


class Accounts:
    """Opens and closes backends as their credentials appear and disappear."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        runs: Runs,
        watches: Sequence[Watch],
        backend: Callable[[Account], QueueBackend] | None,
    ) -> None:
        """`backend` makes what serves an account, and raises `errors.UsageError` for one that it cannot; needed with `watches`."""
        self._catalog = catalog
        self._runs = runs
        self._watches = watches
        self._backend = backend
        self._open: dict[str, QueueBackend] = {}
        self._refused: dict[str, str] = {}
        self._retiring: dict[asyncio.Task[None], QueueBackend] = {}

    @property
    def problems(self) -> Mapping[str, str]:
        """Credentials that cannot be used, and why."""
        return {name: why for watch in self._watches for name, why in watch.problems.items()} | self._refused

    async def run(self) -> None:
        """Follow all directories, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for watch in self._watches:
                group.create_task(self._follow(watch), name=f"credentials {watch.path}")

    async def aclose(self) -> None:
        """Close every backend. Runs must have ended."""
        for task in self._retiring:
            task.cancel()
        backends = [*self._open.values(), *self._retiring.values()]
        self._open.clear()
        await asyncio.gather(*(backend.aclose() for backend in backends))

    async def _follow(self, watch: Watch) -> None:
        async for event in watch.events():
            match event:
                case Added() | Changed():
                    await self._serve(event.account)
                case Removed():
                    self._remove(event.label)
                    log.info("account gone: no more work is taken from it", account=event.label)

    async def _serve(self, account: Account) -> None:
        """Open it, in place of what its file said before. One that cannot be used changes nothing: nobody meant to remove it."""
        try:
            backend = self._made(account)
        except errors.UsageError as exc:
            self._refused[account.label] = str(exc)
            log.warning("credentials cannot be used", name=account.label, why=str(exc))
            return
        self._remove(account.label)
        await backend.open()
        self._open[account.label] = backend
        patterns = (account.match, account.mismatch) if isinstance(account, Rabbitmq) else (None, None)
        self._catalog.add(backend, match=patterns[0], mismatch=patterns[1])
        log.info("account added", account=account.label, kind=backend.kind)
        same = [label for label, each in self._open.items() if each.identity == backend.identity != ""]
        if len(same) > 1:
            log.info("accounts of one broker: what both see is one queue, and runs once", accounts=same)

    def _made(self, account: Account) -> QueueBackend:
        assert self._backend is not None, "directories of credentials need backends"
        if (other := self._catalog.backend(account.label)) is not self._open.get(account.label):
            assert other is not None
            raise errors.UsageError("has the name of an account that an option opens: rename it")
        return self._backend(account)

    def _remove(self, label: str) -> None:
        self._refused.pop(label, None)
        if (backend := self._open.pop(label, None)) is not None:
            self._catalog.remove(label)
            task = asyncio.create_task(self._retire(backend), name=f"retire {label}")
            self._retiring[task] = backend
            task.add_done_callback(lambda done: self._retiring.pop(done, None))

    async def _retire(self, backend: QueueBackend) -> None:
        while any(active.backend is backend for active in self._runs):  # noqa: ASYNC110 - seldom, and not urgent
            await asyncio.sleep(RETIRE_SECS)  # nobody waits for this
        await backend.aclose()
