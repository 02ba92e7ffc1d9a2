from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import subprocess
import tarfile
import threading
import tracemalloc
from pathlib import Path

import pytest

from runner import errors
from runner.storage import archive
from tests.unit.storage import hostile
from tests.unit.storage.hostile import (
    Stream,
    entry,
    hardlink,
    header,
    long_name,
    pax,
    symlink,
    tar,
    zip_info,
    zipped,
)

LIMITS = archive.UnpackLimits(total_bytes=1 << 30)
CAPTURED = sorted(Path("tests/data/captured/blobs").glob("*.tar"))
ORDINARY = hostile.ordinary()


def unpack(data, dest, want=None, **more):
    stream = Stream(data) if isinstance(data, bytes) else data
    return archive.unpack(stream, dest, **{"limits": LIMITS, "name_if_file": "file", "want": want, **more})


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def tree(root):
    """Everything below a directory, as far as an archive can say it."""
    found = {}
    for path in sorted(Path(root).rglob("*")):
        info = path.lstat()
        what = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        mode = None if path.is_symlink() else stat.S_IMODE(info.st_mode)
        found[str(path.relative_to(root))] = (stat.S_IFMT(info.st_mode), mode, what, int(info.st_mtime))
    return found


def gnu_tar(data, dest):
    dest.mkdir()
    subprocess.run(
        ["tar", "x", "-C", dest, "--no-same-owner", "--no-same-permissions"], input=data, check=True
    )
    return tree(dest)


@pytest.mark.parametrize("path", CAPTURED, ids=lambda path: path.name[:8])
def test_what_the_real_client_packed_comes_out_as_with_tar(path, tmp_path):
    unpacked = unpack(path.read_bytes(), tmp_path / "ours", want=True)
    assert not unpacked.single
    assert tree(tmp_path / "ours") == gnu_tar(path.read_bytes(), tmp_path / "theirs")


@pytest.mark.parametrize("most", [1 << 30, 700, 1], ids=["at once", "in pieces", "a byte each"])
@pytest.mark.parametrize(
    "compress",
    [bytes, gzip.compress, bz2.compress, lzma.compress, lambda data: lzma.compress(data, lzma.FORMAT_ALONE)],
)
def test_an_ordinary_archive(compress, most, tmp_path):
    unpacked = unpack(Stream(compress(ORDINARY), most), tmp_path / "ours")
    ours, theirs = tree(tmp_path / "ours"), gnu_tar(ORDINARY, tmp_path / "theirs")
    for each in (
        ours,
        theirs,
    ):  # GNU tar makes links with ".." at the end and forgets the directories' times over it
        each["pkg"], each["pkg/sub"] = each["pkg"][:3], each["pkg/sub"][:3]
    assert ours == theirs
    assert unpacked.entries == 8
    assert (
        unpacked.bytes
        == sum(
            path.lstat().st_size
            for path in (tmp_path / "ours").rglob("*")
            if path.is_file() and not path.is_symlink()
        )
        - 9
    )
    assert (tmp_path / "ours/hard.py").samefile(tmp_path / "ours/train.py")


@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "pax", "oldgnu"])
@pytest.mark.parametrize("option", ["--no-auto-compress", "-z", "-j", "-J"])
def test_what_gnu_tar_packs(form, option, tmp_path):
    """The older client ran `tar -C dir .` with a compression."""
    source = tmp_path / "source"
    (source / "a" / ("b" * 40)).mkdir(parents=True)
    (source / "a" / ("b" * 40) / "file").write_bytes(b"content" * 1000)
    (source / "a" / "program").write_text("#!")
    (source / "a" / "program").chmod(0o755)
    (source / "empty").touch()
    (source / "link").symlink_to("a/program")
    os.link(source / "empty", source / "other")
    if form not in {"v7", "ustar"}:
        (source / ("é" * 120)).write_text("long")
    made = subprocess.run(
        ["tar", "c", f"--format={form}", option, "-C", source, "."], stdout=subprocess.PIPE, check=True
    )
    unpack(made.stdout, tmp_path / "ours", want=True)
    assert tree(tmp_path / "ours") == tree(source)


def test_members_one_after_another_are_one_stream(tmp_path):
    halves = gzip.compress(ORDINARY[:1000]) + gzip.compress(ORDINARY[1000:]) + bytes(700)
    unpack(halves, tmp_path / "ours")
    assert (tmp_path / "ours/train.py").read_text() == "print(1)\n"


def test_many_tiny_members_take_no_quadratic_time(tmp_path):
    unpack(gzip.compress(ORDINARY) + gzip.compress(b"") * 100_000, tmp_path / "ours")
    assert (tmp_path / "ours/train.py").exists()


def test_sizes_past_8_gib_and_exact_times(tmp_path):
    made = tar(
        pax({"size": "5", "mtime": "1600000000.123456789"}), header("f", size=0) + hostile.padded(b"hello")
    )
    unpack(made, tmp_path / "d")
    assert (tmp_path / "d/f").read_text() == "hello"
    assert (tmp_path / "d/f").stat().st_mtime_ns == 1_600_000_000_123_456_789


@pytest.mark.parametrize("mtime", ["-5", "99999999999999", "nan", "", "1e400", "9" * 5000])
def test_absurd_times_are_no_reason_to_refuse(mtime, tmp_path):
    unpack(tar(pax({"mtime": mtime}), entry("f", b"x")), tmp_path / "d")
    assert (tmp_path / "d/f").stat().st_mtime >= 0


def test_times_of_directories_survive_their_content(tmp_path):
    unpack(
        tar(header("d", b"5", mtime=1000), header("d/e", b"5", mtime=2000), entry("d/e/f", b"x")),
        tmp_path / "x",
    )
    assert ((tmp_path / "x/d").stat().st_mtime, (tmp_path / "x/d/e").stat().st_mtime) == (1000, 2000)


def test_modes_are_stripped_and_the_owner_is_let_in(tmp_path):
    made = tar(
        entry("suid", b"x", mode=0o6755),
        entry("none", b"x", mode=0),
        header("d", b"5", mode=0o1000),
        entry("d/f", b"x", mode=0o500),
    )
    unpack(made, tmp_path / "x")
    modes = {
        str(path.relative_to(tmp_path / "x")): stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "x").rglob("*")
    }
    assert modes == {"suid": 0o755, "none": 0o600, "d": 0o700, "d/f": 0o700}


def test_a_later_file_replaces_an_earlier_one_and_never_what_is_linked_to_it(tmp_path):
    unpack(tar(entry("f", b"first"), hardlink("g", "f"), entry("f", b"second")), tmp_path / "x")
    assert (tmp_path / "x/f").read_text() == "second"
    assert (tmp_path / "x/g").read_text() == "first"


def test_links_and_names_twice_are_no_harm(tmp_path):
    twice = (
        header("d", b"5"),
        entry("f", b"x"),
        symlink("d/l", "../f"),
        hardlink("h", "f"),
        hardlink("f", "f"),
    )
    unpack(tar(*twice, *twice[:4]), tmp_path / "x")
    assert (tmp_path / "x/d/l").read_text() == "x"


@pytest.mark.parametrize("target", ["f", "./f", "d/../f"[5:], "missing", "d//f", ".", "d/"])
def test_links_that_stay_inside(target, tmp_path):
    unpack(tar(header("d", b"5"), symlink("l", target)), tmp_path / "x")
    assert os.readlink(tmp_path / "x/l") == target  # noqa: PTH115 - a Path would normalise it


def test_old_ways_to_say_directory(tmp_path):
    unpack(
        tar(
            entry("old/", b"", kind=b"\0"),
            entry("older/", b"ignored", kind=b"0"),
            entry("f", b"x", kind=b"7"),
        ),
        tmp_path / "x",
    )
    assert (tmp_path / "x/old").is_dir()
    assert (tmp_path / "x/older").is_dir()
    assert (tmp_path / "x/f").read_text() == "x"


def test_the_root_itself_may_be_named_in_every_way(tmp_path):
    unpack(
        tar(
            header("./", b"5"), header(".", b"5"), header("", b"5"), entry("./f", b"x"), entry(".//./g", b"x")
        ),
        tmp_path / "x",
    )
    assert listing(tmp_path / "x") == ["f", "g"]


def test_names_that_only_look_odd(tmp_path):
    names = ["a\\b", "...", "..x", "x..", "a:b", " ", "-rf", "\n", "~", "$HOME"]
    unpack(tar(*[entry(name, b"x") for name in names]), tmp_path / "x")
    assert listing(tmp_path / "x") == sorted(names)


def test_names_that_are_not_utf_8_keep_their_bytes(tmp_path):
    made = entry("AAA", b"x").replace(b"AAA", b"\xff\xfe\xfd", 1)
    made = made[:148] + b"%06o\0 " % (sum(made[:148]) + sum(made[156:512]) + 256) + made[156:]
    unpack(made + hostile.END, tmp_path / "x")
    assert listing(tmp_path / "x") == [os.fsdecode(b"\xff\xfe\xfd")]


def test_pax_goes_before_the_global_header_and_both_before_the_block(tmp_path):
    made = tar(
        pax({"mtime": "1000", "comment": "from git"}, b"g"),
        entry("a"),
        pax({"mtime": "2000"}),
        entry("b"),
        entry("c"),
    )
    unpack(made, tmp_path / "x")
    assert [(tmp_path / "x" / name).stat().st_mtime for name in "abc"] == [1000, 2000, 1000]


@pytest.mark.parametrize("data", [bytes(10240), bytes(1024), gzip.compress(bytes(10240)), hostile.zipped()])
@pytest.mark.parametrize("want", [True, None])
def test_an_archive_without_entries(data, want, tmp_path):
    unpacked = unpack(data, tmp_path / "x", want=want)
    assert (unpacked.entries, unpacked.bytes, unpacked.single, unpacked.warnings) == (0, 0, False, ())
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize("data", [ORDINARY, gzip.compress(ORDINARY), b"text", b"", zipped(("a", b"b"))])
def test_what_is_not_to_be_unpacked_is_kept_as_it_is(data, tmp_path):
    unpacked = unpack(data, tmp_path / "x", want=False, name_if_file="blob.tar")
    assert (tmp_path / "x/blob.tar").read_bytes() == data
    assert (unpacked.entries, unpacked.bytes, unpacked.single, unpacked.warnings) == (1, len(data), True, ())


@pytest.mark.parametrize("data", [b"just text", b"", gzip.compress(b"a,b\n" * 100), os.urandom(3_000_000)])
def test_what_is_no_archive_is_kept_and_said_so_when_one_was_expected(data, tmp_path):
    unpacked = unpack(data, tmp_path / "x", want=True)
    assert (tmp_path / "x/file").read_bytes() == data
    assert unpacked.single
    assert "no archive" in unpacked.warnings[0]
    assert unpack(data, tmp_path / "y", want=None).warnings == ()


@pytest.mark.parametrize("data", [gzip.compress(ORDINARY)[:30], b"\x89LZO\x00\r\n\x1a\n" + bytes(100)])
def test_a_broken_or_foreign_archive_is_refused_only_when_one_was_expected(data, tmp_path):
    with pytest.raises(errors.ArchiveRefused):
        unpack(data, tmp_path / "x", want=True)
    assert unpack(data, tmp_path / "y", want=None).single


def test_a_zip(tmp_path):
    data = zipped(
        ("d/", b""),
        ("d/f", b"content" * 1000),
        (zip_info("program", 0o100755), b"#!"),
        (zip_info("link", stat.S_IFLNK | 0o777), b"d/f"),
        (zip_info("windows", 0, system=0), b"x"),
    )
    unpacked = unpack(data, tmp_path / "p" / "x")
    assert str(unpacked.kind) == "zip"
    assert (tmp_path / "p/x/link").read_bytes() == b"content" * 1000
    assert stat.S_IMODE((tmp_path / "p/x/program").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "p/x/windows").stat().st_mode) == 0o644
    assert listing(tmp_path / "p") == ["x"]


def test_the_directory_must_be_empty(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError):
        unpack(ORDINARY, tmp_path)
    assert listing(tmp_path) == ["mine"]


@pytest.mark.parametrize("fail_at", [0, 600, 5000, 2_000_000])
@pytest.mark.parametrize("want", [True, False])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, lambda data: zipped(("f", data))])
def test_an_outage_passes_through_and_leaves_nothing(compress, want, fail_at, tmp_path):
    data = compress(ORDINARY[:-1024] + tar(entry("big", os.urandom(4_000_000))))
    outage = errors.StorageUnavailable("gone", endpoint="s3:9000")
    with pytest.raises(errors.StorageUnavailable) as caught:
        unpack(Stream(data, 4096, fail_at, outage), tmp_path / "x", want=want)
    assert caught.value is outage
    assert listing(tmp_path) == ["x"]
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize("want", [True, False])
def test_it_stops_when_told(want, tmp_path):
    cancelled = threading.Event()

    class Endless:
        """An archive of one file of a terabyte."""

        read_bytes = 0

        def read(self, size=-1, /):
            self.read_bytes += size
            if self.read_bytes > 8 << 20:
                cancelled.set()
            return (
                hostile.header("f", raw_size=b"\x80" + (1 << 40).to_bytes(11, "big"))
                if self.read_bytes == size
                else bytes(size)
            )

    stream = Endless()
    with pytest.raises(archive.Stopped):
        unpack(
            stream,
            tmp_path / "x",
            want=want,
            cancelled=cancelled,
            limits=archive.UnpackLimits(total_bytes=1 << 50),
        )
    assert stream.read_bytes < 12 << 20
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress], ids=["plain", "gzip", "xz"])
def test_memory_does_not_grow_with_the_archive(compress, tmp_path):
    data = compress(tar(*[entry(f"d{n}/f", bytes(1 << 20)) for n in range(100)]))
    tracemalloc.start()
    try:
        unpack(Stream(data), tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for data in (ORDINARY, zipped(("f", b"x"))):
        with pytest.raises(OSError, match="No space"):
            unpack(data, tmp_path / "x")
        assert list((tmp_path / "x").iterdir()) == []


def test_a_link_planted_meanwhile_is_not_followed(tmp_path):
    """The walk goes through descriptors: a directory swapped for a link leads nowhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    data = tar(header("d", b"5"), entry("first", bytes(2 << 20)), entry("d/f", b"x"))

    class Planting(Stream):
        def read(self, size=-1, /):
            if (tmp_path / "x/first").exists() and not (tmp_path / "x/d").is_symlink():
                (tmp_path / "x/d").rmdir()
                (tmp_path / "x/d").symlink_to(outside)
            return super().read(size)

    with pytest.raises((errors.ArchiveRefused, FileNotFoundError)):
        unpack(Planting(data, 512), tmp_path / "x")
    assert list(outside.iterdir()) == []


def test_an_archive_of_a_tarfile_that_was_streamed(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w|gz") as made:
        made.add("tests/data/captured/plain.json", "a/b/plain.json")
    unpack(out.getvalue(), tmp_path / "x", want=True)
    assert (tmp_path / "x/a/b/plain.json").read_bytes() == Path("tests/data/captured/plain.json").read_bytes()


def test_a_long_name_of_gnu(tmp_path):
    name = "/".join(["d" * 100] * 3)
    unpack(tar(long_name(name), entry("cut", b"x"), entry("short", b"y")), tmp_path / "x")
    assert (tmp_path / "x" / name).read_text() == "x"
    assert (tmp_path / "x/short").read_text() == "y"
