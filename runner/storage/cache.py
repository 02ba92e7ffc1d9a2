"""The cache of immutable artifacts: files named by what they are, in a directory that several daemons may share.

Nothing but the file system keeps its state. An entry appears by an atomic rename, so two daemons that fetch the same object
at once both end with the same file; in one daemon it is fetched once. Readers hold a shared flock on their entry, downloads an
exclusive one on theirs: a lock that can be had exclusively is nobody's, and what a dead daemon left behind is told by that.

Nothing is flushed to the disk before the rename: a cache may be lost. A file system writes a file's size after its data, so an
entry that a power failure cut has the wrong size, and is dropped when it is asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
from typing import TYPE_CHECKING, Literal

import structlog

from runner.storage.archive import Stopped
from runner.storage.base import Location, ObjectInfo, ObjectStore, ObjectStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

log = structlog.get_logger(__name__)

_ENTRY = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(
    r"[0-9a-f]{64}-(\d+)\..*\.part"
)  # a download; how large it will be counts, not how large it is
_WAIT_SECS = 0.2  # between two looks at `cancelled` while another thread downloads


def identity(location: Location, info: ObjectInfo) -> str | None:
    """The name of an object's bytes (DESIGN.md 5.5); None without an etag, as nothing then tells two versions apart."""
    if not info.etag:
        return None
    parts = (location.endpoint, location.bucket, location.key, info.etag, str(info.size))
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


class ArtifactCache:
    """Immutable objects on disk, at most `quota_bytes` of them, the least recently used evicted first.

    Blocks; safe to use from several threads. No failure of the cache is ever a failure of the read: without a directory that
    can be written the objects come from their store, and the log says so once. `observed` is told of each lookup.
    """

    def __init__(
        self,
        directory: Path,
        quota_bytes: int,
        *,
        observed: Callable[[Literal["hit", "miss"]], None] = lambda _: None,
    ) -> None:
        self._directory = directory
        self._quota = quota_bytes
        self._observed = observed
        self._lock = threading.Condition()
        self._fetching: set[str] = set()  # identities that a thread of ours downloads
        self._complained = False
        with self._tolerant():
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._sweep()

    @contextlib.contextmanager
    def open(
        self,
        store: ObjectStore,
        location: Location,
        info: ObjectInfo,
        *,
        cancelled: threading.Event | None = None,
    ) -> Iterator[ObjectStream]:
        """The object's bytes: from the disk, or else from `store`, kept on their way through once they are read to the end.

        `info` is fresh (`store.stat`). While one thread downloads an object others wait for it; when it fails or stops
        early, the next one tries. A thread must not ask again for an object that it is reading. Raises as `store.open`, and
        `archive.Stopped` when `cancelled` is set while waiting.
        """
        name = identity(location, info)
        if name is None or info.size > self._quota:
            self._observed("miss")
            with store.open(location.key) as stream:
                yield stream
            return
        with self._turn(name, info, cancelled) as entry:
            self._observed("miss" if entry is None else "hit")
            if entry is not None:
                with contextlib.closing(entry):
                    yield entry
                return
            with store.open(location.key) as stream, self._download(name, info, stream) as tee:
                yield tee

    def evict(self, bytes_needed: int) -> int:
        """Remove entries that nobody reads, oldest use first, until `bytes_needed` are freed; how many were."""
        freed = 0
        with self._tolerant():
            for used_ns, path, _ in sorted(self._files(_ENTRY)):
                if freed >= bytes_needed:
                    break
                freed += _remove(path, used_ns)
        return freed

    @contextlib.contextmanager
    def _turn(
        self, name: str, info: ObjectInfo, cancelled: threading.Event | None
    ) -> Iterator[_Entry | None]:
        """Either the entry, or (None) the right to be the only thread that makes it."""
        with self._lock:
            while (entry := self._find(name, info)) is None and name in self._fetching:
                if cancelled is not None and cancelled.is_set():
                    raise Stopped("the artifact was not wanted any more")
                self._lock.wait(_WAIT_SECS)
            if entry is None:
                self._fetching.add(name)
        try:
            yield entry
        finally:
            if entry is None:
                self._give_up(name)

    def _give_up(self, name: str) -> None:
        """Let the next one try. Once too often is no harm: the object is fetched by two threads at once."""
        with self._lock:
            self._fetching.discard(name)
            self._lock.notify_all()

    def _find(self, name: str, info: ObjectInfo) -> _Entry | None:
        path = self._directory / name
        with self._tolerant():
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                size = os.fstat(descriptor).st_size
                if size == info.size:
                    os.utime(descriptor)
                    return _Entry(descriptor, info)
                log.warning("cached artifact has the wrong size", entry=name, size=size, expected=info.size)
                path.unlink()
            except BlockingIOError:  # it is being evicted
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        return None

    @contextlib.contextmanager
    def _download(self, name: str, info: ObjectInfo, stream: ObjectStream) -> Iterator[ObjectStream]:
        part = None
        same = (stream.info.etag, stream.info.size) == (info.etag, info.size)
        if same:  # else it was replaced since `stat`
            with self._tolerant():
                part = self._reserve(name, info.size)
        if part is None:
            self._give_up(name)  # nobody need wait for what will not be kept
            yield stream
            return
        try:
            yield _Tee(stream, part, self._complain)
            if part.complete:
                with self._tolerant():
                    part.keep(self._directory / name)
                    self._complained = False
        finally:
            part.close()

    def _reserve(self, name: str, size: int) -> _Part | None:
        """A new download, when it and all others and what cannot be evicted fit into the quota."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(self._directory, fcntl.LOCK_EX):  # for the moment that looking and making the file take
            # In this order: a download that is kept meanwhile counts twice, rather than not at all.
            coming = sum(_coming_bytes(path) for _, path, _ in self._files(_PART))
            kept = sum(each for _, _, each in self._files(_ENTRY))
            excess = kept + coming + size - self._quota
            if excess > 0 and self.evict(excess) < excess:
                return None
            return _Part(self._directory, name, size)

    def _files(self, kind: re.Pattern[str]) -> list[tuple[int, Path, int]]:
        """Last use, path and size of the files with such names: what else lies in the directory is not ours."""
        found = []
        with os.scandir(self._directory) as listing:
            for entry in listing:
                if kind.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        info = entry.stat(follow_symlinks=False)
                        found.append((info.st_mtime_ns, self._directory / entry.name, info.st_size))
        return found

    def _sweep(self) -> None:
        """Remove what daemons that are gone left half done."""
        for _, path, _ in self._files(_PART):
            with contextlib.suppress(OSError), _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):  # in work
                path.unlink()

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            pass  # not cached, or removed by another daemon meanwhile
        except OSError as error:
            self._complain(error.strerror or "unknown")

    def _complain(self, why: str) -> None:
        if not self._complained:
            log.warning("artifact cache does not work", directory=str(self._directory), error=why)
        self._complained = True


class _Entry(ObjectStream):
    """A cached object being read; its lock ends when it is closed."""

    def __init__(self, descriptor: int, info: ObjectInfo) -> None:
        self.info = info
        self._file = os.fdopen(descriptor, "rb", buffering=0)

    def close(self) -> None:
        self._file.close()

    def read(self, size: int = -1, /) -> bytes:
        return self._file.read(size) or b""


class _Part:
    """A download's file: locked while it lives, removed when it is closed without having been kept."""

    def __init__(self, directory: Path, name: str, size: int) -> None:
        self._path = directory / f"{name}-{size}.{os.getpid()}-{os.urandom(6).hex()}.part"
        self._size = size
        self._written = 0
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise

    @property
    def complete(self) -> bool:
        return self.open and self._written == self._size

    @property
    def open(self) -> bool:
        return self._descriptor >= 0

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.write(self._descriptor, view)
            self._written += written
            view = view[written:]

    def keep(self, path: Path) -> None:
        self._path.rename(path)

    def close(self) -> None:
        """Idempotent."""
        if self._descriptor >= 0:
            with contextlib.suppress(FileNotFoundError):  # kept
                self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = -1


class _Tee(ObjectStream):
    """A stream whose bytes are written to a download's file as they are read, for as long as that works."""

    def __init__(self, stream: ObjectStream, part: _Part, complain: Callable[[str], None]) -> None:
        self.info = stream.info
        self._stream = stream
        self._part = part
        self._complain = complain

    def read(self, size: int = -1, /) -> bytes:
        piece = self._stream.read(size)
        if piece and self._part.open:
            try:
                self._part.write(piece)
            except OSError as error:
                self._complain(error.strerror or "unknown")
                self._part.close()
        return piece


def _coming_bytes(part: Path) -> int:
    match = _PART.fullmatch(part.name)
    return int(match[1]) if match else 0


def _remove(path: Path, used_ns: int) -> int:
    """Remove one entry, unless it is in use or was used since; the bytes that this freed."""
    with contextlib.suppress(OSError), _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as descriptor:
        info = os.fstat(descriptor)
        if info.st_mtime_ns == used_ns:
            path.unlink()
            return info.st_size
    return 0


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[int]:
    """A file or directory opened and locked."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        os.close(descriptor)
