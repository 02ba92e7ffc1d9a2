"""How much disk a directory takes: as `du` says it, whatever is done there to mislead."""

from __future__ import annotations

import os
import subprocess
import threading
from typing import TYPE_CHECKING

from runner.resources import disk

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def du(path: Path) -> int:
    done = subprocess.run(["du", "-sx", "-B1", str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def test_it_is_what_du_says(tmp_path):
    for name in ("a", "b/c/d", "b/e"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(os.urandom(100_000))
    assert disk.measure(tmp_path).bytes == du(tmp_path) > 300_000
    assert disk.measure(tmp_path).complete


def test_a_file_with_several_names_counts_once(tmp_path, monkeypatch):
    (tmp_path / "one").write_bytes(bytes(MIB))
    (tmp_path / "sub").mkdir()
    for number in range(20):
        os.link(tmp_path / "one", tmp_path / "sub" / str(number))
    assert disk.measure(tmp_path).bytes == du(tmp_path) < 2 * MIB
    monkeypatch.setattr(disk, "MAX_LINKED", 0)  # more of them than are remembered
    assert 0.9 < disk.measure(tmp_path).bytes / du(tmp_path) <= 1


def test_holes_take_no_room(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
        file.write(bytes(MIB))
    assert disk.measure(tmp_path).bytes == du(tmp_path) < 2 * MIB


def test_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "large").write_bytes(bytes(4 * MIB))
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "directory").symlink_to(outside)
    (inside / "file").symlink_to(outside / "large")
    (inside / "circle").symlink_to(inside)
    assert disk.measure(inside).bytes < MIB
    top = tmp_path / "top"
    top.symlink_to(outside)
    assert disk.measure(top).bytes == 0
    assert not disk.measure(top).complete


def test_no_other_file_system_is_entered(tmp_path):
    (tmp_path / "proc").symlink_to("/proc")
    measured = disk.measure(tmp_path)
    assert measured.entries == 1
    # A mount cannot be made everywhere; /dev has some on every machine, and is a file system of its own.
    assert disk.measure(tmp_path.__class__("/dev")).bytes < 64 * MIB


def test_pipes_sockets_and_names_that_are_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / os.fsdecode(b"\xff\xfe\n")).mkdir()
    (tmp_path / os.fsdecode(b"\xff\xfe\n") / "x").write_bytes(bytes(MIB))
    assert MIB <= disk.measure(tmp_path).bytes < 2 * MIB


def test_deeper_than_a_path_can_say_is_told(tmp_path):
    at = os.open(tmp_path, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("deep", dir_fd=at)
        at, above = os.open("deep", os.O_RDONLY, dir_fd=at), at
        os.close(above)
    os.close(at)
    measured = disk.measure(tmp_path)
    assert not measured.complete
    assert measured.entries > 500
    subprocess.run(["rm", "-rf", str(tmp_path / "deep")], check=True)


def test_wider_than_may_be_remembered_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "MAX_WAITING", 10)
    for number in range(30):
        (tmp_path / str(number)).mkdir()
    assert not disk.measure(tmp_path).complete
    few = disk.measure(tmp_path, max_entries=5)  # also when they are all in one directory
    assert (few.entries, few.complete) == (6, False)
    assert disk.measure(tmp_path, max_entries=30).entries == 30


def test_a_directory_that_changes_meanwhile_raises_nothing(tmp_path):
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for number in range(50):
                (tmp_path / f"{number}/x").mkdir(parents=True)
            for number in range(50):
                (tmp_path / f"{number}/x").rmdir()
                (tmp_path / f"{number}").rmdir()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            assert disk.measure(tmp_path).complete
    finally:
        stop.set()
        thread.join()


def test_nothing_is_there(tmp_path):
    assert disk.measure(tmp_path / "none") == disk.Measured(bytes=0, entries=0, complete=True)
