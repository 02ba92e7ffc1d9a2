"""Archives as the new client makes them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from typing import TYPE_CHECKING

import pytest

from runner import errors
from runner.client import archives

if TYPE_CHECKING:
    from pathlib import Path


def names(archive: archives.Archive) -> list[str]:
    with tarfile.open(fileobj=archive.file, mode="r:") as tar:
        return tar.getnames()


def test_a_directory_has_bare_names_and_no_compression(tmp_path: Path):
    (tmp_path / "sub" / "empty").mkdir(parents=True)
    (tmp_path / "train.py").write_text("print()")
    (tmp_path / "sub" / "data.bin").write_bytes(b"x" * 3_000_000)
    counted: list[int] = []
    with archives.packed(tmp_path, progress=counted.append) as archive:
        content = archive.file.read()
        archive.file.seek(0)
        assert names(archive) == ["train.py", "sub", "sub/data.bin", "sub/empty"]
    assert content[257:262] == b"ustar"
    assert archive.size == len(content) == sum(counted)
    assert archive.digest == hashlib.sha256(content).hexdigest()


def test_the_same_directory_has_the_same_name(tmp_path: Path):
    (tmp_path / "a").write_text("a")
    with archives.packed(tmp_path) as one, archives.packed(tmp_path) as two:
        assert one.digest == two.digest


def test_a_single_file_is_one_entry_with_a_leading_dot(tmp_path: Path):
    (tmp_path / "d.csv").write_text("1,2")
    with archives.packed(tmp_path / "d.csv") as archive:
        assert names(archive) == ["./d.csv"]
        archive.file.seek(0)
        with tarfile.open(fileobj=archive.file) as tar:
            member = tar.extractfile("./d.csv")
            assert member is not None
            assert member.read() == b"1,2"


def test_links_that_lead_out_are_left_out_and_told(tmp_path: Path):
    (tmp_path / "a").symlink_to("/etc/passwd")
    with archives.packed(tmp_path) as archive:
        assert names(archive) == []
    assert len(archive.warnings) == 1


def test_what_is_not_there_is_a_usage_error(tmp_path: Path):
    with pytest.raises(errors.UsageError, match="nothing"), archives.packed(tmp_path / "nothing"):
        pass


def test_a_retry_counts_back(tmp_path: Path):
    told: list[int] = []
    source = archives.Counted(io.BytesIO(b"x" * 100), told.append)
    source.seek(0, 2)
    source.seek(0)
    source.read(60)
    source.seek(0)
    source.read(30)
    source.read(70)
    assert told == [60, -30, 70]
    assert sum(told) == 100
    assert source.tell() == 100
