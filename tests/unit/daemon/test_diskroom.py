"""Room on the disk: caches go first, then no work is taken, until there is room again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from runner.daemon import diskroom
from runner.daemon.diskroom import Cache, DiskRoom

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
TOTAL = 100 * GIB
LOW = 2 * GIB


class Disk:
    """A volume whose free space the test sets, two caches on it, and what the daemon is told."""

    def __init__(self, directory: Path) -> None:
        self.free = 50 * GIB
        self.in_cache = {"artifacts": 0, "environments": 0}
        self.asked: list[tuple[str, int]] = []
        self.changes = 0
        self.directory = directory
        self.room = DiskRoom(
            [directory],
            [self._cache(name) for name in self.in_cache],
            changed=self._changed,
            usage=lambda _: (TOTAL, self.free),
        )

    def _cache(self, name: str) -> Cache:
        async def make_room(needed: int) -> int:
            self.asked.append((name, needed))
            freed = min(needed, self.in_cache[name])
            self.in_cache[name] -= freed
            self.free += freed
            return freed

        return Cache(directory=self.directory, make_room=make_room)

    def _changed(self) -> None:
        self.changes += 1


@pytest.fixture
def volume(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


async def test_with_room_nothing_is_removed(volume):
    await volume.room.look()
    assert (volume.room.why_not, volume.asked, volume.changes) == ("", [], 0)


async def test_caches_are_emptied_before_work_is_refused(volume):
    volume.in_cache = {"artifacts": GIB // 2, "environments": 10 * GIB}
    volume.free = int(1.2 * LOW)
    await volume.room.look()
    assert [name for name, _ in volume.asked] == ["artifacts", "environments"]
    assert volume.free >= diskroom.EARLY * LOW
    assert volume.room.why_not == ""


async def test_without_anything_to_remove_no_work_is_taken_until_there_is_room(volume):
    volume.free = GIB
    await volume.room.look()
    assert volume.room.why_not == (
        f"the disk is nearly full: 1.07 GB are free on the volume of {volume.directory}, 2.68 GB are needed"
    )
    assert volume.changes == 1
    volume.free = int(1.1 * LOW)  # above the mark, but what is there may go at once
    await volume.room.look()
    assert volume.room.why_not
    volume.free = int(1.3 * LOW)
    await volume.room.look()
    assert (volume.room.why_not, volume.changes) == ("", 2)


async def test_caches_that_gave_nothing_are_not_asked_at_every_look(volume):
    volume.free = GIB
    for _ in range(5):
        await volume.room.look()
    assert len(volume.asked) == 2


async def test_caches_on_other_volumes_stay(tmp_path):
    volume = Disk(tmp_path)
    elsewhere = Disk(tmp_path.__class__("/proc"))
    volume.room._caches = elsewhere.room._caches
    volume.free = GIB
    await volume.room.look()
    assert elsewhere.asked == []
    assert volume.room.why_not


async def test_a_cache_that_cannot_be_emptied_and_a_volume_that_cannot_be_asked(volume):
    async def fails(_: int) -> int:
        raise OSError("read-only")

    def usage(_: Path) -> tuple[int, int]:
        raise OSError(5, "Input/output error")

    volume.room._caches.insert(0, Cache(directory=volume.directory, make_room=fails))
    volume.in_cache["environments"] = 10 * GIB
    volume.free = GIB
    await volume.room.look()
    assert volume.room.why_not == ""
    volume.room._usage = usage
    await volume.room.look()
    assert volume.room.why_not == f"the volume of {volume.directory} cannot be used: Input/output error"


async def test_the_real_volume_can_be_asked(tmp_path):
    room = DiskRoom([tmp_path], [], changed=lambda: None)
    await room.look()
    assert room.why_not == "" or "nearly full" in room.why_not
