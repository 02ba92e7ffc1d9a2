from __future__ import annotations

import asyncio

import pytest

from runner import errors
from runner.request.model import Resources
from runner.resources.allocator import Allocator
from runner.resources.cards import Card, Slots
from runner.resources.gpupool import FORGET_SECS, QUIET_SECS, GpuPool
from runner.resources.gpus import Sight

GIB = 1 << 30
GB = 10**9
SLOTS = {"T4": 4, "A100": 24, "GTX 1060": 1}
MACHINE = Resources(cpus=64, ram_bytes=GIB, hdd_bytes=GIB)


def card(uuid: str = "GPU-a", name: str = "T4", gb: int = 16, index: str = "0") -> Card:
    return Card(uuid=uuid, name=name, index=index, memory_bytes=gb * GB)


class Machine:
    """An allocator whose cards show what the test says."""

    def __init__(self, *cards: Card) -> None:
        self.pool = GpuPool(lambda card: Slots(count=SLOTS[card.name]))
        self.allocator = Allocator(MACHINE, lambda: GIB, self.pool)
        self.cards = list(cards)
        self.now = 0.0
        self.look()

    def look(self, *, used=0, homes=None, ecc=0, lost=frozenset(), secs=0.0) -> dict[str, str]:
        self.now += secs
        sights = [
            Sight(card=each, used_bytes=int(used * GB), ecc_errors=ecc, by_home=homes) for each in self.cards
        ]
        return self.pool.seen(sights, lost, self.pool.watermarks(), self.now)

    def run(self, gb: int = 0, slots: int = 1, owner: str = "q", home: str = ""):
        allocation = self.allocator.allocate(Resources(gpus=slots, gpu_mem_bytes=gb * GB), owner)
        allocation.name(home)
        return allocation

    def room(self, owner: str = "q") -> int:
        """The most memory that a run of that queue could be promised, in GB."""
        return max(
            [
                gb
                for gb in range(1, 100)
                if self.allocator.fits(Resources(gpus=1, gpu_mem_bytes=gb * GB), owner)
            ],
            default=0,
        )


def test_what_was_promised_is_not_free_whether_it_is_used_or_not():
    machine = Machine(card(gb=16))
    machine.run(8, home="/a")
    for used in (0, 5, 8):
        machine.look(used=used, homes={"/a": used * GB})
        assert machine.room() == 8
    machine.look(used=10, homes={"/a": 10 * GB})  # more than it has asked for
    assert machine.room() == 6


def test_memory_that_cannot_be_measured_is_not_free_and_slots_still_are():
    machine = Machine(card(gb=0))
    assert (machine.room(), machine.allocator.fits(Resources(gpus=1))) == (0, True)
    machine.cards = [card(gb=16)]
    machine.look()
    assert machine.room() == 16
    machine.cards = [card(gb=0)]
    machine.look()
    assert (machine.room(), machine.allocator.fits(Resources(gpus=1))) == (0, True)


def test_memory_of_strangers_is_not_free():
    machine = Machine(card(gb=16))
    machine.look(used=3, homes={})
    assert machine.room() == 13
    machine.run(8, home="/a")
    machine.look(used=3 + 5, homes={"/a": 5 * GB})
    assert machine.room() == 5
    machine.look(used=3 + 5 + 2, homes={"/a": 5 * GB})
    assert machine.room() == 3


@pytest.mark.parametrize(
    ("name", "gb", "used", "slots"),
    [
        ("T4", 16, 0.5, 4),  # a display server, or the driver itself
        ("T4", 16, 2.1, 3),  # more than half of one
        ("T4", 16, 13.9, 1),
        ("T4", 16, 16, 0),
        ("A100", 40, 0.8, 24),
        ("A100", 40, 20, 12),
        ("GTX 1060", 6, 2.9, 1),
        ("GTX 1060", 6, 3.1, 0),
    ],
)
@pytest.mark.parametrize("homes", [{}, None])  # whether the driver says whose it is
def test_slots_whose_memory_strangers_use_are_not_free(name, gb, used, slots, homes):
    machine = Machine(card(gb=gb, name=name))
    machine.look(used=used, homes=homes)
    assert machine.pool.free_slots == slots
    if slots:
        machine.run(slots=slots)
    with pytest.raises(errors.NoCapacity, match=f"free are: {name} 0 \\(0 of {SLOTS[name]} slot"):
        machine.run(slots=1)
    machine.look(used=0, homes=homes)  # they have gone
    assert machine.pool.free_slots == SLOTS[name] - slots


def test_slots_that_strangers_take_away_are_told_with_the_reason():
    machine = Machine(card(gb=16))
    machine.look(used=16)
    with pytest.raises(errors.NoCapacity) as told:
        machine.run()
    assert (
        told.value.lacking == "1 GPU slot is asked for; free are: T4 0 (0 of 4 slots, 0 B; others use 16 GB)"
    )


@pytest.mark.parametrize("told", [True, False])
def test_what_our_runs_use_takes_no_slots_away(told):
    machine = Machine(card(gb=16))

    def look(used: float, **homes: float) -> None:
        machine.look(used=used, homes={f"/{name}": gb * GB for name, gb in homes.items()} if told else None)

    first = machine.run(home="/a")
    look(15, a=15)
    assert machine.pool.free_slots == 3
    first.release()  # what it had is not looked at anew yet
    assert machine.pool.free_slots == 4
    second = machine.run(home="/b")
    look(15, a=5, b=10)  # the driver takes its time
    look(10, b=10)
    assert machine.pool.free_slots == 3
    second.release()
    look(0)
    assert machine.pool.free_slots == 4


def test_strangers_that_come_to_a_card_in_use_are_seen_where_the_driver_says_whose_memory_it_is():
    machine = Machine(card(gb=16))
    machine.run(home="/a")
    machine.look(used=4 + 8, homes={"/a": 4 * GB})
    assert machine.pool.free_slots == 1
    machine.look(used=4 + 2 + 5, homes={"/a": 4 * GB, "": 2 * GB, "/runs/of/another/daemon": 5 * GB})
    assert machine.pool.free_slots == 2


def test_where_it_does_not_the_least_that_was_seen_is_theirs():
    machine = Machine(card(gb=16))
    machine.look(used=12)  # of one that has just ended, and whose memory the driver has not got back yet
    machine.run()
    assert machine.pool.free_slots == 0
    machine.look(used=1)
    machine.look(used=13)
    assert machine.pool.free_slots == 3


def test_what_one_run_uses_does_not_hide_what_another_was_promised():
    machine = Machine(card(gb=40, name="A100"))
    machine.run(0, home="/greedy")
    machine.run(8, home="/modest")
    machine.look(used=20, homes={"/greedy": 20 * GB})
    assert machine.room() == 12


def test_where_the_driver_does_not_say_whose_memory_it_is():
    machine = Machine(card(gb=16))
    machine.look(used=1)  # the driver's own, or strangers': nobody of ours is there
    machine.run(8)
    for used, room in ((1, 7), (6, 7), (9, 7), (10, 6)):
        machine.look(used=used)
        assert machine.room() == room
    # With a run that has no promise, all that is used may be its.
    machine.run(0)
    machine.look(used=3)
    assert machine.room() == 16 - 3 - 8


def test_what_a_run_has_left_behind_is_free_when_that_was_seen():
    machine = Machine(card(gb=16))
    first = machine.run(10)
    machine.look(used=10)
    first.release()
    assert machine.pool.uneasy  # a look is wanted
    assert machine.room() == 6
    machine.look(used=0)
    assert machine.room() == 16
    assert not machine.pool.uneasy


def test_a_look_that_began_before_a_run_ended_says_nothing_of_strangers():
    machine = Machine(card(gb=16))
    first = machine.run(10)
    marks = machine.pool.watermarks()
    first.release()
    machine.pool.seen([Sight(card=machine.cards[0], used_bytes=10 * GB)], frozenset(), marks, 0.0)
    machine.run(6)
    machine.look(used=6)  # all of it is the second one's, and none a stranger's
    assert machine.room() == 10


def test_a_card_serves_one_queue_at_a_time_and_its_runs_share_it():
    machine = Machine(card())
    first, second = machine.run(owner="a"), machine.run(owner="a", slots=2)
    with pytest.raises(errors.NoCapacity, match="serves another queue"):
        machine.run(owner="b")
    first.release()
    with pytest.raises(errors.NoCapacity):
        machine.run(owner="b")
    second.release()
    machine.run(owner="b")


def test_a_second_release_gives_nothing_back_that_another_has_got():
    machine = Machine(card())
    first = machine.run(slots=4)
    first.release()
    machine.run(slots=4)
    first.release()
    assert machine.pool.free_slots == 0


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (
            Resources(gpus=2, gpu_mem_bytes=24 * GB),
            "2 GPU slots with 24 GB each are asked for; this machine has T4 0 (4 slots, 16 GB)",
        ),
        (Resources(gpus=5), "5 GPU slots are asked for; this machine has T4 0 (4 slots, 16 GB)"),
        (Resources(gpus=1, gpu_count=2), "1 GPU slot on 2 cards is asked for; this machine has"),
    ],
)
def test_what_never_fits_is_told_with_what_there_is(ask, text):
    with pytest.raises(errors.NeverFits) as told:
        Machine(card()).allocator.allocate(ask)
    assert text in str(told.value)


def test_what_does_not_fit_now_is_told_with_what_is_free():
    machine = Machine(card(), card("GPU-b", index="1"))
    machine.run(6, slots=3)
    with pytest.raises(errors.NoCapacity) as told:
        machine.run(11, slots=8)
    assert (
        told.value.lacking == "8 GPU slots with 11 GB each are asked for; "
        "free are: T4 0 (1 of 4 slots, 10 GB), T4 1 (4 of 4 slots, 16 GB)"
    )


def test_many_cards_are_not_all_listed():
    machine = Machine(*[card(f"GPU-{number}", index=str(number)) for number in range(8)])
    assert machine.pool.never(Resources(gpus=33)).endswith("T4 3 (4 slots, 16 GB) and 4 more")


def test_no_gpu_says_why_and_gpu_memory_alone_asks_for_none():
    told_so = Allocator(MACHINE, lambda: GIB)
    with pytest.raises(errors.NeverFits, match="no GPU: it is told to use none"):
        told_so.allocate(Resources(gpus=1))
    assert told_so.allocate(Resources(gpu_mem_bytes=GIB, gpu_count=2)).gpus == ()
    machine = Machine()
    machine.pool.silence("there is no driver")
    with pytest.raises(
        errors.NeverFits, match="1 GPU slot is asked for; this machine has no GPU: there is no driver"
    ):
        machine.run()


# -- faults


def test_memory_errors_fence_a_card_until_it_was_quiet_for_a_while():
    machine = Machine(card())
    run = machine.run()
    assert machine.look(ecc=2) == {"GPU-a": "it has uncorrected memory errors (2)"}
    assert machine.look(ecc=2, secs=30) == {}  # said once
    assert "failed: it has uncorrected memory errors" in machine.pool.fenced(["GPU-a"])
    run.release()
    with pytest.raises(errors.NeverFits, match="fenced: T4 0: it has uncorrected"):
        machine.run()
    machine.look(secs=30)
    machine.look(secs=QUIET_SECS - 31)
    with pytest.raises(errors.NeverFits):
        machine.run()
    machine.look(secs=31)
    assert machine.pool.fenced(["GPU-a"]) == ""
    machine.run()


def test_a_card_that_is_lost_is_fenced_at_once_and_one_that_is_missing_when_it_was_missed_twice():
    machine = Machine(card(), card("GPU-b", index="1"))
    run = machine.run()
    machine.cards.clear()
    assert machine.look(lost=frozenset({"GPU-b"})) == {"GPU-b": "the driver has lost it"}
    assert machine.pool.uneasy  # another look is wanted
    with pytest.raises(errors.NoCapacity, match="does not answer"):
        machine.run()
    assert machine.look() == {"GPU-a": "it has disappeared"}
    run.release()
    assert machine.pool.free_slots == 0


def test_a_card_that_is_missed_once_loses_nothing():
    machine = Machine(card())
    machine.run()
    gone, machine.cards = machine.cards, []
    assert not machine.look()
    machine.cards = gone
    assert not machine.look()
    machine.run()


def test_a_card_that_stays_away_is_forgotten_and_one_that_comes_is_used():
    machine = Machine(card())
    machine.cards = []
    for _ in range(3):
        machine.look(secs=30)
    assert len(machine.pool) == 1
    machine.look(secs=FORGET_SECS)
    assert len(machine.pool) == 0
    machine.cards = [card("GPU-new")]
    machine.look()
    machine.run()


def test_while_the_driver_says_nothing_nothing_is_given_away_and_nobody_is_hurt():
    machine = Machine(card())
    machine.run()
    assert machine.pool.silence("the driver does not answer")
    assert not machine.pool.silence("the driver does not answer")
    with pytest.raises(errors.NoCapacity, match="the driver does not answer"):
        machine.run()
    assert not machine.pool.fenced(["GPU-a"])
    machine.look()
    machine.run()


async def test_cards_are_kept_for_what_has_waited_for_long():
    """A queue whose runs overlap without an end would keep its card from the others for ever."""
    machine = Machine(card()).allocator
    first = machine.allocate(Resources(gpus=1), "busy")
    keeper = asyncio.create_task(
        machine.acquire(Resources(gpus=1), owner="patient", rank=lambda: 0, timeout_secs=60, keeps=True)
    )
    await asyncio.sleep(0)
    with pytest.raises(errors.NoCapacity, match="kept"):
        machine.allocate(Resources(gpus=1), "busy")
    assert machine.allocate(Resources(), "busy").gpus == ()
    first.release()
    async with asyncio.timeout(60):
        assert len((await keeper).gpus) == 1
