from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from pathlib import Path

import pytest

from runner.storage.archive.sniff import HEAD_BYTES, Container, Format, sniff
from tests.unit.storage import hostile

CAPTURED = sorted(Path("tests/data/captured/blobs").glob("*.tar"))
TAR = hostile.ordinary()
EMPTY = bytes(10240)


def alone(data):
    return lzma.compress(data, format=lzma.FORMAT_ALONE)


def v7():
    return hostile.header("old", magic=b"\0" * 8) + hostile.END


def big_bzip2():
    return bz2.compress(hostile.entry("f", os.urandom(1_500_000)) + hostile.END)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (TAR, "tar"),
        (v7(), "tar"),
        (EMPTY, "tar"),
        (bytes(1024), "tar"),
        (gzip.compress(TAR), "tar+gzip"),
        (gzip.compress(b"") + gzip.compress(TAR), "tar+gzip"),
        (bz2.compress(TAR), "tar+bzip2"),
        (lzma.compress(TAR), "tar+xz"),
        (alone(TAR), "tar+lzma"),
        (gzip.compress(EMPTY), "tar+gzip"),
        (bz2.compress(EMPTY), "tar+bzip2"),
        (hostile.zipped(("a", b"b")), "zip"),
        (hostile.zipped(), "zip"),
        (b"", "file"),
        (b"hello", "file"),
        (bytes(512), "file"),
        (bytes(100_000), "file"),
        (b"\x1f\x8bno", "file+gzip"),
        (gzip.compress(b"text" * 500), "file+gzip"),
        (b"BZh", "file+bzip2"),
        (b"x" * 257 + b"ustar", "tar"),
        (hostile.entry("BZh-is-a-name", b"x") + hostile.END, "tar"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",  # gzip writes the time
)
def test_content_decides(data, said):
    assert str(sniff(data, complete=True)) == said


def test_the_head_suffices_for_the_largest_bzip2_block():
    assert str(sniff(big_bzip2()[:HEAD_BYTES], complete=False)) == "tar+bzip2"


@pytest.mark.parametrize("path", CAPTURED, ids=lambda path: path.name[:8])
def test_what_the_real_client_packed(path):
    assert str(sniff(path.read_bytes(), complete=True)) == "tar"


def test_there_are_captured_archives():
    assert len(CAPTURED) == 5


def test_zeros_that_go_on_are_no_empty_archive():
    assert str(sniff(EMPTY, complete=False)) == "file"


@pytest.mark.parametrize(
    ("data", "flaw"), [(b"\x89LZO\x00\r\n\x1a\n...", "lzop"), (b"\x28\xb5\x2f\xfd...", "zstd")]
)
def test_archives_of_other_kinds_are_known_but_not_supported(data, flaw):
    found = sniff(data, complete=True)
    assert flaw in found.flaw
    assert str(found) == "file"


def test_a_broken_archive_says_what_is_wrong():
    assert sniff(gzip.compress(TAR)[:20], complete=True).flaw
    assert not sniff(gzip.compress(b"hello"), complete=True).flaw


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar(form):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        archive.addfile(tarfile.TarInfo("f"))
    assert sniff(out.getvalue(), complete=True) == Format(Container.TAR)
