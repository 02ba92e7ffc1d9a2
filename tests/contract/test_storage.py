"""What every object store does (`runner.storage.base`), over real ones: an S3 server and a directory; reads by http too."""

from __future__ import annotations

import hashlib
import io
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from runner import config, errors
from runner.storage.base import Location, NotFound, ObjectStore
from runner.storage.files import FileStore
from runner.storage.registry import Stores
from runner.storage.transport import Patience
from tests.servers import seaweedfs as weed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

#: A thousand objects are written, each flushed to a disk that other tests use as well.
pytestmark = [pytest.mark.service, pytest.mark.timeout(300)]
MIB = 1 << 20


class Place:
    """A store with nothing in it, and another of the same kind whose bucket or directory is missing."""

    def __init__(self, stores: Stores, location: Location, missing: Location) -> None:
        self.store = stores.store(location)
        self.missing = stores.store(missing)


@pytest.fixture
def stores() -> Iterator[Stores]:
    made = Stores(config.S3(), patience=Patience(attempts=3))
    yield made
    made.close()


@pytest.fixture
def s3_place(seaweedfs: weed.SeaweedFs, stores: Stores) -> Place:
    bucket = seaweedfs.make_bucket(f"contract-{random.randrange(1 << 40):x}")
    return Place(stores, seaweedfs.location(bucket), seaweedfs.location("no-such-bucket"))


@pytest.fixture
def file_place(tmp_path: Path, stores: Stores) -> Place:
    return Place(
        stores,
        Location(scheme="file", bucket=str(tmp_path / "root")),
        Location(scheme="file", bucket=str(tmp_path / "missing")),
    )


@pytest.fixture(params=["s3", "file"])
def place(request: pytest.FixtureRequest) -> Place:
    made: Place = request.getfixturevalue(f"{request.param}_place")
    return made


def put(store: ObjectStore, key: str, content: bytes) -> None:
    store.put(key, io.BytesIO(content), len(content))


def get(store: ObjectStore, key: str) -> bytes:
    with store.open(key) as stream:
        return stream.read()


@pytest.mark.parametrize("size", [0, 1, 4096, 16 * MIB, 16 * MIB + 1, 50 * MIB])
def test_what_was_put_is_got(place, size):
    content = random.Random(size).randbytes(size)
    put(place.store, "deep/er/key.tar", content)
    found = place.store.stat("deep/er/key.tar")
    assert (found.key, found.size) == ("deep/er/key.tar", size)
    assert found.etag
    assert '"' not in found.etag
    assert found.modified is not None
    with place.store.open("deep/er/key.tar") as stream:
        assert (stream.info.size, stream.info.etag) == (size, found.etag)
        assert stream.read() == content
        assert stream.read(10) == b""


def test_only_size_bytes_are_put_from_where_the_source_stands(place):
    source = io.BytesIO(b"before|content|after")
    source.seek(7)
    place.store.put("k", source, 7)
    assert get(place.store, "k") == b"content"


@pytest.mark.parametrize("size", [100, 20 * MIB])
def test_a_source_with_less_than_it_should_have_stores_nothing(place, size):
    before = threading.active_count()
    with pytest.raises(errors.ArtifactFailed, match="has shrunk"):
        place.store.put("k", io.BytesIO(bytes(size - 1)), size)
    with pytest.raises(NotFound):
        place.store.stat("k")
    assert threading.active_count() <= before


@pytest.mark.parametrize("step", [1000, 10_240, 262_144, 3 * MIB])
def test_a_stream_is_read_in_any_steps(place, step):
    content = os.urandom(2 * MIB + 17)
    put(place.store, "k", content)
    with place.store.open("k") as stream:
        pieces = list(iter(lambda: stream.read(step), b""))
    assert b"".join(pieces) == content
    assert all(0 < len(piece) <= step for piece in pieces)


def test_a_stream_left_before_its_end_harms_nothing(place):
    put(place.store, "k", bytes(8 * MIB))
    for _ in range(5):
        with place.store.open("k") as stream:
            assert stream.read(3) == bytes(3)
    assert get(place.store, "k") == bytes(8 * MIB)


@pytest.mark.parametrize(
    "key",
    [
        "a b",
        "a+b",
        "a%20b",
        "100%",
        "ünïcode/日本",
        "a&b=c?d#e",
        "q'uo\"te",
        "semi;colon,comma",
        "tilde~",
        "a:b@c",
        "(x)*!",
    ],
)
def test_a_key_may_be_anything(place, key):
    put(place.store, key, key.encode())
    put(place.store, key + ".other", b"other")
    assert get(place.store, key) == key.encode()
    assert place.store.stat(key).size == len(key.encode())
    assert [found.key for found in place.store.list(key)] == [key, key + ".other"]


@pytest.mark.parametrize("key", ["../out", "a/../../out", "a/./b", "", ".."])
def test_a_key_that_leads_elsewhere_is_refused(place, key):
    for act in (place.store.stat, lambda key: put(place.store, key, b"x"), lambda key: get(place.store, key)):
        with pytest.raises((errors.ArtifactFailed, errors.UnsupportedRequest)):
            act(key)


def test_an_object_that_is_not_there_is_not_found(place):
    put(place.store, "other", b"x")
    for act in (place.store.stat, lambda key: get(place.store, key)):
        for key in ("absent", "other/below", "deep/absent"):
            with pytest.raises(NotFound) as caught:
                act(key)
            assert not caught.value.bucket_missing


def test_a_missing_bucket_is_told_from_a_missing_object(place):
    with pytest.raises(NotFound) as caught:
        get(place.missing, "k")
    assert caught.value.bucket_missing
    with pytest.raises(NotFound):
        place.missing.stat("k")
    with pytest.raises(NotFound) as caught:
        list(place.missing.list(""))
    assert caught.value.bucket_missing


def test_a_directory_is_no_object(place):
    put(place.store, "directory/key", b"x")
    with pytest.raises(NotFound):
        get(place.store, "directory")


def test_a_listing_is_by_prefix_and_in_the_stores_order(place):
    keys = ["a-b", "a/b", "a/c/d", "a/c.d", "a.b", "ab", "b/x", "é", "Z"]
    for key in keys:
        put(place.store, key, key.encode())
    found = list(place.store.list(""))
    assert {info.key: info.size for info in found} == {key: len(key.encode()) for key in keys}
    assert len(found) == len(keys)
    if isinstance(place.store, FileStore):  # SeaweedFS sorts each directory by itself
        assert [info.key for info in found] == sorted(keys, key=str.encode)
    assert sorted(info.key for info in place.store.list("a/")) == ["a/b", "a/c.d", "a/c/d"]
    assert [info.key for info in place.store.list("a/b")] == ["a/b"]
    assert list(place.store.list("nothing")) == []
    exact = place.store.stat(found[0].key)
    assert (found[0].key, found[0].size, found[0].etag) == (exact.key, exact.size, exact.etag)


def test_a_listing_goes_over_many_pages(place):
    keys = [f"p/{number:04}" for number in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: put(place.store, key, b""), keys))
    assert [info.key for info in place.store.list("p/")] == keys


def test_an_overwrite_is_seen_whole_or_not_at_all(place):
    contents = [bytes([number]) * MIB for number in range(4)]
    put(place.store, "k", contents[0])
    etags = {place.store.stat("k").etag}
    done = threading.Event()

    def write() -> None:
        for _ in range(5):
            for content in contents:
                put(place.store, "k", content)
                etags.add(place.store.stat("k").etag)
        done.set()

    seen = set()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while True:
            written = done.is_set() or writing.done()
            with place.store.open("k") as stream:
                content = stream.read()
            assert content in contents
            seen.add(content[0])
            if written:
                break
        writing.result()
    assert len(etags) >= 4
    assert seen


def test_eight_threads_at_once(place):
    def work(number: int) -> None:
        for turn in range(10):
            key, content = f"t{number}/{turn}", f"{number}-{turn}".encode() * 1000
            put(place.store, key, content)
            assert place.store.stat(key).size == len(content)
            assert get(place.store, key) == content

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(list(place.store.list(""))) == 80


def test_what_answers_is_reachable(place):
    assert place.store.reachable()
    assert place.missing.reachable()


@pytest.fixture
def web(
    s3_place: Place, seaweedfs: weed.SeaweedFs, stores: Stores
) -> Callable[[str, bytes], tuple[ObjectStore, str]]:
    """Puts an object where anybody can read it by http; gives the web store and the key there."""
    del s3_place

    def publish(key: str, content: bytes) -> tuple[ObjectStore, str]:
        put(stores.store(seaweedfs.location(weed.PUBLIC)), key, content)
        store = stores.store(Location(scheme="http", endpoint=seaweedfs.endpoint))
        return store, f"{weed.PUBLIC}/{quote(key)}"

    return publish


@pytest.mark.parametrize("size", [0, 5, 20 * MIB])
def test_an_object_is_read_by_http(web, size):
    content = os.urandom(size)
    store, key = web("web/a b+c.tar", content)
    assert store.stat(key).size == size
    assert hashlib.sha256(get(store, key)).digest() == hashlib.sha256(content).digest()
    assert store.reachable()


def test_http_reads_only(web):
    store, key = web("k", b"x")
    with pytest.raises(NotFound):
        store.stat(key + ".absent")
    with pytest.raises(errors.UnsupportedRequest):
        put(store, key, b"y")
    with pytest.raises(errors.UnsupportedRequest):
        store.list("")
