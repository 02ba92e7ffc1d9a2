"""Whatever the bytes are: all below the directory, or `ArchiveRefused` and nothing. Never outside, never for ever."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner import errors
from runner.storage import archive
from tests.unit.storage import hostile
from tests.unit.storage.test_unpack_hostile import REFUSED, snapshot

LIMITS = archive.UnpackLimits(total_bytes=1 << 20, entries=500, ratio_floor_bytes=1 << 20)
SEEDS = [
    hostile.ordinary(),
    gzip.compress(hostile.ordinary()),
    bz2.compress(hostile.ordinary()),
    lzma.compress(hostile.ordinary()),
    hostile.zipped(("d/", b""), ("d/f", b"content" * 100), (hostile.zip_info("l", 0o120777), b"d/f")),
    *(data for data, _ in REFUSED.values() if len(data) < 20_000),
]
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def survives(data: bytes, want: bool | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "victim").write_text("untouched")
        (root / "in").mkdir()
        before = snapshot(root)
        dest = root / "in" / "here"
        try:
            unpacked = archive.unpack(
                hostile.Stream(data), dest, limits=LIMITS, name_if_file="file", want=want
            )
        except errors.ArchiveRefused as refused:
            assert list(dest.iterdir()) == []
            assert len(str(refused)) < 600  # noqa: PT017 - it may be refused or not
        else:
            assert unpacked.bytes <= LIMITS.total_bytes
            for path in dest.rglob("*"):
                assert Path(os.path.realpath(path)).is_relative_to(
                    os.path.realpath(dest)
                )  # not resolve: links may loop
        assert {
            path: seen for path, seen in snapshot(root).items() if not path.startswith("in/here")
        } == before


@st.composite
def mutated(draw):
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "cut", "insert", "copy", "zero"])):
            case "flip":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[at : at + draw(st.sampled_from([1, 100, 512, 5000]))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=20))
            case "copy":
                start = at // 512 * 512
                data[start:start] = data[start : start + 1024]
            case "zero":
                data[at : at + 12] = bytes(12)
            case _:
                pytest.fail("no such mutation")
    return bytes(data)


def checksummed(data: bytes) -> bytes:
    """With every block's checksum put right, so that mutations get past it."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % (sum(out[at : at + 512]))
    return bytes(out)


@MANY
@given(mutated(), st.sampled_from([True, None]))
def test_mutated_archives(data, want):
    survives(data, want)


@MANY
@given(mutated(), st.booleans())
def test_mutated_archives_with_good_checksums(data, compress):
    data = checksummed(data)
    survives(gzip.compress(data) if compress else data, want=True)


@MANY
@given(
    st.binary(max_size=2000),
    st.sampled_from([b"", b"\x1f\x8b\x08\0", b"BZh9", b"\xfd7zXZ\0", b"\x5d\0\0", b"PK\3\4"]),
)
def test_random_bytes(data, magic):
    survives(magic + data, want=True)


names = st.text(st.sampled_from("ab/.\\:\0é "), max_size=12) | st.sampled_from(
    ["..", "a", "a/b", "l", "l/f", "./a", "/", "a/.."]
)
made = st.lists(
    st.tuples(st.sampled_from([b"0", b"1", b"2", b"5", b"x", b"L", b"6"]), names, names), max_size=8
)


@MANY
@given(made)
def test_archives_of_odd_entries(entries):
    def build(kind, name, target):
        if kind == b"x":
            return hostile.pax({"path": name, "linkpath": target})
        if kind == b"L":
            return hostile.long_name(name)
        return hostile.entry(name, b"x" if kind == b"0" else b"", kind, target=target)

    survives(hostile.tar(*(build(*each) for each in entries)), want=True)


links = st.lists(st.sampled_from(["a", "b", "l", "m", "..", "."]), min_size=1, max_size=5).map("/".join)


@MANY
@given(st.lists(st.tuples(st.sampled_from([b"2", b"5", b"0"]), links, links), min_size=2, max_size=10))
def test_no_web_of_links_leads_out(entries):
    survives(
        hostile.tar(*(hostile.header(name, kind, target=target) for kind, name, target in entries)), want=True
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_truncation_is_refused(seed, tmp_path):
    data = SEEDS[seed]
    first, end = (
        (512, data.rindex(b"hard.py") + 512) if seed == 0 else (12, len(data))
    )  # a tar's padding may be cut
    for cut in range(first, end, max(1, end // 150)):
        with pytest.raises(errors.ArchiveRefused):
            archive.unpack(
                hostile.Stream(data[:cut]), tmp_path / "x", limits=LIMITS, name_if_file="file", want=True
            )
        assert list((tmp_path / "x").iterdir()) == []
