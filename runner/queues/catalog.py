"""Which queues there are, over all accounts, and which of them this runner takes work from (INTEROP.md 2.1)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
from typing import TYPE_CHECKING, Protocol, TypeAlias

import structlog

from runner.errors import QueueUnavailable

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable, Sequence

    from runner import config
    from runner.queues.base import QueueBackend, QueueInfo, QueueRef

log = structlog.get_logger(__name__)

_DISCOVERY_SECS = (
    15.0  #: an account that takes longer is unavailable; 10 000 queues of one broker take one or two
)

_LOGGED_NAMES = 20  #: of a change that touches thousands, so many are named in the log


@dataclasses.dataclass(frozen=True, kw_only=True)
class Added:
    """A queue to take work from."""

    queue: QueueRef
    backend: QueueBackend


@dataclasses.dataclass(frozen=True, kw_only=True)
class Removed:
    """A queue to take no more work from. Whether it is gone, and its runs cancelled, its backend's `existence` tells."""

    queue: QueueRef
    backend: QueueBackend


Change: TypeAlias = Added | Removed


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccountStatus:
    """How the last discovery of one account went: for /readyz and `explain`."""

    account: str
    kind: str
    discovered: bool = False  #: whether any discovery has succeeded yet
    #: UTC; None while it answers, and before it was first asked
    unavailable_since: dt.datetime | None = None
    error: str = ""  #: why it is unavailable, without credentials
    taken: int = 0  #: queues that work is taken from
    ignored: int = 0  #: queues whose names do not match

    @property
    def ok(self) -> bool:
        """The account answers."""
        return self.discovered and self.unavailable_since is None


class Counters(Protocol):
    """What is counted of discoveries (INTEROP.md 9.4)."""

    def refresh(self, account: str, ok: bool) -> None:
        """An account was asked for its queues."""

    def checked(self, kind: str, queue: str) -> None:
        """A queue was looked at, and is taken from."""

    def ignored(self, kind: str, queue: str) -> None:
        """A queue was looked at, and its name does not match."""


@dataclasses.dataclass(eq=False)
class _Account:
    backend: QueueBackend
    status: AccountStatus
    queues: dict[QueueRef, QueueInfo] = dataclasses.field(default_factory=dict)
    match: re.Pattern[str] | None = None
    mismatch: re.Pattern[str] | None = None
    due: bool = True  #: to be asked for its queues
    asking: bool = False  #: being asked

    def lets(self, name: str) -> bool:
        """Whether its own patterns let a queue of that name through."""
        matched = self.match is None or self.match.search(name) is not None
        return matched and not (self.mismatch is not None and self.mismatch.search(name) is not None)


class Catalog:
    """The queues of all accounts that pass the name filter.

    An account that cannot be asked keeps the queues it had: an outage of its management interface ends no consumption.
    Accounts may be added and removed at any time; their backends stay the caller's to open and close.
    """

    def __init__(
        self,
        queues: config.Queues,
        *,
        counters: Counters,
        changed: Callable[[Sequence[Change]], None],
        backends: Iterable[QueueBackend] = (),
    ) -> None:
        """`changed` is called in the loop, for one account at a time, and never with nothing; it must not block."""
        self._match = queues.match
        self._mismatch = queues.mismatch
        self._counters = counters
        self._changed = changed
        self._accounts: dict[str, _Account] = {}
        self._asked = asyncio.Event()
        for backend in backends:
            self.add(backend)

    def add(
        self,
        backend: QueueBackend,
        *,
        match: re.Pattern[str] | None = None,
        mismatch: re.Pattern[str] | None = None,
    ) -> None:
        """Watch one more account (of its queues only those that its own patterns let through as well); its queues come with the next refresh, which is made soon. Replaces one of that name."""
        self.remove(backend.account)
        status = AccountStatus(account=backend.account, kind=backend.kind)
        account = _Account(backend, status, match=match, mismatch=mismatch)
        self._accounts[backend.account] = account
        backend.on_queues_changed(lambda: self._ask_soon(account))
        self._asked.set()

    def remove(self, account: str) -> None:
        """Forget an account and its queues. An account that is not there is no error."""
        forgotten = self._accounts.pop(account, None)
        if forgotten is not None and forgotten.queues:
            self._changed(
                [Removed(queue=queue, backend=forgotten.backend) for queue in sorted(forgotten.queues)]
            )

    def backend(self, account: str) -> QueueBackend | None:
        """The backend of an account; None when there is none of that name."""
        found = self._accounts.get(account)
        return None if found is None else found.backend

    def backend_of(self, identity: str, queue: QueueRef) -> QueueBackend | None:
        """That of an account of that identity: the queue's own, or one that sees the queue, or any; None: there is none yet."""

        def fits(account: _Account) -> tuple[bool, bool]:
            label = account.status.account
            return label == queue.account, dataclasses.replace(queue, account=label) in account.queues

        found = [
            account
            for account in self._accounts.values()
            if identity and account.backend.identity == identity
        ]
        return max(found, key=fits).backend if found else None

    def queues(self) -> dict[QueueRef, QueueBackend]:
        """The queues that work is taken from now."""
        return {queue: account.backend for account in self._accounts.values() for queue in account.queues}

    def status(self) -> tuple[AccountStatus, ...]:
        """Every account, in the order of adding."""
        return tuple(account.status for account in self._accounts.values())

    def matches(self, name: str) -> bool:
        """Whether work is taken from a queue of that bare name."""
        if name.endswith("_response"):
            return False
        return bool(self._match.search(name)) and not (self._mismatch and self._mismatch.search(name))

    def kept_out(self, name: str) -> list[str]:
        """The accounts whose own patterns leave queues of that bare name out."""
        return [label for label, account in self._accounts.items() if not account.lets(name)]

    async def refresh(self) -> None:
        """Ask all accounts at once, and tell the changes of each as it answers. Raises nothing but cancellation."""
        await asyncio.gather(*[self._refresh(account) for account in list(self._accounts.values())])

    async def run(self, refresh_secs: float) -> None:
        """Refresh now and every `refresh_secs`, until cancelled; what is new, or has changed, is asked for at once.

        Each account by itself: one that takes its time to say nothing holds up nobody else's queues.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            while True:
                for account in self._accounts.values():
                    account.due = account.due or not account.asking
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(loop.time() + refresh_secs):
                        while True:
                            self._asked.clear()
                            for account in self._accounts.values():
                                if account.due and not account.asking:
                                    account.due, account.asking = False, True
                                    group.create_task(
                                        self._ask(account), name=f"discover {account.status.account}"
                                    )
                            await self._asked.wait()

    def _ask_soon(self, account: _Account) -> None:
        account.due = True
        self._asked.set()

    async def _ask(self, account: _Account) -> None:
        try:
            await self._refresh(account)
        finally:
            account.asking = False
            if account.due:  # it has changed while it was asked
                self._asked.set()

    async def _refresh(self, account: _Account) -> None:
        try:
            async with asyncio.timeout(_DISCOVERY_SECS):
                found = await account.backend.discover()
        except QueueUnavailable as exc:
            self._unavailable(account, str(exc))
        except TimeoutError:
            self._unavailable(account, f"no answer within {_DISCOVERY_SECS:g} seconds")
        except Exception as exc:  # an adapter's bug must not end the discovery of the other accounts
            log.exception("discovery failed", account=account.status.account)
            self._unavailable(account, type(exc).__name__)
        else:
            self._available(account, found)

    def _is_current(self, account: _Account) -> bool:
        """Whether the account was neither removed nor replaced while it was asked."""
        return self._accounts.get(account.status.account) is account

    def _unavailable(self, account: _Account, error: str) -> None:
        if not self._is_current(account):
            return
        status = account.status
        self._counters.refresh(status.account, False)  # noqa: FBT003 - the protocol's two words say it
        if status.unavailable_since is None:
            log.warning("account unavailable", account=status.account, kind=status.kind, error=error)
        since = status.unavailable_since or dt.datetime.now(dt.UTC)
        account.status = dataclasses.replace(status, unavailable_since=since, error=error)

    def _available(self, account: _Account, found: Iterable[QueueInfo]) -> None:
        if not self._is_current(account):
            return
        status = account.status
        self._counters.refresh(status.account, True)  # noqa: FBT003 - the protocol's two words say it
        if status.unavailable_since is not None:
            log.info("account available again", account=status.account, kind=status.kind)
        before, now, ignored = account.queues, {}, 0
        for info in found:
            if self.matches(info.ref.name) and account.lets(info.ref.name):
                self._counters.checked(status.kind, str(info.ref))
                now[info.ref] = info
            else:
                self._counters.ignored(status.kind, str(info.ref))
                ignored += 1
        account.queues = now
        account.status = dataclasses.replace(
            status, discovered=True, unavailable_since=None, error="", taken=len(now), ignored=ignored
        )
        removed, added = sorted(before.keys() - now.keys()), sorted(now.keys() - before.keys())
        if removed or added:
            log.info(
                "queues changed",
                account=status.account,
                added=len(added),
                removed=len(removed),
                names=[str(queue) for queue in (added + removed)[:_LOGGED_NAMES]],
            )
            changes: list[Change] = [Removed(queue=queue, backend=account.backend) for queue in removed]
            self._changed([*changes, *(Added(queue=queue, backend=account.backend) for queue in added)])
