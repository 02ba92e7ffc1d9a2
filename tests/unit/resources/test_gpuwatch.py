from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from runner.request.model import Resources
from runner.resources import cards, gpuwatch
from runner.resources.cards import Card
from runner.resources.gpupool import GpuPool
from runner.resources.gpus import Look, Nvml, Sight, Usage
from runner.resources.gpuwatch import GpuWatch

if TYPE_CHECKING:
    from collections.abc import Collection

GIB = 1 << 30
LIMIT_SECS = 30
FIGURES = Usage(memory_bytes=1, utilization=0.5)


class Eyes(Nvml):
    """Sees what the test says."""

    def __init__(self, *sights: Sight) -> None:
        super().__init__()
        self.answer = Look(sights=sights)
        self.looks = 0
        self.blocked = threading.Event()
        self.blocked.set()

    def look(self) -> Look:
        self.looks += 1
        self.blocked.wait(LIMIT_SECS)
        return self.answer

    def usage(self, uuids: Collection[str], pids: Collection[int]) -> dict[str, Usage]:
        self.blocked.wait(LIMIT_SECS)
        return dict.fromkeys(uuids, FIGURES)


def sight(uuid: str = "GPU-a", ecc: int = 0, used: int = 0, index: str = "0") -> Sight:
    card = Card(uuid=uuid, name="Tesla T4", index=index, memory_bytes=15 * GIB)
    return Sight(card=card, used_bytes=used, ecc_errors=ecc)


def watch(eyes: Eyes | None, **environ: str) -> GpuWatch:
    table = cards.load()
    return GpuWatch(GpuPool(None if eyes is None else table.slots), eyes, table, environ)


ASK = Resources(gpus=1)


async def test_what_is_seen_is_given_away_and_what_is_hidden_is_not():
    gpus = watch(Eyes(sight("GPU-a"), sight("GPU-b")), CUDA_VISIBLE_DEVICES="GPU-b")
    await gpus.look()
    assert [state.card.uuid for state in gpus.pool.cards()] == ["GPU-b"]
    assert gpus.pool.free_slots == 4


@pytest.mark.parametrize(
    ("eyes", "environ", "why"),
    [
        (Eyes(), {}, "the NVIDIA driver knows of none that works"),
        (
            Eyes(sight()),
            {"CUDA_VISIBLE_DEVICES": "none"},
            "CUDA_VISIBLE_DEVICES of the daemon hides all there are",
        ),
    ],
)
async def test_no_card_at_all_is_told_with_the_reason(eyes, environ, why):
    gpus = watch(eyes, **environ)
    await gpus.look()
    await gpus.look()
    assert gpus.pool.never(ASK) == f"1 GPU slot is asked for; this machine has no GPU: {why}"


async def test_a_fenced_card_is_told_of_as_long_as_it_is_fenced():
    eyes = Eyes(sight())
    gpus, told = watch(eyes), []
    gpus.on_fenced = lambda fenced: told.append(dict(fenced))
    await gpus.look()
    eyes.answer = Look(sights=(sight(ecc=1),))
    await gpus.look()
    await gpus.look()
    assert told == [{"GPU-a": "it has uncorrected memory errors (1)"}] * 2


async def test_when_a_card_is_lost_those_behind_it_are_counted_anew_and_stay_hidden():
    eyes = Eyes(sight("GPU-a"), sight("GPU-b", index="1"))
    gpus = watch(eyes, CUDA_VISIBLE_DEVICES="0")
    await gpus.look()
    eyes.answer = Look(sights=(sight("GPU-b", index="0"),))
    await gpus.look()
    assert [state.card.uuid for state in gpus.pool.cards()] == ["GPU-a"]


async def test_a_run_that_failed_learns_that_its_card_is_gone_with_two_looks():
    eyes = Eyes(sight())
    gpus = watch(eyes)
    await gpus.look()
    assert await gpus.failed(["GPU-a"]) == ""
    eyes.answer = Look(sights=(sight("GPU-b"),))
    assert "it has disappeared" in await gpus.failed(["GPU-a"])


async def test_the_loop_goes_on_while_the_driver_hangs_and_nothing_is_given_away(monkeypatch):
    eyes = Eyes(sight())
    gpus = watch(eyes)
    await gpus.look()
    monkeypatch.setattr(gpuwatch, "LIMIT_SECS", 0.05)
    eyes.blocked.clear()
    looking = asyncio.create_task(gpus.look())
    await looking
    assert "has not answered" in gpus.pool.lacking(ASK, "q")
    await gpus.look()  # does not wait for a second thread
    assert eyes.looks == 2
    assert await gpus.usage(["GPU-a"], []) == {}
    news: list[str] = []
    gpus.changed = lambda: news.append("it answers")
    eyes.blocked.set()
    async with asyncio.timeout(LIMIT_SECS):
        while gpus.pool.lacking(ASK, "q"):
            await gpus.look()
            await asyncio.sleep(0.01)
    assert eyes.looks >= 3
    assert news == ["it answers"]  # those who wait for a card hear of it


async def test_a_driver_that_hangs_while_it_is_asked_for_figures_holds_up_neither_the_loop_nor_the_end(
    monkeypatch,
):
    eyes = Eyes(sight())
    gpus = watch(eyes)
    await gpus.look()
    monkeypatch.setattr(gpuwatch, "LIMIT_SECS", 0.05)
    eyes.blocked.clear()
    assert await gpus.usage(["GPU-a"], []) == {}
    # Not one of the loop's threads, which are waited for when it is closed.
    assert [each.daemon for each in threading.enumerate() if each.name == "nvml"] == [True]
    await gpus.look()
    assert eyes.looks == 1  # the answer to the other question is still owed
    assert "has not answered" in gpus.pool.lacking(ASK, "q")
    assert await gpus.usage(["GPU-a"], []) == {}
    eyes.blocked.set()
    async with asyncio.timeout(LIMIT_SECS):
        while gpus.pool.lacking(ASK, "q"):
            await gpus.look()
            await asyncio.sleep(0.01)
    monkeypatch.setattr(gpuwatch, "LIMIT_SECS", LIMIT_SECS)
    assert await gpus.usage(["GPU-a"], []) == {"GPU-a": FIGURES}


async def test_without_nvml_nothing_is_ever_looked_at():
    gpus = watch(None)
    await gpus.look()
    await gpus.run()
    assert await gpus.failed(["GPU-a"]) == ""
    assert "--cpu-only" in gpus.pool.never(ASK)


async def test_what_a_run_gave_back_is_looked_at_at_once_and_once_more(monkeypatch):
    monkeypatch.setattr(gpuwatch, "SOON_SECS", 0.01)
    eyes = Eyes(sight())
    gpus, news = watch(eyes), []
    gpus.changed = lambda: news.append(gpus.pool.cards()[0].used_bytes)
    await gpus.look()
    gpus.pool.take(ASK, "q", 1)
    running = asyncio.create_task(gpus.run())
    eyes.answer = Look(sights=(sight(used=GIB),))
    gpus.pool.give_back(1)
    gpus.wake()
    async with asyncio.timeout(LIMIT_SECS):
        while GIB not in news:
            await asyncio.sleep(0.01)
        eyes.answer = Look(sights=(sight(used=0),))  # the driver has taken a moment
        while news[-1]:
            await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_an_ask_for_cards_is_preceded_by_a_look_and_others_are_not():
    eyes = Eyes(sight())
    gpus = watch(eyes)
    await gpus.refresh(Resources(cpus=1, gpu_mem_bytes=GIB))
    assert eyes.looks == 0
    await gpus.refresh(ASK)
    await gpus.refresh(ASK)  # a moment later: known
    assert eyes.looks == 1
