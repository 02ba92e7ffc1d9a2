"""From a directory to an archive that every client can read, while a workload may still be writing (INTEROP.md 4.2)."""

from __future__ import annotations

import bz2
import dataclasses
import enum
import gzip
import hashlib
import lzma
import os
import stat
import tarfile
from typing import TYPE_CHECKING, BinaryIO, cast

from runner.storage.archive.decode import Compression
from runner.storage.archive.limits import Stopped, shown
from runner.storage.archive.names import leaves

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from pathlib import Path

_READ_BYTES = 1 << 20
_DEPTH = 128  # the deepest that `unpack` takes; each level holds a descriptor
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = (
    os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
)  # what was a file may be a FIFO by now
_PACKED = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}
_SUFFIXES = {
    (".bz2", ".bzip2", ".tb2", ".tbz", ".tbz2"): Compression.BZIP2,
    (".gz", ".gzip", ".tgz"): Compression.GZIP,
    (".xz", ".txz"): Compression.XZ,
    (".lzma",): Compression.LZMA,
}


class PackStyle(enum.Enum):
    """How entries are named; each suits certain readers (INTEROP.md 4.2)."""

    BARE = "bare"  #: `name`, no entry for the directory itself: `output` and `retval`
    SINGLE_DOT = "single-dot"  #: the same, but `./name` when a file is all that there is: what a completion service reads
    TREE = "tree"  #: `./`, then `./name`: both generations of the client make the same tree of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """What went into an archive."""

    entries: int
    bytes: int  #: of content, before compression
    warnings: tuple[str, ...] = ()  #: what was left out, one sentence each


def style_for(tag: str, *, from_completion_service: bool) -> PackStyle:
    """How the artifact of that label is packed (DESIGN.md 5.5)."""
    if tag not in {"output", "retval"}:
        return PackStyle.TREE
    return PackStyle.SINGLE_DOT if from_completion_service else PackStyle.BARE


def compression_for(key: str) -> Compression:
    """The compression that a key's suffix names; none when it names none, or one that nobody here can write."""
    lower = key.lower()
    return next((each for suffixes, each in _SUFFIXES.items() if lower.endswith(suffixes)), Compression.NONE)


def pack(
    directory: Path,
    out: BinaryIO,
    *,
    style: PackStyle,
    compression: Compression = Compression.NONE,
    not_before: float = 0.0,
    cancelled: threading.Event | None = None,
) -> Packed:
    """Write what `directory` holds to `out` as a tar with PAX headers, in a stable order; blocks, memory is bounded.

    In each directory files come first, and the one named like the directory (`output/output`) before all others: log readers
    take the first entry. No link is followed. What changes meanwhile is packed as long as its header says: cut, or padded with
    zeros. What vanishes, cannot be read, leads out of the directory or is no file, directory or link is left out with a
    warning. Times of modification before `not_before` (unix seconds) are written as that.

    Raises OSError when `directory` or `out` fails, `Stopped` once `cancelled` is set.
    """
    sink = _compressed(out, compression)
    packer = _Packer(sink, not_before, cancelled)
    top = os.open(directory, _OPEN_DIRECTORY)
    try:
        packer.run(top, directory.name, style)
        sink.write(bytes(2 * tarfile.BLOCKSIZE))
        sink.write(bytes(-packer.offset % tarfile.RECORDSIZE))
    finally:
        os.close(top)
        if sink is not out:
            sink.close()
    return Packed(entries=packer.entries, bytes=packer.bytes, warnings=tuple(packer.warnings))


def fingerprint(directory: Path) -> str | None:
    """What a cheap look tells of a directory: names, sizes, times and inodes. None when it is missing or empty.

    Equal fingerprints: nothing changed since (as far as sizes and times tell), so a checkpoint has nothing to upload.
    """
    digest = hashlib.blake2b(digest_size=16)
    found = False
    try:
        for path, info in _everything(os.fsencode(directory)):
            found = True
            size = 0 if stat.S_ISDIR(info.st_mode) else info.st_size
            digest.update(b"%b\0%d %d %d %d\n" % (path, info.st_mode, size, info.st_mtime_ns, info.st_ino))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return digest.hexdigest() if found else None


def _everything(top: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """All below a directory, in a stable order. Raises FileNotFoundError for `top` only."""
    waiting = [top]
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            if directory == top:
                raise
            continue  # gone or closed to us: `pack` says so
        for entry in entries:
            try:
                info = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield entry.path, info
            if stat.S_ISDIR(info.st_mode):
                waiting.append(entry.path)


def _compressed(out: BinaryIO, compression: Compression) -> BinaryIO:
    match compression:
        case Compression.NONE:
            return out
        case Compression.GZIP:
            return cast("BinaryIO", gzip.GzipFile("", "wb", 6, out, mtime=0))
        case Compression.BZIP2:
            return cast("BinaryIO", bz2.BZ2File(out, "wb"))
        case Compression.XZ:
            return cast("BinaryIO", lzma.LZMAFile(out, "wb", preset=3))
        case Compression.LZMA:
            return cast("BinaryIO", lzma.LZMAFile(out, "wb", format=lzma.FORMAT_ALONE, preset=3))


class _Packer:
    """One archive on its way out."""

    def __init__(self, sink: BinaryIO, not_before: float, cancelled: threading.Event | None) -> None:
        self.entries = 0
        self.bytes = 0
        self.offset = 2 * tarfile.BLOCKSIZE  #: of the archive's end, its marker included
        self.warnings: list[str] = []
        self._sink = sink
        self._not_before = not_before
        self._cancelled = cancelled

    def run(self, top: int, name: str, style: PackStyle) -> None:
        listing = self._listing(top, name)
        prefix = "./" if style is PackStyle.TREE else ""
        if style is PackStyle.TREE and listing:
            self._header("./", os.fstat(top), tarfile.DIRTYPE)
        if style is PackStyle.SINGLE_DOT:
            kinds = [stat.S_IFMT(info.st_mode) for _, info in listing]
            prefix = "./" if [kind for kind in kinds if kind in _PACKED] == [stat.S_IFREG] else ""
        self._directory(top, listing, prefix, ())

    def _directory(
        self, at: int, listing: list[tuple[str, os.stat_result]], prefix: str, parents: tuple[str, ...]
    ) -> None:
        for name, info in listing:
            path = "/".join((*parents, name))
            try:
                if stat.S_ISREG(info.st_mode):
                    self._file(at, name, prefix + path)
                elif stat.S_ISLNK(info.st_mode):
                    self._link(at, name, prefix + path, info, parents)
                elif stat.S_ISDIR(info.st_mode):
                    self._subdirectory(at, name, prefix, (*parents, name))
                else:
                    self._leave_out(path, "is no file, directory or link")
            except FileNotFoundError:
                continue  # a workload removes its own files as it likes
            except _LeftOutError as error:
                self._leave_out(path, str(error))

    def _subdirectory(self, at: int, name: str, prefix: str, parts: tuple[str, ...]) -> None:
        if len(parts) >= _DEPTH:
            raise _LeftOutError(f"lies deeper than {_DEPTH} directories")
        descriptor = _open(name, _OPEN_DIRECTORY, at)
        try:
            listing = self._listing(descriptor, name)
            self._header(f"{prefix}{'/'.join(parts)}/", os.fstat(descriptor), tarfile.DIRTYPE)
            self._directory(descriptor, listing, prefix, parts)
        finally:
            os.close(descriptor)

    def _file(self, at: int, name: str, path: str) -> None:
        descriptor = _open(name, _OPEN_FILE, at)
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise _LeftOutError("is not a file any more")
            self._header(path, info, tarfile.REGTYPE)
            self._content(descriptor, info.st_size, path)
        finally:
            os.close(descriptor)

    def _content(self, descriptor: int, size: int, path: str) -> None:
        """Exactly as much as the header says, whatever happens to the file meanwhile."""
        left = size
        while left > 0:
            if self._cancelled is not None and self._cancelled.is_set():
                raise Stopped("the archive was not wanted any more")
            try:
                piece = os.read(descriptor, min(left, _READ_BYTES))
            except OSError as error:
                self._leave_out(path, f"could not be read to its end ({error.strerror})")
                piece = b""
            if not piece:
                break
            self._sink.write(piece)
            left -= len(piece)
        left += -size % tarfile.BLOCKSIZE
        while left > 0:
            self._sink.write(bytes(min(left, _READ_BYTES)))
            left -= min(left, _READ_BYTES)
        self.bytes += size
        self.offset += size + -size % tarfile.BLOCKSIZE

    def _link(self, at: int, name: str, path: str, info: os.stat_result, parents: tuple[str, ...]) -> None:
        try:
            target = os.readlink(name, dir_fd=at)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise _LeftOutError("is not a link any more") from error
        if leaves(parents, target):
            raise _LeftOutError("is a link that leads out of the directory")
        self._header(path, info, tarfile.SYMTYPE, target)

    def _header(self, path: str, info: os.stat_result, kind: bytes, target: str = "") -> None:
        header = tarfile.TarInfo(path)  # no owner: what runs here means nothing elsewhere
        header.type = kind
        header.mode = stat.S_IMODE(info.st_mode) & 0o777
        # With its fraction: clients compare it with the time of submission.
        header.mtime = cast("int", max(info.st_mtime, self._not_before))
        header.linkname = target
        if kind == tarfile.REGTYPE:
            header.size = info.st_size
        encoded = header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        self._sink.write(encoded)
        self.offset += len(encoded)
        self.entries += 1

    def _listing(self, descriptor: int, own_name: str) -> list[tuple[str, os.stat_result]]:
        """What is in an open directory: first the file of its own name, then files, links, directories; each by name."""
        found: list[tuple[str, os.stat_result]] = []
        with os.scandir(descriptor) as listing:
            names = [entry.name for entry in listing]
        for name in names:
            try:
                found.append((name, os.stat(name, dir_fd=descriptor, follow_symlinks=False)))
            except FileNotFoundError:
                continue
        found.sort(key=lambda one: (stat.S_ISDIR(one[1].st_mode), one[0] != own_name, os.fsencode(one[0])))
        return found

    def _leave_out(self, path: str, why: str) -> None:
        if len(self.warnings) < 100:  # noqa: PLR2004 - enough to see what is going on
            self.warnings.append(f"{shown(path)} {why}")


class _LeftOutError(Exception):
    """Something is left out; the text says why."""


def _open(name: str, flags: int, at: int) -> int:
    try:
        return os.open(name, flags, dir_fd=at)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _LeftOutError(f"cannot be read ({error.strerror})") from error
