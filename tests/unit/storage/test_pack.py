from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import tarfile
import threading
import tracemalloc
from pathlib import Path

import pytest

from runner.storage import archive
from runner.storage.archive import Compression, PackStyle, fingerprint, pack, style_for

STYLES = list(PackStyle)


@pytest.fixture
def full(tmp_path):
    """A directory with one of each kind."""
    root = tmp_path / "model"
    (root / "sub" / "deeper").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "b.bin").write_bytes(os.urandom(100_001))
    (root / "a.txt").write_text("a")
    (root / "nothing").touch()
    (root / "sub" / "deeper" / "file").write_text("deep")
    (root / ("é" * 120)).write_text("long")
    (root / "link").symlink_to("sub/deeper/file")
    (root / "sub" / "up").symlink_to("../a.txt")
    (root / "program").write_text("#!")
    (root / "program").chmod(0o755)
    os.utime(root / "a.txt", ns=(0, 1_600_000_000_250_000_000))
    return root


def packed(directory, style=PackStyle.TREE, compression=Compression.NONE):
    out = io.BytesIO()
    result = pack(directory, out, style=style, compression=compression)
    return out.getvalue(), result


def names(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as made:
        return [member.name + "/" * member.isdir() for member in made]


def raw_names(data):
    """With their leading `./`, which `tarfile` leaves alone but for the root."""
    listed = subprocess.run(["tar", "t"], input=data, stdout=subprocess.PIPE, check=True)
    return listed.stdout.decode().splitlines()


def tree(root):
    return {
        str(path.relative_to(root)): (
            stat.S_IFMT(path.lstat().st_mode),
            str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None,
            None
            if path.is_symlink()
            else (stat.S_IMODE(path.stat().st_mode), round(path.stat().st_mtime, 3)),
        )
        for path in Path(root).rglob("*")
    }


def old_client(data, target):
    """INTEROP.md 4.2: `./` first means into the target, else into its parent; a single entry is renamed to the target."""
    listed = raw_names(data)
    into = target if listed[0].startswith("./") else target.parent
    into.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-x", "-C", into, "--keep-newer-files"], input=data, check=True)
    if len(listed) == 1 and listed[0].rstrip("/") != target.name:
        (into / listed[0]).rename(target)


def new_client(data, target):
    """INTEROP.md 4.2: exactly one entry that begins with `./` becomes the target; else the target is a directory of them."""
    with tarfile.open(fileobj=io.BytesIO(data)) as made:
        members = made.getmembers()
        if len(members) == 1 and members[0].name.startswith("./"):
            made.extract(members[0], target.parent / "tmp", filter="data")
            (target.parent / "tmp" / members[0].name).rename(target)
        else:
            made.extractall(target, filter="data")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("compression", list(Compression))
def test_what_is_packed_comes_out_again_with_our_reader(style, compression, full, tmp_path):
    data, result = packed(full, style, compression)
    unpacked = archive.unpack(
        io.BytesIO(data),
        tmp_path / "x",
        limits=archive.UnpackLimits(total_bytes=1 << 20),
        name_if_file="f",
        want=True,
    )
    assert tree(tmp_path / "x") == tree(full)
    assert unpacked.kind.compression is compression
    assert (unpacked.bytes, result.warnings) == (result.bytes, ())


@pytest.mark.parametrize("option", [[], ["-z"], ["-j"], ["-J"]])
def test_gnu_tar_reads_it(option, full, tmp_path):
    compression = {
        (): Compression.NONE,
        ("-z",): Compression.GZIP,
        ("-j",): Compression.BZIP2,
        ("-J",): Compression.XZ,
    }[tuple(option)]
    (tmp_path / "x").mkdir()
    subprocess.run(
        ["tar", "x", *option, "-C", tmp_path / "x"],
        input=packed(full, compression=compression)[0],
        check=True,
    )
    assert tree(tmp_path / "x").keys() == tree(full).keys()


@pytest.mark.parametrize("client", [old_client, new_client])
def test_other_artifacts_are_the_same_tree_for_both_clients(client, full, tmp_path):
    client(
        packed(full, style_for("modeldir", from_completion_service=False))[0], tmp_path / "home" / "modeldir"
    )
    assert tree(tmp_path / "home" / "modeldir").keys() == tree(full).keys()


@pytest.mark.parametrize("client", [old_client, new_client])
def test_a_single_file_of_another_artifact_stays_in_its_directory(client, tmp_path):
    (tmp_path / "tb").mkdir()
    (tmp_path / "tb" / "events").write_text("e")
    client(
        packed(tmp_path / "tb", style_for("tb", from_completion_service=True))[0], tmp_path / "home" / "tb"
    )
    assert (tmp_path / "home" / "tb" / "events").read_text() == "e"


@pytest.mark.parametrize(("client", "service"), [(old_client, False), (new_client, True)])
def test_a_return_value_is_a_file_for_the_client_that_waits_for_it(client, service, tmp_path):
    (tmp_path / "retval").mkdir()
    (tmp_path / "retval" / "retval").write_bytes(b"pickle")
    (tmp_path / "home").mkdir()
    client(
        packed(tmp_path / "retval", style_for("retval", from_completion_service=service))[0],
        tmp_path / "home" / "retval",
    )
    assert (tmp_path / "home" / "retval").read_bytes() == b"pickle"


@pytest.mark.parametrize(("service", "name"), [(False, "retval"), (True, "./retval")])
def test_the_single_entry_is_named_as_its_reader_wants(service, name, tmp_path):
    (tmp_path / "retval").mkdir()
    (tmp_path / "retval" / "retval").write_bytes(b"pickle")
    data, result = packed(tmp_path / "retval", style_for("retval", from_completion_service=service))
    assert raw_names(data) == [name]
    assert (result.entries, result.bytes) == (1, 6)
    (tmp_path / "retval" / "second").touch()
    assert raw_names(
        packed(tmp_path / "retval", style_for("retval", from_completion_service=service))[0]
    ) == ["retval", "second"]


def test_a_single_directory_is_no_single_file(tmp_path):
    (tmp_path / "retval" / "d").mkdir(parents=True)
    assert raw_names(packed(tmp_path / "retval", PackStyle.SINGLE_DOT)[0]) == ["d/"]


def test_the_log_is_the_first_entry_and_files_come_before_directories(tmp_path):
    root = tmp_path / "output"
    (root / "a-directory").mkdir(parents=True)
    for name in ("output", "a", "z", "a-directory/x"):
        (root / name).touch()
    assert raw_names(packed(root, PackStyle.BARE)[0]) == ["output", "a", "z", "a-directory/", "a-directory/x"]
    assert raw_names(packed(root)[0]) == ["./", "./output", "./a", "./z", "./a-directory/", "./a-directory/x"]


def test_the_same_directory_gives_the_same_bytes(full):
    for compression in Compression:
        assert packed(full, compression=compression)[0] == packed(full, compression=compression)[0]


def test_times_keep_their_fractions(full):
    with tarfile.open(fileobj=io.BytesIO(packed(full)[0])) as made:
        assert made.getmember("./a.txt").mtime == 1_600_000_000.25
        assert {(member.uid, member.gid, member.uname) for member in made} == {(0, 0, "")}


def test_times_can_have_a_lower_limit(full):
    target = io.BytesIO()
    pack(full, target, style=PackStyle.TREE, not_before=1_600_000_001.5)
    with tarfile.open(fileobj=io.BytesIO(target.getvalue())) as made:
        assert made.getmember("./a.txt").mtime == 1_600_000_001.5
        later = {member.name: member.mtime for member in made if member.mtime != 1_600_000_001.5}
    assert later == {name: (full / name).lstat().st_mtime for name in later}
    assert later


@pytest.mark.parametrize("style", STYLES)
def test_an_empty_directory_is_an_archive_without_entries(style, tmp_path):
    data, result = packed(tmp_path, style)
    assert (data, result.entries) == (bytes(10240), 0)


def test_the_size_is_a_multiple_of_what_tar_writes(full):
    assert len(packed(full)[0]) % 10240 == 0


def test_what_is_no_file_is_left_out_with_a_warning(tmp_path):
    root = tmp_path / "output"
    root.mkdir()
    (root / "output").write_text("log")
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
        data, result = packed(root, PackStyle.SINGLE_DOT)
    assert raw_names(data) == ["./output"]
    assert len(result.warnings) == 2


@pytest.mark.parametrize("target", ["/etc/passwd", "../../secret", "sub/../../x"])
def test_links_out_are_left_out_and_never_followed(target, full):
    (full / "sub" / "out").symlink_to(target)
    data, result = packed(full)
    assert "./sub/out" not in names(data)
    assert "leads out" in result.warnings[0]


class Meddling(io.BytesIO):
    """Where an archive goes; at the first byte the workload does something."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def write(self, data):
        act, self.act = self.act, None
        if act:
            act()
        return super().write(data)


@pytest.mark.parametrize(
    ("change", "content"), [(5, b"x" * 5), (2_000_000, b"x" * 1_500_000), (None, b"x" * 1_500_000)]
)
def test_a_file_that_changes_is_as_long_as_its_header_says(change, content, tmp_path):
    root = tmp_path / "d"
    root.mkdir()
    (root / "a").write_bytes(b"x" * 1_500_000)
    (root / "b").write_text("after")

    def act():
        if change is None:
            (root / "a").unlink()
        else:
            with (root / "a").open("r+b") as file:
                file.truncate(change)

    out = Meddling(act)
    pack(root, out, style=PackStyle.BARE)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as made:
        first, second = made.extractfile("a"), made.extractfile("b")
        assert first is not None
        assert second is not None
        assert first.read() == content.ljust(1_500_000, b"\0")
        assert second.read() == b"after"


def test_what_vanishes_or_becomes_a_trap_is_skipped(tmp_path):
    root = tmp_path / "d"
    (root / "gone").mkdir(parents=True)
    (root / "swapped").mkdir()
    for name in ("a", "b", "c", "z"):
        (root / name).write_text(name)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("secret")

    def act():
        (root / "b").unlink()
        (root / "c").unlink()
        (root / "c").symlink_to(tmp_path / "secret")
        (root / "z").unlink()
        os.mkfifo(root / "z")
        (root / "gone").rmdir()
        (root / "swapped").rmdir()
        (root / "swapped").symlink_to(tmp_path / "secrets")

    out = Meddling(act)
    result = pack(root, out, style=PackStyle.BARE)
    assert names(out.getvalue()) == ["a"]
    assert len(result.warnings) == 3
    assert b"secret" not in out.getvalue()


def test_names_of_any_bytes(tmp_path):
    root = tmp_path / "d"
    root.mkdir()
    odd = [b"\xff\xfe", "é".encode(), b"new\nline", b"-rf", b" "]
    for name in odd:
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_text("x")
    archive.unpack(
        io.BytesIO(packed(root)[0]),
        tmp_path / "x",
        limits=archive.UnpackLimits(total_bytes=1 << 20),
        name_if_file="f",
        want=True,
    )
    assert sorted(os.fsencode(path.name) for path in (tmp_path / "x").iterdir()) == sorted(odd)


def test_a_tree_deeper_than_can_be_unpacked_is_left_out(tmp_path):
    directory = os.open(tmp_path, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=directory)
        below = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)
    assert "deeper" in packed(tmp_path)[1].warnings[0]
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_it_stops_when_told(full):
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(archive.Stopped):
        pack(full, io.BytesIO(), style=PackStyle.TREE, cancelled=cancelled)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        pack(tmp_path / "none", io.BytesIO(), style=PackStyle.TREE)


def test_memory_does_not_grow_with_the_content(tmp_path):
    root = tmp_path / "d"
    root.mkdir()
    with (root / "large").open("wb") as file:
        file.truncate(200 << 20)
    tracemalloc.start()
    try:
        with Path(os.devnull).open("wb") as out:
            pack(root, out, style=PackStyle.TREE)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("key", "compression"),
    [
        ("experiments/1/output.tar", "none"),
        ("a.tar.bz2", "bzip2"),
        ("a.tbz2", "bzip2"),
        ("a.tbz", "bzip2"),
        ("a.tar.gz", "gzip"),
        ("a.TGZ", "gzip"),
        ("a.tar.xz", "xz"),
        ("a.tar.lzma", "lzma"),
        ("a.tar.lzop", "none"),
        ("a", "none"),
        ("a.bz2/b", "none"),
    ],
)
def test_the_suffix_names_the_compression(key, compression):
    assert archive.compression_for(key) == compression


class TestFingerprint:
    def test_nothing_has_none(self, tmp_path):
        assert fingerprint(tmp_path) is None
        assert fingerprint(tmp_path / "missing") is None

    def test_it_stays_while_nothing_changes(self, full):
        assert fingerprint(full) == fingerprint(full)

    @pytest.mark.parametrize(
        "change", ["grow", "touch", "add", "remove", "replace", "rename", "chmod", "directory", "relink"]
    )
    def test_it_changes(self, change, full):
        before = fingerprint(full)
        file = full / "sub" / "deeper" / "file"
        match change:
            case "grow":
                file.write_text("longer")
            case "touch":
                os.utime(file, ns=(1, 1))
            case "add":
                (full / "sub" / "new").touch()
            case "remove":
                file.unlink()
            case "replace":
                other = full.parent / "other"
                other.write_text("peed")
                os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
                other.rename(file)
            case "rename":
                file.rename(file.with_name("elif"))
            case "chmod":
                file.chmod(0o700)
            case "directory":
                (full / "empty" / "more").mkdir()
            case "relink":
                (full / "link").unlink()
                (full / "link").symlink_to("a.txt")
            case _:
                pytest.fail(change)
        assert fingerprint(full) != before

    def test_links_are_not_followed(self, full, tmp_path):
        (full / "loop").symlink_to(".")
        (full / "dangling").symlink_to("nowhere")
        before = fingerprint(full)
        (tmp_path / "elsewhere").touch()
        assert fingerprint(full) == before
