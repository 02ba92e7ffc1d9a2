from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import structlog

from runner import errors
from runner.storage import archive
from runner.storage.base import Location, ObjectInfo, ObjectStore, ObjectStream
from runner.storage.cache import ArtifactCache, _remove, identity
from tests.unit.storage import hostile

LIMIT_SECS = 30


class Bytes(ObjectStream):
    def __init__(self, store, data, info):
        self.store, self.data, self.info = store, data, info
        self.at = 0

    def read(self, size=-1, /):
        if self.store.fail_at is not None and self.at >= self.store.fail_at:
            raise errors.StorageUnavailable("reset")
        if self.at > 0:
            self.store.gate.wait(LIMIT_SECS)
        end = len(self.data) if size < 0 else self.at + min(size, self.store.most)
        piece = self.data[self.at : end]
        self.at += len(piece)
        return piece


class Store(ObjectStore):
    """Objects in memory; counts the downloads, holds them at a gate after their first piece, and breaks them."""

    def __init__(self, **objects):
        self.objects = objects
        self.opened = []
        self.gate = threading.Event()
        self.gate.set()
        self.most = 100
        self.fail_at = None
        self.etag = None

    def stat(self, key):
        data = self.objects[key]
        return ObjectInfo(key=key, size=len(data), etag=hashlib.md5(data).hexdigest())

    @contextlib.contextmanager
    def open(self, key):
        self.opened.append(key)
        info = self.stat(key)
        yield Bytes(
            self,
            self.objects[key],
            info if self.etag is None else ObjectInfo(key=key, size=info.size, etag=self.etag),
        )

    def put(self, key, source, size):
        raise NotImplementedError

    def list(self, prefix):
        raise NotImplementedError

    def reachable(self):
        return True


def location(key):
    return Location(scheme="s3", endpoint="s3:9000", bucket="b", key=key)


def read(cache, store, key, **more):
    with cache.open(store, location(key), store.stat(key), **more) as stream:
        return read_all(stream)


def read_all(stream):
    data = b""
    while piece := stream.read(1000):
        data += piece
    return data


def files(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def seen():
    return []


@pytest.fixture
def cache(tmp_path, seen):
    return ArtifactCache(tmp_path / "cache", 10_000, observed=seen.append)


def test_the_second_read_comes_from_the_disk(cache, seen, tmp_path):
    store = Store(a=b"content" * 100)
    assert read(cache, store, "a") == read(cache, store, "a") == b"content" * 100
    assert (store.opened, seen) == (["a"], ["miss", "hit"])
    assert files(tmp_path / "cache") == [identity(location("a"), store.stat("a"))]


def test_another_cache_finds_it(cache, tmp_path):
    store = Store(a=b"x")
    read(cache, store, "a")
    read(ArtifactCache(tmp_path / "cache", 10_000), store, "a")
    assert store.opened == ["a"]


@pytest.mark.parametrize("data", [b"", b"x"])
def test_the_smallest_objects(data, cache):
    store = Store(a=data)
    assert [read(cache, store, "a") for _ in range(3)] == [data] * 3
    assert store.opened == ["a"]


def test_what_an_identity_is_made_of():
    info = ObjectInfo(key="k", size=1, etag="e")
    base = location("k")
    others = [
        identity(location("other"), info),
        identity(Location(scheme="s3", endpoint="other", bucket="b", key="k"), info),
        identity(Location(scheme="s3", endpoint="s3:9000", bucket="other", key="k"), info),
        identity(base, ObjectInfo(key="k", size=2, etag="e")),
        identity(base, ObjectInfo(key="k", size=1, etag="f")),
    ]
    assert len({identity(base, info), *others}) == 6
    assert identity(base, ObjectInfo(key="k", size=1, etag="")) is None


def test_a_changed_object_is_another(cache):
    store = Store(a=b"old")
    read(cache, store, "a")
    store.objects["a"] = b"new"
    assert read(cache, store, "a") == b"new"


@pytest.mark.parametrize(("data", "etag"), [(b"x" * 10_001, None), (b"x", "replaced since"), (b"x", "")])
def test_what_cannot_be_kept_passes_through(data, etag, cache, tmp_path):
    store = Store(a=data)
    store.etag = etag
    assert [read(cache, store, "a"), read(cache, store, "a")] == [data, data]
    assert (store.opened, files(tmp_path / "cache")) == (["a", "a"], [])


def test_an_object_without_an_etag_is_never_kept(cache, tmp_path):
    store = Store(a=b"x")
    for _ in range(2):
        with cache.open(store, location("a"), ObjectInfo(key="a", size=1, etag="")) as stream:
            assert read_all(stream) == b"x"
    assert (store.opened, files(tmp_path / "cache")) == (["a", "a"], [])


def test_the_first_reader_does_not_wait_for_the_whole(cache, tmp_path):
    store = Store(a=b"x" * 1000)
    store.gate.clear()
    with cache.open(store, location("a"), store.stat("a")) as stream:
        assert stream.read(1000) == b"x" * 100
        assert files(tmp_path / "cache")[0].endswith(".part")
        store.gate.set()
        read_all(stream)
    assert len(files(tmp_path / "cache")[0]) == 64


def test_others_wait_for_the_download_in_progress(cache, seen):
    store = Store(a=os.urandom(5000))
    store.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(read, cache, store, "a") for _ in range(8)]
        store.gate.set()
        assert {one.result(LIMIT_SECS) for one in reads} == {store.objects["a"]}
    assert store.opened == ["a"]
    assert sorted(seen) == ["hit"] * 7 + ["miss"]


def test_different_objects_do_not_wait_for_each_other(cache):
    slow, fast = Store(a=b"a" * 500), Store(b=b"b")
    slow.gate.clear()
    with ThreadPoolExecutor(1) as pool, cache.open(slow, location("a"), slow.stat("a")):
        assert pool.submit(read, cache, fast, "b").result(LIMIT_SECS) == b"b"


@pytest.mark.parametrize("failure", ["store", "reader", "early"])
def test_when_the_download_fails_the_next_one_tries(failure, cache, tmp_path):
    store = Store(a=os.urandom(5000))
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        with (
            contextlib.suppress(errors.StorageUnavailable, errors.ArchiveRefused),
            cache.open(store, location("a"), store.stat("a")) as first,
        ):
            first.read(100)
            waiting = pool.submit(read, cache, store, "a")
            if failure == "store":
                store.fail_at = 100
                try:
                    first.read(100)
                finally:
                    store.fail_at = None
            elif failure == "reader":
                raise errors.ArchiveRefused("no")
        assert waiting is not None
        assert waiting.result(LIMIT_SECS) == store.objects["a"]
    assert store.opened == ["a", "a"]
    assert [len(name) for name in files(tmp_path / "cache")] == [64]


def test_who_waits_can_be_called_off(cache):
    store = Store(a=b"x" * 500)
    cancelled = threading.Event()
    with ThreadPoolExecutor(1) as pool, cache.open(store, location("a"), store.stat("a")):
        waiting = pool.submit(read, cache, store, "a", cancelled=cancelled)
        cancelled.set()
        with pytest.raises(archive.Stopped):
            waiting.result(LIMIT_SECS)


def test_the_least_recently_used_goes_first(cache, tmp_path):
    store = Store(**{name: name.encode() * 3000 for name in "abcd"})
    directory = tmp_path / "cache"
    for at, key in enumerate("abc"):
        read(cache, store, key)
        os.utime(directory / identity(location(key), store.stat(key)), (at, at))
    read(cache, store, "a")
    read(cache, store, "d")
    kept = {identity(location(key), store.stat(key)) for key in "acd"}
    assert set(files(directory)) == kept


def test_what_is_being_read_is_not_evicted(cache, tmp_path):
    store = Store(a=b"a" * 6000, b=b"b" * 6000)
    read(cache, store, "a")
    with cache.open(store, location("a"), store.stat("a")) as stream:
        assert cache.evict(1) == 0
        assert read(cache, store, "b") == b"b" * 6000
        assert files(tmp_path / "cache") == [identity(location("a"), store.stat("a"))]
        assert read_all(stream) == b"a" * 6000
    read(cache, store, "b")
    assert files(tmp_path / "cache") == [identity(location("b"), store.stat("b"))]


def test_downloads_in_progress_count_with_what_they_will_be(cache, tmp_path):
    store = Store(a=b"a" * 6000, b=b"b" * 6000)
    with cache.open(store, location("a"), store.stat("a")) as stream:
        stream.read(1)
        assert read(cache, store, "b") == b"b" * 6000
        read_all(stream)
    assert files(tmp_path / "cache") == [identity(location("a"), store.stat("a"))]


def test_the_quota_holds_with_many_threads(cache, tmp_path):
    store = Store(**{f"k{n}": bytes([n]) * 2500 for n in range(20)})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: read(cache, store, f"k{n % 20}"), range(200)))
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 10_000
    assert all(len(name) == 64 for name in files(tmp_path / "cache"))


def test_eviction_on_demand(cache, tmp_path):
    store = Store(**{name: name.encode() * 1000 for name in "abc"})
    for key in "abc":
        read(cache, store, key)
    assert cache.evict(1500) == 2000
    assert len(files(tmp_path / "cache")) == 1
    assert cache.evict(10**12) == 1000
    assert cache.evict(1) == 0


def test_an_entry_used_since_eviction_looked_is_kept(cache, tmp_path):
    store = Store(a=b"a" * 100)
    read(cache, store, "a")
    entry = next((tmp_path / "cache").iterdir())
    used_ns = entry.stat().st_mtime_ns
    assert _remove(entry, used_ns - 1) == 0
    assert _remove(entry, used_ns) == 100


def test_files_of_others_in_the_directory_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"x" * 50_000)
    (tmp_path / ".partial").mkdir()
    store = Store(a=b"a")
    cache = ArtifactCache(tmp_path, 10)
    read(cache, store, "a")
    cache.evict(10**9)
    assert files(tmp_path) == [".partial", "mine.txt"]


@pytest.mark.parametrize("damaged", [b"", b"short", b"x" * 701])
def test_an_entry_of_the_wrong_size_is_dropped_and_fetched_again(damaged, cache, seen, tmp_path):
    store = Store(a=b"content" * 100)
    read(cache, store, "a")
    entry = tmp_path / "cache" / identity(location("a"), store.stat("a"))
    entry.write_bytes(damaged)
    assert read(cache, store, "a") == b"content" * 100
    assert (entry.stat().st_size, seen) == (700, ["miss", "miss"])


def test_leftovers_of_dead_daemons_are_removed_and_those_of_the_living_kept(tmp_path):
    name = "0" * 64
    dead, alive = tmp_path / f"{name}-5.1-aa.part", tmp_path / f"{name}-5.2-bb.part"
    dead.touch()
    program = f"import fcntl,sys; f=open({str(alive)!r},'w'); fcntl.flock(f,fcntl.LOCK_EX); print('locked',flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        ArtifactCache(tmp_path, 100)
        assert files(tmp_path) == [alive.name]
        holder.kill()
        holder.wait()
        ArtifactCache(tmp_path, 100)
        assert files(tmp_path) == []


def test_a_second_daemon_does_not_sweep_away_a_running_download(cache, tmp_path):
    store = Store(a=b"x" * 500)
    with cache.open(store, location("a"), store.stat("a")) as stream:
        stream.read(1)
        ArtifactCache(tmp_path / "cache", 10_000)
        read_all(stream)
    assert [len(name) for name in files(tmp_path / "cache")] == [64]


def test_two_daemons_that_fetch_the_same_end_with_one_file(cache, tmp_path):
    store = Store(a=b"x" * 500)
    other = ArtifactCache(tmp_path / "cache", 10_000)
    with cache.open(store, location("a"), store.stat("a")) as stream:
        stream.read(1)
        assert read(other, store, "a") == b"x" * 500
        read_all(stream)
    assert [len(name) for name in files(tmp_path / "cache")] == [64]


@pytest.fixture
def warnings():
    with structlog.testing.capture_logs() as logs:
        yield logs


def test_on_a_full_disk_objects_pass_through_and_the_log_says_so_once(cache, tmp_path, monkeypatch, warnings):
    store = Store(**{name: name.encode() * 500 for name in "abc"})
    real = os.write

    def full(descriptor, data):
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).endswith(".part"):
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for key in "abc":
            assert read(cache, store, key) == key.encode() * 500
    assert (len(warnings), files(tmp_path / "cache")) == (1, [])
    read(cache, store, "a")
    assert len(files(tmp_path / "cache")) == 1


def test_a_directory_that_cannot_be_made_is_no_reason_to_fail(tmp_path, warnings):
    (tmp_path / "file").touch()
    cache = ArtifactCache(tmp_path / "file" / "cache", 100)
    store = Store(a=b"x")
    assert [read(cache, store, "a"), read(cache, store, "a")] == [b"x", b"x"]
    assert cache.evict(1) == 0
    assert len(warnings) == 1


def test_a_directory_that_vanishes_is_made_again(cache, tmp_path):
    (tmp_path / "cache").rmdir()
    store = Store(a=b"x")
    assert [read(cache, store, "a"), read(cache, store, "a")] == [b"x", b"x"]
    assert store.opened == ["a"]


def test_nobody_waits_while_nothing_can_be_kept(tmp_path):
    cache = ArtifactCache(tmp_path, 100)
    store = Store(a=b"x" * 80, b=b"y" * 80)
    with (
        ThreadPoolExecutor(1) as pool,
        cache.open(store, location("a"), store.stat("a")),
        cache.open(store, location("b"), store.stat("b")),
    ):
        assert pool.submit(read, cache, store, "b").result(LIMIT_SECS) == b"y" * 80


def test_unpacking_through_the_cache(cache, tmp_path):
    store = Store(
        a=hostile.ordinary()[:9728]
    )  # one zero block less: the end of the archive is before the end of the object
    for name in ("first", "second"):
        with cache.open(store, location("a"), store.stat("a")) as stream:
            archive.unpack(
                stream,
                tmp_path / name,
                limits=archive.UnpackLimits(total_bytes=10_000),
                name_if_file="f",
                want=True,
            )
    assert store.opened == ["a"]
    assert (tmp_path / "second" / "train.py").exists()


def test_locks_end_with_the_reading(cache, tmp_path):
    store = Store(a=b"x")
    read(cache, store, "a")
    read(cache, store, "a")
    with (tmp_path / "cache" / files(tmp_path / "cache")[0]).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_download_that_stopped_early_leaves_nothing(cache, tmp_path):
    store = Store(a=b"x" * 500)
    with cache.open(store, location("a"), store.stat("a")) as stream:
        stream.read(100)
    assert files(tmp_path / "cache") == []
