"""Accounts that list their queues well and give nothing: a closed port, a right that is missing (/readyz, metrics).

A queue is in trouble when its consumer has said so for `TOLD_AFTER_SECS` while it was asked for a message, and an account when
all of its queues are that are asked. A broker that comes back sooner is not told of at all: `studio-runner explain` does, at once.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
from typing import TYPE_CHECKING

import structlog

from runner.telemetry.http import Readiness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from runner.daemon.queuestate import QueueState
    from runner.queues.catalog import AccountStatus

log = structlog.get_logger(__name__)

LOOK_SECS = 5.0
TOLD_AFTER_SECS = 30.0
#: Trouble that is not said any more is over after this long: some consumers say nothing while they try again.
OVER_AFTER_SECS = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Said:
    """What a consumer said. Times are of `time.monotonic`."""

    text: str
    since: float
    last: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trouble:
    """That of an account."""

    whole: bool  #: nothing comes from any of its queues that are asked
    text: str


class Troubles:
    """Follows what the consumers of all queues say."""

    def __init__(self, queues: Callable[[], Iterable[QueueState]]) -> None:
        self._queues = queues
        self._said: dict[QueueState, _Said] = {}
        self.accounts: Mapping[str, Trouble] = {}
        self.queues = 0  #: how many are in trouble

    async def run(self) -> None:
        """For ever."""
        while True:
            self.look(time.monotonic())
            await asyncio.sleep(LOOK_SECS)

    def look(self, now: float) -> None:
        """What they say now."""
        asked = [state for state in self._queues() if state.asked and state.consumer is not None]
        self._said = {state: said for state in asked if (said := self._heard(state, now)) is not None}
        bad = [state for state, said in self._said.items() if now - said.since >= TOLD_AFTER_SECS]
        self.queues = len(bad)
        of_account = collections.Counter(state.ref.account for state in asked)
        found: dict[str, Trouble] = {}
        for account, number in collections.Counter(state.ref.account for state in bad).items():
            first = min((state for state in bad if state.ref.account == account), key=lambda state: state.ref)
            whole, text = number == of_account[account], self._said[first].text
            some = (
                f"nothing can come from {number} of its {of_account[account]} queues, as {first.ref}: {text}"
            )
            found[account] = Trouble(whole=whole, text=f"nothing can come: {text}" if whole else some)
        self._tell(found)
        self.accounts = found

    def _heard(self, state: QueueState, now: float) -> _Said | None:
        before = self._said.get(state)
        if state.consumer is not None and (text := state.consumer.trouble):
            return _Said(text=text, since=before.since if before else now, last=now)
        return before if before is not None and now - before.last < OVER_AFTER_SECS else None

    def _tell(self, found: Mapping[str, Trouble]) -> None:
        for account in found.keys() - self.accounts.keys():
            log.warning(
                "queues of an account are listed, and nothing can come",
                account=account,
                why=found[account].text,
            )
        for account in self.accounts.keys() - found.keys():
            log.info("queues of an account can be asked again, or are not asked any more", account=account)


def silent(statuses: Iterable[AccountStatus], troubles: Troubles) -> int:
    """From how many accounts nothing can come: they do not answer, or none of their queues does."""
    whole = {account for account, trouble in troubles.accounts.items() if trouble.whole}
    return sum(status.unavailable_since is not None or status.account in whole for status in statuses)


def readiness(
    statuses: Iterable[AccountStatus], troubles: Troubles, others: Mapping[str, str], *, open_: bool
) -> Readiness:
    """Ready: open to work, and from one account at least something can come. `others`: problems that are not an account's."""
    told: dict[str, str | None] = {}
    served = False
    for status in statuses:
        trouble = troubles.accounts.get(status.account)
        problem = None if status.ok else status.error or "not asked yet"
        served = served or (problem is None and not (trouble and trouble.whole))
        told[status.account] = problem or (trouble.text if trouble else None)
    return Readiness(ready=served and open_, accounts=told | dict(others))
