from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import zlib
from pathlib import Path

import pytest

from runner import errors
from runner.storage import archive
from tests.unit.storage import hostile
from tests.unit.storage.hostile import (
    END,
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

LIMITS = archive.UnpackLimits(total_bytes=10 << 20, entries=1000)
DEEP = "/".join(["d" * 200] * 6)

REFUSED = {
    # names
    "absolute": (tar(entry("/etc/passwd", b"x")), "absolute"),
    "absolute, second": (tar(entry("ok", b"x"), entry("/tmp/evil", b"x")), "absolute"),
    "dot-dot": (tar(entry("../evil", b"x")), "'..'"),
    "dot-dot inside": (tar(entry("a/../../evil", b"x")), "'..'"),
    "dot-dot after ./": (tar(entry("./../evil", b"x")), "'..'"),
    "dot-dot directory": (tar(header("..", b"5")), "'..'"),
    "backslashes": (tar(entry("..\\..\\evil", b"x")), "backslash"),
    "backslash root": (tar(entry("\\evil", b"x")), "backslash"),
    "drive": (tar(entry("C:\\evil", b"x")), "drive"),
    "drive, slash": (tar(entry("c:/evil", b"x")), "drive"),
    "pax path absolute": (tar(pax({"path": "/etc/evil"}), entry("ok", b"x")), "absolute"),
    "pax path dot-dot": (tar(pax({"path": "a/../../evil"}), entry("ok", b"x")), "'..'"),
    "pax path NUL": (tar(pax({"path": b"a\0b"}), entry("ok", b"x")), "NUL"),
    "global pax path": (tar(pax({"path": "../evil"}, b"g"), entry("ok", b"x")), "'..'"),
    "long name dot-dot": (tar(long_name("x" * 150 + "/../../evil"), entry("ok", b"x")), "'..'"),
    "ustar prefix": (tar(entry("evil", b"x", prefix="..")), "'..'"),
    "component too long": (tar(long_name("n" * 256), entry("ok")), "too long"),
    "path too long": (tar(long_name("d/" * 60 + "/".join(["n" * 250] * 20)), entry("ok")), "too long"),
    "too deep": (tar(long_name("d/" * 200 + "f"), entry("ok")), "deeper"),
    "file is the root": (tar(entry("./", b"x" * 5, kind=b"2", target="x")), "not a directory"),
    # kinds
    "character device": (tar(header("null", b"3")), "device"),
    "block device": (tar(header("sda", b"4")), "device"),
    "FIFO": (tar(header("pipe", b"6")), "FIFO"),
    "unknown kind": (tar(header("what", b"Q")), "unknown"),
    "GNU sparse": (tar(header("sparse", b"S", 0)), "sparse"),
    "pax sparse": (tar(pax({"GNU.sparse.major": "1", "GNU.sparse.name": "x"}), entry("s", b"x")), "sparse"),
    # links
    "absolute link": (tar(symlink("l", "/etc")), "out of the directory"),
    "link up": (tar(symlink("l", "../x")), "out of the directory"),
    "link up from below": (tar(header("a", b"5"), symlink("a/l", "../../x")), "out of the directory"),
    "empty link": (tar(symlink("l", "")), "out of the directory"),
    "link down and up": (tar(symlink("l", "a/../../x")), "out of the directory"),
    "link through a link": (
        tar(header("a", b"5"), header("a/b", b"5"), symlink("a/b/l", "../.."), symlink("z", "a/b/l/../..")),
        "out of the directory",
    ),
    "link first, its way later": (
        tar(symlink("z", "a/b/../../.."), symlink("a", ".")),
        "out of the directory",
    ),
    "write through a link": (tar(header("d", b"5"), symlink("l", "d"), entry("l/f", b"x")), "through a link"),
    "directory through a link": (
        tar(header("d", b"5"), symlink("l", "d"), header("l/x", b"5")),
        "through a link",
    ),
    "link through a link, name": (
        tar(header("d", b"5"), symlink("l", "d"), symlink("l/x", "y")),
        "through a link",
    ),
    "directory over a link": (tar(header("d", b"5"), symlink("l", "d"), header("l", b"5")), "through a link"),
    "file over a link": (tar(symlink("l", "victim"), entry("l", b"x")), "link"),
    "other link over a link": (tar(symlink("l", "a"), symlink("l", "b")), "link"),
    "hard link out": (tar(hardlink("h", "/etc/passwd")), "absolute"),
    "hard link up": (tar(hardlink("h", "../x")), "'..'"),
    "hard link to nothing": (tar(hardlink("h", "nothing")), "did not come before"),
    "hard link to a later file": (tar(hardlink("h", "f"), entry("f", b"x")), "did not come before"),
    "hard link to a link": (tar(symlink("l", "f"), hardlink("h", "l")), "hard link"),
    "hard link through a link": (
        tar(entry("d/f", b"x"), symlink("l", "d"), hardlink("h", "l/f")),
        "did not come before",
    ),
    "hard link to a directory": (tar(header("d", b"5"), hardlink("h", "d")), "hard link"),
    "hard link to the root": (tar(hardlink("h", "./")), "directory itself"),
    "pax link path": (tar(pax({"linkpath": "/etc/passwd"}), symlink("l", "ok")), "out of the directory"),
    "GNU long link": (tar(long_name("../" * 50 + "x", b"K"), symlink("l", "ok")), "out of the directory"),
    # kinds that do not fit together
    "directory over a file": (tar(entry("f", b"x"), header("f", b"5")), "where a file is"),
    "file below a file": (tar(entry("f", b"x"), entry("f/g", b"x")), "where a file is"),
    "file over a directory": (tar(header("d", b"5"), entry("d", b"x")), "replace a directory"),
    # damage
    "negative size": (tar(header("f", raw_size=b"\xff" * 12)), "negative"),  # CVE-2025-8194
    "negative size, pax": (tar(pax({"size": "-512"}), entry("f", b"x")), "not a number"),
    "negative size of a pax header": (tar(header("f", b"x", raw_size=b"\xff" * 11 + b"\0")), "negative"),
    "octal with a sign": (tar(header("f", raw_size=b"-0000000001\0")), "number"),
    "huge size": (tar(header("f", raw_size=b"\x80" + b"\xff" * 11)), "larger"),
    "huge pax size": (tar(pax({"size": "9" * 19}), entry("f", b"x")), "larger"),
    "absurd pax size": (tar(pax({"size": "9" * 5000}), entry("f", b"x")), "not a number"),
    "huge pax header": (header("p", b"x", 1 << 30), "extended header of more"),
    "huge long name": (header("p", b"L", 1 << 30), "extended header of more"),
    "chain of headers": (tar(*[long_name("x")] * 3000, entry("f")), "too many extended"),
    "global headers add up": (
        tar(*[entry("ok") + pax({f"k{n}": "v" * 90_000}, b"g") for n in range(20)]),
        "global",
    ),
    "pax header without an entry": (pax({"path": "x"}) + END, "ends after"),
    "pax record too long": (tar(entry("p", b"99 path=x\n", kind=b"x"), entry("f")), "bad record"),
    "pax record zero": (tar(entry("p", b"0 path=x\n", kind=b"x"), entry("f")), "bad record"),
    "pax record huge": (tar(entry("p", b"9" * 19 + b" a=b\n", kind=b"x"), entry("f")), "bad record"),
    "pax record no value": (tar(entry("p", b"7 path\n", kind=b"x"), entry("f")), "without a value"),
    "bad checksum": (entry("f", b"x") + entry("g", b"x").replace(b"g", b"h", 1) + END, "checksum"),
    "no end": (entry("f", b"x"), "no end marker"),
    "half a header": (entry("f", b"x") + header("g")[:300], "cut off"),
    "half a file": (header("f", b"0", 5000) + b"x" * 3000, "cut off"),
    "gzip cut": (gzip.compress(tar(entry("f", os.urandom(5000))))[:-100], "ends in the middle"),
    "gzip without trailer": (gzip.compress(tar(entry("f", b"x")))[:-8], "ends in the middle"),
    "gzip checksum": (gzip.compress(tar(entry("f", b"x")))[:-8] + b"\1" * 8, "damaged"),
    "gzip garbage": (gzip.compress(tar(entry("f", b"x"))) + b"garbage", "damaged"),
    "bzip2 cut": (bz2.compress(tar(entry("f", os.urandom(2_000_000))))[:-100], "ends in the middle"),
    "xz cut": (lzma.compress(tar(entry("f", os.urandom(5000))))[:-30], "ends in the middle"),
    # too much
    "too many bytes": (tar(entry("f", bytes(11 << 20))), "larger than"),
    "too many entries": (tar(*[entry(f"f{n}") for n in range(1001)]), "one more than"),
    "too many implied directories": (
        tar(*[entry(f"{n}/" + "d/" * 30 + "f") for n in range(40)]),
        "one more than",
    ),
    # zip
    "zip absolute": (zipped(("/etc/evil", b"x")), "absolute"),
    "zip dot-dot": (zipped(("a/../../evil", b"x")), "'..'"),
    "zip backslash": (zipped(("..\\evil", b"x")), "backslash"),
    "zip NUL": (zipped(("abcd", b"x")).replace(b"abcd", b"a\0cd"), "NUL"),
    "zip link out": (zipped((zip_info("l", stat.S_IFLNK | 0o777), b"/etc")), "out of the directory"),
    "zip write through a link": (
        zipped(("d/x", b""), (zip_info("l", stat.S_IFLNK | 0o777), b"d"), ("l/f", b"x")),
        "through a link",
    ),
    "zip long link": (zipped((zip_info("l", stat.S_IFLNK | 0o777), b"a/" * 4000)), "too long"),
    "zip FIFO": (zipped((zip_info("p", stat.S_IFIFO | 0o600), b"")), "FIFO"),
    "zip device": (zipped((zip_info("p", stat.S_IFBLK | 0o600), b"")), "device"),
    "zip too many bytes": (zipped(("f", bytes(11 << 20))), "larger than"),
    "zip cut": (zipped(("f", os.urandom(5000)))[:-60], "damaged"),
    "zip checksum": (
        zipped(("f", b"content" * 9)).replace(struct.pack("<L", zlib.crc32(b"content" * 9)), b"\0" * 4),
        "damaged",
    ),
}


@pytest.fixture
def world(tmp_path):
    """A directory to fill, beside a file that nothing may touch."""
    sentinel = tmp_path / "victim"
    sentinel.write_text("untouched")
    dest = tmp_path / "in" / "here"
    dest.parent.mkdir()
    before = snapshot(tmp_path)
    yield dest
    if dest.exists():
        for path in dest.rglob("*"):
            assert not path.is_symlink() or path.resolve().is_relative_to(dest.resolve())
    assert {
        path: seen for path, seen in snapshot(tmp_path).items() if not path.startswith("in/here")
    } == before


def snapshot(root):
    found = {}
    for directory, names, files in os.walk(root):
        for name in names + files:
            path = Path(directory, name)
            info = path.lstat()
            found[os.path.relpath(path, root)] = (
                info.st_mode,
                None if stat.S_ISDIR(info.st_mode) else info.st_size,
            )
    return found


def unpack(data, dest, want=True, **more):
    return archive.unpack(
        data if isinstance(data, Stream) else Stream(data),
        dest,
        **{"limits": LIMITS, "name_if_file": "file", "want": want, **more},
    )


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_is_left(case, world):
    data, text = REFUSED[case]
    with pytest.raises(errors.ArchiveRefused, match=r"(?i)archive") as caught:
        unpack(data, world)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()
    assert list(world.iterdir()) == []


@pytest.mark.parametrize("case", [case for case in REFUSED if "zip" not in case and "xz" not in case])
@pytest.mark.parametrize(
    "compress", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"]
)
def test_refused_also_when_compressed(case, compress, world):
    with pytest.raises(errors.ArchiveRefused):
        unpack(compress(REFUSED[case][0]), world)
    assert list(world.iterdir()) == []


def test_a_link_of_the_filesystem_is_not_followed(world, tmp_path):
    """CVE-2025-4517: a real path longer than PATH_MAX is not resolved; the walk does not resolve at all."""
    name, steps = "d" * 247, "abcdefghijklmnop"
    entries, path = [], ""
    for step in steps:
        entries += [
            long_name(f"{path}{name}"),
            header("x", b"5"),
            long_name(f"{path}{step}"),
            long_name(name, b"K"),
            symlink("x", "y"),
        ]
        path += name + "/"
    up = "/".join(steps) + "/" + "l" * 254
    entries += [long_name(up), long_name("../" * len(steps), b"K"), symlink("x", "y")]
    entries += [
        long_name(up, b"K"),
        symlink("escape", "y"),
        pax({"linkpath": up + "/../../victim"}),
        symlink("flag", "y"),
    ]
    with pytest.raises(errors.ArchiveRefused):
        unpack(
            tar(*entries),
            world,
            limits=archive.UnpackLimits(total_bytes=1 << 20, name_bytes=1 << 16, depth=1000),
        )
    assert list(world.iterdir()) == []


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_bomb_is_refused_before_it_is_written(compress, world):
    limits = archive.UnpackLimits(total_bytes=1 << 40, ratio_floor_bytes=4 << 20)
    stream = Stream(compress(header("f", size=64 << 20) + bytes(64 << 20) + END))
    with pytest.raises(errors.ArchiveRefused, match="bomb"):
        unpack(stream, world, limits=limits)


def test_a_zip_bomb_is_refused(world):
    limits = archive.UnpackLimits(total_bytes=1 << 40, ratio_floor_bytes=4 << 20)
    with pytest.raises(errors.ArchiveRefused, match="bomb"):
        unpack(zipped(("f", bytes(64 << 20))), world, limits=limits)


def test_a_zip_directory_of_any_size_is_not_taken_into_memory(world):
    limits = archive.UnpackLimits(total_bytes=1 << 30, directory_bytes=2000)
    with pytest.raises(errors.ArchiveRefused, match="directory is larger"):
        unpack(zipped(*[(f"file-{n}", b"") for n in range(100)]), world, limits=limits)


def test_a_zip_that_says_less_than_it_holds(world):
    data = bytearray(zipped(("f", b"x" * 5000)))
    at = data.index(b"PK\1\2") + 24
    data[at : at + 4] = struct.pack("<L", 10)
    with pytest.raises(errors.ArchiveRefused):
        unpack(bytes(data), world)


def test_what_is_wrong_with_a_zip_is_said_shortly(world):
    data = bytearray(zipped(("name", os.urandom(3000))))
    data[26:28] = struct.pack("<H", 2900)  # the local header's name goes on through the content
    with pytest.raises(errors.ArchiveRefused) as caught:
        unpack(bytes(data), world)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("flag", [0x1, 0x41])
def test_an_encrypted_zip_is_refused(flag, world):
    data = bytearray(zipped(("f", b"x" * 50)))
    for magic, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(magic) + offset] |= flag
    with pytest.raises(errors.ArchiveRefused, match="encrypted"):
        unpack(bytes(data), world)


def test_zip_methods_without_a_memory_limit_are_refused(world):
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as made:
        made.writestr("f", b"x" * 500)
    with pytest.raises(errors.ArchiveRefused, match="method 14"):
        unpack(out.getvalue(), world)


def test_an_xz_that_wants_much_memory_is_refused(world):
    greedy = lzma.compress(
        hostile.ordinary(), filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 256 << 20}]
    )
    with pytest.raises(errors.ArchiveRefused, match=r"(?i)memory"):
        unpack(greedy, world)


def test_names_in_texts_are_escaped_and_short(world):
    with pytest.raises(errors.ArchiveRefused) as caught:
        unpack(tar(long_name("/\x1b[31m\n" + "é" * 3000), entry("x")), world)
    assert str(caught.value).isprintable()
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/x", "a\0b", "n" * 300])
@pytest.mark.parametrize("want", [True, False, None])
def test_the_name_of_a_single_file_comes_from_the_message_and_is_judged_too(name, want, world):
    with pytest.raises(errors.ArchiveRefused):
        unpack(b"data", world, want=want, name_if_file=name)
    assert list(world.iterdir()) == []


def test_a_single_file_too_large_is_refused(world):
    with pytest.raises(errors.ArchiveRefused, match="larger"):
        unpack(bytes(11 << 20), world, want=False)
    assert list(world.iterdir()) == []
