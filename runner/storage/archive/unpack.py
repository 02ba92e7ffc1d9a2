"""From a stream to a directory in one pass: look, decompress, extract. One extractor, for every caller (DESIGN.md rule 10)."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from typing import TYPE_CHECKING

from runner import errors
from runner.storage.archive.decode import PLAIN_READ_BYTES, Feed, Readable, decoded
from runner.storage.archive.limits import Budget, UnpackLimits, refuse, shown
from runner.storage.archive.names import components
from runner.storage.archive.sniff import HEAD_BYTES, Container, Format, sniff
from runner.storage.archive.tarread import Kind, TarReader
from runner.storage.archive.tree import Tree, empty, set_time, write_all
from runner.storage.archive.zipread import ZipReader

if TYPE_CHECKING:
    import threading
    from pathlib import Path

    from runner.storage.archive.tarread import Entry

_PLAIN_FILE = Format(Container.FILE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unpacked:
    """What came of an object."""

    kind: Format
    entries: int  #: files, links and directories made
    bytes: int  #: of content written
    single: bool  #: stored as one file, under the name given
    warnings: tuple[str, ...] = ()  #: one sentence each


def unpack(
    stream: Readable,
    dest: Path,
    *,
    limits: UnpackLimits,
    name_if_file: str,
    want: bool | None = None,
    cancelled: threading.Event | None = None,
) -> Unpacked:
    """Fill `dest` with what the stream holds, in one pass with bounded memory; blocks.

    `want` is the artifact's `unpack`: False stores the bytes as they are as `dest/name_if_file`; True expands an archive, and
    stores with a warning what is none; None expands what its content says is an archive. `dest` is made if it is missing and
    must be empty (FileExistsError): all that is in it afterwards came from here. It holds everything or, after any error,
    nothing.

    Raises `errors.ArchiveRefused` (hostile, damaged, too large), `Stopped` soon after `cancelled` is set (the stream's own
    deadline bounds how soon), OSError when the disk is full, and whatever the stream raises, unchanged.
    """
    dest.mkdir(parents=True, exist_ok=True)
    if any(dest.iterdir()):
        raise FileExistsError(f"{dest} is not empty")
    budget = Budget(limits, cancelled)
    try:
        return _fill(stream, dest, budget, name_if_file, want)
    except BaseException:
        empty(dest)
        raise


def _fill(stream: Readable, dest: Path, budget: Budget, name_if_file: str, want: bool | None) -> Unpacked:
    head = b"" if want is False else _head(stream)
    kind = _PLAIN_FILE if want is False else sniff(head, complete=len(head) < HEAD_BYTES)
    feed = Feed(stream, budget, head=head)
    warnings: tuple[str, ...] = ()
    with Tree(dest, budget) as tree:
        if kind.container is Container.TAR:
            _extract(TarReader(decoded(feed, kind.compression, budget), budget.limits), tree, budget)
        elif kind.container is Container.ZIP:
            _extract_zip(feed, dest, tree, budget)
        else:
            if want is True:
                if kind.flaw:
                    raise errors.ArchiveRefused(f"the archive cannot be unpacked: {kind.flaw}")
                warnings = (f"was to be unpacked but is no archive: kept as the file {shown(name_if_file)}",)
            _store(feed, tree, budget, name_if_file)
        tree.finish()
    return Unpacked(
        kind=kind,
        entries=budget.entries,
        bytes=budget.bytes,
        single=kind.container is Container.FILE,
        warnings=warnings,
    )


def _head(stream: Readable) -> bytes:
    head = bytearray()
    while len(head) < HEAD_BYTES and (piece := stream.read(HEAD_BYTES - len(head))):
        head += piece
    return bytes(head)


def _store(feed: Feed, tree: Tree, budget: Budget, name: str) -> None:
    parts = components(name, budget.limits)
    if len(parts) != 1:
        refuse(name, "is not the name of a file")
    descriptor = tree.file(parts, mode=0o644)
    try:
        while piece := feed.read(PLAIN_READ_BYTES):
            budget.write(len(piece), name)
            write_all(descriptor, piece)
    finally:
        os.close(descriptor)


def _extract_zip(feed: Feed, dest: Path, tree: Tree, budget: Budget) -> None:
    """By way of a file without a name, beside `dest`: a zip's directory is at its end, and whatever happens it goes."""
    with tempfile.TemporaryFile(dir=dest.parent, buffering=0) as spool:
        while piece := feed.read(PLAIN_READ_BYTES):
            if budget.taken > budget.limits.total_bytes:
                raise errors.ArchiveRefused(
                    f"the archive is larger than the {budget.limits.total_bytes} bytes allowed"
                )
            write_all(spool.fileno(), piece)
        _extract(ZipReader(spool, budget), tree, budget)


def _extract(reader: TarReader | ZipReader, tree: Tree, budget: Budget) -> None:
    for entry in reader:
        parts = components(entry.name, budget.limits)
        match entry.kind:
            case Kind.FILE:
                _extract_file(reader, entry, tree, parts, budget)
            case Kind.DIRECTORY:
                tree.directory(parts, mode=entry.mode, mtime_ns=entry.mtime_ns)
            case Kind.SYMLINK:
                tree.symlink(parts, entry.target, mtime_ns=entry.mtime_ns)
            case Kind.HARDLINK:
                tree.hardlink(parts, components(entry.target, budget.limits))


def _extract_file(
    reader: TarReader | ZipReader, entry: Entry, tree: Tree, parts: tuple[str, ...], budget: Budget
) -> None:
    budget.write(entry.size, entry.name)
    left = entry.size

    def write(piece: memoryview) -> None:
        nonlocal left
        left -= len(piece)
        if left < 0:
            refuse(entry.name, "is larger than its header says")
        write_all(descriptor, piece)

    descriptor = tree.file(parts, mode=entry.mode)
    try:
        reader.pour(write)
        set_time(descriptor, entry.mtime_ns)
    finally:
        os.close(descriptor)
