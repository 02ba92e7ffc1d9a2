from __future__ import annotations

import datetime as dt

import pytest

from runner.daemon import troubles
from runner.daemon.queuestate import QueueState
from runner.queues.base import Consumer, Delivery, QueueRef
from runner.queues.catalog import AccountStatus
from runner.queues.memory import MemoryBackend


class Says(Consumer):
    def __init__(self, trouble: str) -> None:
        self._trouble = trouble

    def say(self, trouble: str) -> None:
        self._trouble = trouble

    async def next(self) -> Delivery:
        raise NotImplementedError

    async def pause(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


class Account:
    """Two queues of one account, both asked for work."""

    def __init__(self) -> None:
        self.says = [Says(""), Says("")]
        self.states = [
            QueueState(ref=QueueRef(account="a", name=f"rmq_{number}"), backend=MemoryBackend("a"))
            for number in range(2)
        ]
        for state, consumer in zip(self.states, self.says, strict=True):
            state.consumer, state.asked = consumer, True
        self.troubles = troubles.Troubles(lambda: self.states)

    def look(self, now: float, *says: str) -> tuple[bool, str | None]:
        """What /readyz tells then."""
        for consumer, text in zip(self.says, says, strict=True):
            consumer.say(text)
        self.troubles.look(now)
        told = troubles.readiness(
            [AccountStatus(account="a", kind="k", discovered=True)], self.troubles, {}, open_=True
        )
        return told.ready, told.accounts["a"]


@pytest.fixture
def account():
    return Account()


def test_an_account_that_gives_nothing_for_long_is_told_and_not_ready(account):
    assert account.look(100.0, "closed", "closed") == (True, None)
    assert account.look(125.0, "closed", "closed") == (True, None)
    assert account.look(130.0, "closed (for 30 s)", "closed") == (
        False,
        "nothing can come: closed (for 30 s)",
    )
    assert account.troubles.queues == 2
    assert account.look(151.0, "", "") == (True, None)
    assert account.troubles.queues == 0


def test_a_broker_that_comes_back_soon_is_not_told(account):
    account.look(100.0, "closed", "closed")
    account.look(120.0, "", "")
    account.look(140.0, "", "")
    assert account.look(141.0, "closed", "closed") == (True, None)


def test_a_consumer_that_says_nothing_while_it_tries_again_is_still_in_trouble(account):
    for now in range(100, 140, 10):
        account.look(now, "refused", "refused")
        account.look(now + 5.0, "", "")
    assert account.look(136.0, "", "") == (False, "nothing can come: refused")


def test_one_queue_in_trouble_is_told_and_the_account_is_ready(account):
    account.look(100.0, "", "in use")
    ready, text = account.look(130.0, "", "in use")
    assert ready
    assert text == "nothing can come from 1 of its 2 queues, as rmq_1: in use"


def test_queues_that_nobody_asks_say_nothing_of_their_account(account):
    account.look(100.0, "in use", "")
    account.states[1].asked = False
    assert account.look(130.0, "in use", "")[0] is False
    account.states[0].asked = False
    assert account.look(131.0, "in use", "") == (True, None)


def test_accounts_that_do_not_answer_and_those_that_give_nothing_are_counted_together(account):
    account.look(100.0, "closed", "closed")
    account.look(130.0, "closed", "closed")
    away = AccountStatus(account="b", kind="k", discovered=True, unavailable_since=dt.datetime.now(dt.UTC))
    statuses = [
        AccountStatus(account="a", kind="k", discovered=True),
        away,
        AccountStatus(account="c", kind="k"),
    ]
    assert troubles.silent(statuses, account.troubles) == 2
    told = troubles.readiness(
        [*statuses, AccountStatus(account="d", kind="k", discovered=True)], account.troubles, {}, open_=True
    )
    assert told.ready
    assert not troubles.readiness(statuses, account.troubles, {"disk": "full"}, open_=True).ready
