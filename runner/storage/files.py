"""A directory as an object store: `file:` addresses, and the `local` storage of the client."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING, BinaryIO

from runner import errors
from runner.storage.base import Forbidden, NotFound, ObjectInfo, ObjectStore, ObjectStream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_COPY_BYTES = 1 << 20
_PART_PREFIX, _PART_SUFFIX = ".studio-runner-", ".part"  # of objects half written; never listed
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENXIO})
_IN_THE_WAY = (_ABSENT - {errno.ENOENT}) | {
    errno.EEXIST,
    errno.ENOTEMPTY,
}  # a file where a directory is wanted, ...
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class FileStore(ObjectStore):
    """The regular files below `root`, which need not exist before the first `put`.

    A key is a path below `root`; one that leads out of it, also by a link, is `Forbidden`. The etag is made of the time
    of change, size and inode: an object replaced by `put`, or written to, has another one.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def stat(self, key: str) -> ObjectInfo:
        """As `ObjectStore.stat`."""
        with self.open(key) as stream:
            return stream.info

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[ObjectStream]:
        """As `ObjectStore.open`. The bytes are those of the moment it was opened, whatever `put` does meanwhile."""
        with self._translated(key):
            file = open(self._path(key), "rb", opener=_opener)  # noqa: SIM115 - entered below, outside the translation
        with file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise NotFound(f"{self._root / key} is no regular file")
            yield _FileStream(file, _info(key, found), str(self._root))

    def put(self, key: str, source: BinaryIO, size: int) -> None:
        """As `ObjectStore.put`: written beside its place, flushed to the disk, then moved there."""
        with self._translated(key, writing=True):
            path = self._path(key, follow=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{_PART_PREFIX}{secrets.token_hex(8)}{_PART_SUFFIX}")
            try:
                with part.open("xb") as file:
                    if _copy(source, file, size) < size:
                        raise errors.ArtifactFailed(f"what was to be stored at {path} has shrunk")
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            _flush_directory(path.parent)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As `ObjectStore.list`. Links are left out: they may lead anywhere, also in circles."""
        with self._translated(""):
            if not self._root.is_dir():
                raise NotFound(f"there is no directory {self._root}", bucket_missing=True)
        yield from self._below("", prefix)

    def reachable(self) -> bool:
        """As `ObjectStore.reachable`; a root that does not exist yet is."""
        try:
            self._root.stat()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _below(self, directory: str, prefix: str) -> Iterator[ObjectInfo]:
        with self._translated(directory), os.scandir(self._root / directory) as entries:
            # a directory sorts as if its name ended with the slash that its keys have: keys come in byte order
            named = sorted((os.fsencode(e.name + "/" * e.is_dir(follow_symlinks=False)), e) for e in entries)
        for _, entry in named:
            key = directory + entry.name
            if entry.is_dir(follow_symlinks=False):
                if (key + "/").startswith(prefix) or prefix.startswith(key + "/"):
                    yield from self._below(key + "/", prefix)
            elif key.startswith(prefix) and entry.is_file(follow_symlinks=False) and not _is_part(entry.name):
                with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                    yield _info(key, entry.stat(follow_symlinks=False))

    def _path(self, key: str, *, follow: bool = True) -> Path:
        """Where `key` is. `follow`: its last name may be a link, which a write would replace."""
        if not key or "\0" in key or key.startswith("/") or {"", ".", ".."} & set(key.split("/")):
            raise Forbidden(f"{key!r} is no key below {self._root}")
        root, path = self._root.resolve(), self._root / key
        real = path.resolve() if follow else path.parent.resolve() / path.name
        if not real.is_relative_to(root):
            raise Forbidden(f"{path} leads out of {self._root}")
        return real

    @contextlib.contextmanager
    def _translated(self, key: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as exc:  # RuntimeError: pathlib's word for links in a circle
            path, code = self._root / key, getattr(exc, "errno", None) or errno.ELOOP
            if writing and code in _IN_THE_WAY:
                raise errors.ArtifactFailed(f"{path} cannot be written: {os.strerror(code)}") from exc
            if code in _ABSENT:
                raise NotFound(f"there is no file {path}", bucket_missing=not self._root.exists()) from exc
            if code in _REFUSED:
                raise Forbidden(f"{path}: {os.strerror(code)}") from exc
            raise errors.StorageUnavailable(f"{path}: {os.strerror(code)}", endpoint=str(self._root)) from exc


class _FileStream(ObjectStream):
    """An open file, up to the size that it had when it was opened."""

    def __init__(self, file: BinaryIO, info: ObjectInfo, root: str) -> None:
        self.info = info
        self._file = file
        self._root = root
        self._left = info.size

    def read(self, size: int = -1, /) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        try:
            data = self._file.read(wanted)
        except OSError as exc:
            raise errors.StorageUnavailable(f"{self._root}: {exc.strerror}", endpoint=self._root) from exc
        if wanted and not data:
            raise errors.StorageUnavailable(
                f"{self._root}: a file shrank while it was read", endpoint=self._root
            )
        self._left -= len(data)
        return data


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe would wait for its writer


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    etag = f"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"
    return ObjectInfo(
        key=key, size=found.st_size, etag=etag, modified=datetime.fromtimestamp(found.st_mtime, UTC)
    )


def _is_part(name: str) -> bool:
    return name.startswith(_PART_PREFIX) and name.endswith(_PART_SUFFIX)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> int:
    left = size
    while left and (data := source.read(min(left, _COPY_BYTES))):
        target.write(data)
        left -= len(data)
    return size - left


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
