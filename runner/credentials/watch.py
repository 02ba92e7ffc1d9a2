"""A directory of credentials, looked at again and again: what came, changed and went.

Asked every second, not notified: Kubernetes swaps a link above the files, secrets may be mounted over the network, and
a handful of small files cost nothing to read.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
from typing import TYPE_CHECKING, TypeAlias

import structlog

from runner import errors
from runner.credentials import directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from runner.credentials.accounts import Account

log = structlog.get_logger(__name__)

#: Changes are acted on within 5 seconds, of which libraries that are needed for the first time take one.
LOOK_SECS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Added:
    """An account appeared."""

    account: Account


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changed:
    """What an account's file says is new; its label is the same."""

    account: Account


@dataclasses.dataclass(frozen=True, kw_only=True)
class Removed:
    """An account disappeared."""

    label: str


Event: TypeAlias = Added | Changed | Removed


class Watch:
    """One directory; `prefix` tells its accounts from those of other directories."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path = path
        self._prefix = prefix
        self.problems: Mapping[str, str] = {}  #: what cannot be used now, and why; for /readyz
        self._accounts: Mapping[str, Account] = {}
        # Of its own: the loop's common threads may all be busy with uploads, or with a storage server that is silent.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="credentials")

    async def events(self) -> AsyncIterator[Event]:
        """First all that is there, then every change; until it is closed.

        A directory that cannot be read keeps the accounts that it had: it may be being mounted. A file that became unreadable
        does so too: nobody meant to remove the account.
        """
        while True:
            try:
                scan = functools.partial(directory.scan, self.path, self._prefix)
                found = await asyncio.get_running_loop().run_in_executor(self._thread, scan)
            except errors.UsageError as exc:
                self._tell({str(self.path): str(exc)})
            else:
                self._tell(found.problems)
                for event in self._compare(found):
                    yield event
            await asyncio.sleep(LOOK_SECS)

    def _compare(self, found: directory.Found) -> list[Event]:
        before = self._accounts
        kept = {label: account for label, account in before.items() if label in found.problems}
        now = {**kept, **found.accounts}
        self._accounts = now
        events: list[Event] = [Removed(label=label) for label in before if label not in now]
        for label, account in now.items():
            if label not in before:
                events.append(Added(account=account))
            elif before[label] != account:
                events.append(Changed(account=account))
        return events

    def _tell(self, problems: Mapping[str, str]) -> None:
        for name, why in problems.items():
            if self.problems.get(name) != why:
                log.warning("credentials cannot be used", name=name, directory=str(self.path), why=why)
        for name in self.problems:
            if name not in problems:
                log.info("credentials can be used again, or are gone", name=name, directory=str(self.path))
        self.problems = dict(problems)
