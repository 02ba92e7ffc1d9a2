from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from runner.process.tail import Tail, open_regular

if TYPE_CHECKING:
    from pathlib import Path


def test_each_byte_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "output"
    tail = Tail(path)
    content = bytes(range(256)) * 40
    read = b""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), 1000):
            file.write(content[start : start + 1000])
            while piece := tail.read_new(300):
                assert len(piece) <= 300
                read += piece
                assert tail.offset == len(read)
    assert read == content
    assert tail.read_new(300) == b""


def test_a_file_that_is_not_there_yet_has_nothing_new(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "output")
    assert tail.read_new(10) == b""
    tail.path.write_bytes(b"now")
    assert tail.read_new(10) == b"now"


def test_a_truncated_file_is_read_from_its_start(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "output")
    tail.path.write_bytes(b"a long first text")
    assert tail.read_new(100) == b"a long first text"
    tail.path.write_bytes(b"short")
    assert tail.read_new(100) == b"short"
    assert tail.offset == 5


def test_reading_goes_on_at_a_given_offset(tmp_path: Path) -> None:
    path = tmp_path / "output"
    path.write_bytes(b"old new")
    assert Tail(path, offset=4).read_new(100) == b"new"


def test_only_a_file_that_is_there_itself_is_opened(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "output").write_bytes(b"text")
    (real / "link").symlink_to("output")
    (real / "directory").mkdir()
    os.mkfifo(real / "pipe")
    (tmp_path / "linked").symlink_to("real")
    with open_regular(real / "output") as file:
        assert file.read() == b"text"
    for path in (
        "real/link",
        "real/directory",
        "real/pipe",
        "real/none",
        "none/output",
        "linked/output",
        "real/output/x",
    ):
        with pytest.raises(FileNotFoundError):
            open_regular(tmp_path / path)
