from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.resources.packing import Ask, Candidate, choose, fits


def cards(*free: int, **more) -> list[Candidate]:
    return [
        Candidate(uuid=f"{number}", slots=each, free_slots=each, free_bytes=16, **more)
        for number, each in enumerate(free)
    ]


def chosen(ask: Ask, candidates: list[Candidate]) -> dict[str, int]:
    return {share.uuid: share.slots for share in choose(ask, candidates)}


@pytest.mark.parametrize(
    ("ask", "free", "expected"),
    [
        (Ask(slots=1), [24, 4, 2], {"2": 1}),  # the smallest that does
        (Ask(slots=3), [24, 4, 2], {"1": 3}),
        (Ask(slots=6), [24, 4, 2], {"0": 6}),  # one large card rather than two small ones
        (Ask(slots=26), [24, 4, 2], {"2": 2, "0": 24}),
        (Ask(slots=27), [24, 4, 2], {"1": 4, "0": 23}),
        (Ask(slots=30), [24, 4, 2], {"2": 2, "1": 4, "0": 24}),
        (Ask(slots=31), [24, 4, 2], {}),
        (Ask(slots=5), [4, 4, 4], {"0": 3, "1": 2}),  # evenly
        (Ask(slots=4, count=2), [24, 4, 4], {"1": 2, "2": 2}),
        (Ask(slots=4, count=1), [2, 2, 4], {"2": 4}),
        (Ask(slots=4, count=1), [2, 2], {}),
        (Ask(slots=3, count=2), [2, 1, 8], {"0": 2, "2": 1}),  # each has room for two
        (Ask(slots=1, count=3), [8, 8, 8], {"0": 1, "1": 1, "2": 1}),
        (Ask(slots=1, count=4), [8, 8, 8], {}),
        (Ask(slots=1), [], {}),
    ],
)
def test_the_fewest_then_the_smallest(ask, free, expected):
    assert chosen(ask, cards(*free)) == expected


def test_a_card_that_serves_the_queue_already_goes_before_an_equal_one_that_does_not():
    idle, shared, fuller = (
        Candidate(uuid=uuid, slots=8, free_slots=free, free_bytes=0, shared=uuid != "idle")
        for uuid, free in (("idle", 8), ("shared", 6), ("fuller", 2))
    )
    assert chosen(Ask(slots=2), [idle, shared, fuller]) == {"fuller": 2}
    assert chosen(Ask(slots=4), [idle, shared, fuller]) == {"shared": 4}


def test_memory_is_wanted_on_each_card():
    small, large = cards(4)[0], Candidate(uuid="large", slots=24, free_slots=24, free_bytes=40)
    assert chosen(Ask(slots=1, mem_bytes=17), [small, large]) == {"large": 1}
    assert not fits(Ask(slots=25, mem_bytes=17), [small, large])


def test_mig_instances_are_granted_one_at_a_time():
    parts = cards(2, 2, alone=True)
    assert chosen(Ask(slots=2), parts) == {"0": 2}
    assert not chosen(Ask(slots=3), parts)
    assert not chosen(Ask(slots=2, count=2), parts)
    cards_too = [*parts, *(dataclasses.replace(each, uuid=f"card{each.uuid}") for each in cards(4, 24))]
    assert chosen(Ask(slots=2, count=2), cards_too) == {"card0": 1, "card1": 1}
    assert chosen(Ask(slots=26), cards_too) == {"card0": 4, "card1": 22}


CANDIDATE = st.builds(
    lambda size, free, mem, shared, alone: (size, min(size, free), mem, shared, alone),
    st.integers(1, 24),
    st.integers(0, 24),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
)


@given(
    st.lists(CANDIDATE, max_size=6), st.integers(1, 40), st.sampled_from([0, 0, 1, 2, 3]), st.integers(0, 3)
)
def test_no_set_is_better(listed, slots, count, mem):
    candidates = [
        Candidate(uuid=str(number), slots=size, free_slots=free, free_bytes=gib, shared=shared, alone=alone)
        for number, (size, free, gib, shared, alone) in enumerate(listed)
    ]
    ask = Ask(slots=slots, count=count, mem_bytes=mem)
    least = -(-slots // count) if count else 1
    possible = [
        chosen
        for size in ([count] if count else range(1, 7))
        for chosen in itertools.combinations(candidates, size)
        if sum(each.free_slots for each in chosen) >= slots
        and all(each.free_slots >= least and each.free_bytes >= mem for each in chosen)
        and (size == 1 or not any(each.alone for each in chosen))
    ]
    got = choose(ask, candidates)
    assert bool(got) == bool(possible) == fits(ask, candidates)
    if got:
        by_uuid = {each.uuid: each for each in candidates}
        mine = [by_uuid[share.uuid] for share in got]
        assert sum(share.slots for share in got) == max(slots, count)
        assert all(0 < share.slots <= by_uuid[share.uuid].free_slots for share in got)

        def cost(cards):
            return len(cards), sum(each.slots for each in cards), sum(not each.shared for each in cards)

        assert cost(mine) == min(map(cost, possible))
