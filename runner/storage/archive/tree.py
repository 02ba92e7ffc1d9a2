"""The only place that writes what an archive brings: below one directory, and through nothing that is a link.

Every path is walked from the root's descriptor, a component at a time, with O_NOFOLLOW: neither a link that the archive
planted nor one that appears meanwhile can lead a write elsewhere. Nothing is opened for writing but what is made by it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from typing import TYPE_CHECKING, Self

from runner import errors
from runner.storage.archive.limits import refuse
from runner.storage.archive.names import leaves

if TYPE_CHECKING:
    from pathlib import Path

    from runner.storage.archive.limits import Budget

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LATEST_NS = 2**34 * 10**9  # what ext4 can keep: the year 2446


class Tree:
    """A directory being filled, which is empty when it begins. A context manager.

    Names come as components that `names.components` has passed. Raises `errors.ArchiveRefused` for what must not be made,
    and OSError (a full disk) as it comes. Modes keep their permission bits less the umask; the owner may always read, write
    and enter. Owners are ignored.
    """

    def __init__(self, root: Path, budget: Budget) -> None:
        self._budget = budget
        self._chain: list[
            tuple[str, int]
        ] = []  # the directories last walked: archives come in order, so it is at hand
        self._directories: dict[tuple[str, ...], tuple[int, int]] = {}
        self._root = os.open(root, _DIRECTORY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._shorten(0)
        os.close(self._root)

    def directory(self, parts: tuple[str, ...], *, mode: int, mtime_ns: int) -> None:
        """Make the directory, or find it there. Its mode and time are set by `finish`; the root keeps its own."""
        self._walk(parts, "/".join(parts))
        if parts:
            self._directories[parts] = (mode & 0o777, mtime_ns)

    def file(self, parts: tuple[str, ...], *, mode: int) -> int:
        """A new file, open for writing; the caller closes it. It replaces an earlier file of that name, never what is in it."""
        name = self._name(parts)
        parent = self._walk(parts[:-1], name)
        self._budget.enter(name)
        flags = mode & 0o777 | 0o600
        try:
            return os.open(parts[-1], _NEW_FILE, flags, dir_fd=parent)
        except FileExistsError:
            self._replace(parts[-1], parent, name)
            return os.open(parts[-1], _NEW_FILE, flags, dir_fd=parent)

    def symlink(self, parts: tuple[str, ...], target: str, *, mtime_ns: int) -> None:
        """A symbolic link that stays within the root. The same link once more is no harm; nothing else replaces a link."""
        name = self._name(parts)
        if leaves(parts[:-1], target):
            refuse(name, "is a link that leads out of the directory")
        if len(os.fsencode(target)) > self._budget.limits.name_bytes:
            refuse(name, "is a link with a target that is too long")
        parent = self._walk(parts[:-1], name)
        self._budget.enter(name)
        try:
            os.symlink(target, parts[-1], dir_fd=parent)
        except FileExistsError:
            with contextlib.suppress(OSError):  # not a link
                if os.readlink(parts[-1], dir_fd=parent) == target:
                    return
            self._replace(parts[-1], parent, name)
            os.symlink(target, parts[-1], dir_fd=parent)
        os.utime(parts[-1], ns=_times(mtime_ns), dir_fd=parent, follow_symlinks=False)

    def hardlink(self, parts: tuple[str, ...], target: tuple[str, ...]) -> None:
        """Another name for a file that the archive brought earlier: all that the root holds was brought by it."""
        name = self._name(parts)
        self._budget.enter(name)
        if not target:
            refuse(name, "is a link to the directory itself")
        with contextlib.ExitStack() as stack:
            source = self._find(target[:-1], stack)
            kind = 0 if source is None else _kind(target[-1], source)
            if source is None or kind == 0:
                refuse(name, "is a link to a file that did not come before it")
            if kind != stat.S_IFREG:
                refuse(name, "is a hard link to what is not a file")
            if parts == target:
                return
            parent = self._walk(parts[:-1], name)
            try:
                os.link(target[-1], parts[-1], src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
            except FileExistsError:
                self._replace(parts[-1], parent, name)
                os.link(target[-1], parts[-1], src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)

    def finish(self) -> None:
        """Give the directories the modes and times that the archive said: last, as each new entry changes its directory."""
        for parts in sorted(self._directories):
            mode, mtime_ns = self._directories[parts]
            descriptor = self._walk(parts, "/".join(parts))
            os.fchmod(
                descriptor, os.fstat(descriptor).st_mode & mode | 0o700
            )  # it was made with 0o777 less the umask
            set_time(descriptor, mtime_ns)

    @staticmethod
    def _name(parts: tuple[str, ...]) -> str:
        if not parts:
            raise errors.ArchiveRefused("the archive's entry for the directory itself is not a directory")
        return "/".join(parts)

    def _walk(self, parts: tuple[str, ...], name: str) -> int:
        """The descriptor of a directory, made where it is missing; it is `_chain`'s, and good until the next walk."""
        same = 0
        for (walked, _), part in zip(self._chain, parts, strict=False):
            if walked != part:
                break
            same += 1
        self._shorten(same)
        for part in parts[same:]:
            at = self._chain[-1][1] if self._chain else self._root
            try:
                descriptor = os.open(part, _DIRECTORY, dir_fd=at)
            except FileNotFoundError:
                self._budget.enter(name)
                os.mkdir(part, dir_fd=at)
                descriptor = os.open(part, _DIRECTORY, dir_fd=at)
            except OSError:
                kind = _kind(part, at)
                if kind == stat.S_IFDIR:
                    raise
                refuse(
                    name,
                    "goes through a link" if kind == stat.S_IFLNK else "needs a directory where a file is",
                )
            self._chain.append((part, descriptor))
        return self._chain[-1][1] if self._chain else self._root

    def _find(self, parts: tuple[str, ...], stack: contextlib.ExitStack) -> int | None:
        """The descriptor of a directory, None when there is no such directory; `stack` closes it."""
        at = self._root
        for part in parts:
            try:
                at = os.open(part, _DIRECTORY, dir_fd=at)
            except OSError:
                return None
            stack.callback(os.close, at)
        return at

    def _shorten(self, length: int) -> None:
        while len(self._chain) > length:
            os.close(self._chain.pop()[1])

    @staticmethod
    def _replace(last: str, parent: int, name: str) -> None:
        """Take an earlier file out of the way; its other names keep what is in it."""
        kind = _kind(last, parent)
        if kind != stat.S_IFREG:
            refuse(
                name,
                "would replace a directory"
                if kind == stat.S_IFDIR
                else "would replace, or be written through, a link",
            )
        os.unlink(last, dir_fd=parent)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of it."""
    written = os.write(descriptor, data)
    if written < len(data):
        rest = memoryview(data)
        while written < len(rest):
            written += os.write(descriptor, rest[written:])


def set_time(descriptor: int, mtime_ns: int) -> None:
    """Set the modification time, into the range that file systems have."""
    os.utime(descriptor, ns=_times(mtime_ns))


def empty(root: Path) -> None:
    """Remove all that is in a directory, following no link."""
    for child in root.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _times(mtime_ns: int) -> tuple[int, int]:
    clamped = min(max(mtime_ns, 0), _LATEST_NS)
    return clamped, clamped


def _kind(last: str, parent: int) -> int:
    """The S_IF... of a name in an open directory, 0 when there is none."""
    try:
        return stat.S_IFMT(os.stat(last, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return 0
