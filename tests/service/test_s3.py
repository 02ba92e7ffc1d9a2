"""The S3 store against a real server: rights, outages, what it costs in requests."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runner import config, errors
from runner.storage.base import Credentials, Forbidden, NotFound, ObjectStore
from runner.storage.registry import Stores
from runner.storage.s3 import S3Store
from runner.storage.transport import Patience, Transport
from tests.servers.seaweedfs import ADMIN, PUBLIC, READER, SeaweedFs

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.service
MIB = 1 << 20
WRONG_SECRET = Credentials(access_key=ADMIN.access_key, secret_key="wrong-secret-0001")
UNKNOWN = Credentials(access_key="NOBODY", secret_key="nobody-secret-0001")


@pytest.fixture
def transport() -> Iterator[Transport]:
    made = Transport(patience=Patience(attempts=3))
    yield made
    made.close()


@pytest.fixture
def bucket(seaweedfs: SeaweedFs) -> str:
    return seaweedfs.make_bucket(f"service-{random.randrange(1 << 40):x}")


@pytest.fixture
def store(seaweedfs: SeaweedFs, bucket: str, transport: Transport) -> S3Store:
    return S3Store(seaweedfs.location(bucket), transport)


def put(store: ObjectStore, key: str, content: bytes) -> None:
    store.put(key, io.BytesIO(content), len(content))


def get(store: ObjectStore, key: str) -> bytes:
    with store.open(key) as stream:
        return stream.read()


@pytest.mark.parametrize(
    ("credentials", "code"),
    [(WRONG_SECRET, "SignatureDoesNotMatch"), (UNKNOWN, "InvalidAccessKeyId"), (None, "AccessDenied")],
)
@pytest.mark.parametrize("size", [3, 10 * MIB, 20 * MIB])
def test_wrong_credentials_are_forbidden_with_the_servers_word_for_it(  # noqa: PLR0917 - a table
    seaweedfs, bucket, transport, store, credentials, code, size
):
    put(store, "k", b"old")
    refused = S3Store(seaweedfs.location(bucket, credentials=credentials), transport)
    content = bytes(size)
    for act in (lambda: refused.stat("k"), lambda: get(refused, "k"), lambda: put(refused, "k", content)):
        with pytest.raises(Forbidden, match=code) as caught:
            act()
        assert "secret-0001" not in str(caught.value)
    with pytest.raises(Forbidden):
        list(refused.list(""))
    assert get(store, "k") == b"old"


def test_who_may_read_may_not_write(seaweedfs, bucket, transport, store):
    put(store, "k", b"old")
    reader = S3Store(seaweedfs.location(bucket, credentials=READER), transport)
    assert get(reader, "k") == b"old"
    assert [found.key for found in reader.list("")] == ["k"]
    for size in (3, 20 * MIB):
        with pytest.raises(Forbidden, match="AccessDenied"):
            put(reader, "k", bytes(size))
    assert get(store, "k") == b"old"


@pytest.mark.parametrize("credentials", [WRONG_SECRET, UNKNOWN, None])
def test_what_everybody_may_read_is_read_whatever_the_credentials(seaweedfs, transport, credentials):
    put(S3Store(seaweedfs.location(PUBLIC), transport), "free/k", b"content")
    store = S3Store(seaweedfs.location(PUBLIC, credentials=credentials), transport)
    assert store.stat("free/k").size == 7
    assert get(store, "free/k") == b"content"
    assert [found.key for found in store.list("free/")] == ["free/k"]
    with pytest.raises(Forbidden):
        put(store, "free/k", b"x")


def test_an_object_is_atomic_also_in_parts(store, seaweedfs, bucket):
    """Until the last part is in, the old object is what everybody sees."""
    put(store, "k", b"old")
    seen = set()

    class Looking(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            seen.add(seaweedfs.client().stat_object(bucket, "k").size)
            return super().read(size)

    store.put("k", Looking(bytes(40 * MIB)), 40 * MIB)
    assert seen == {3}
    assert store.stat("k").size == 40 * MIB


def test_connections_are_kept_and_nothing_is_asked_twice(store, transport):
    put(store, "k", b"content")
    (key,) = transport.pools.keys()
    pool = transport.pools.get(key)
    assert pool is not None
    connections, requests = pool.num_connections, pool.num_requests
    for _ in range(10):
        put(store, "k", b"content")
        store.stat("k")
        get(store, "k")
        with pytest.raises(NotFound):
            store.stat("absent")
        with pytest.raises(NotFound):
            get(store, "absent")
    assert pool.num_requests - requests == 50
    assert pool.num_connections == connections


def test_memory_does_not_grow_with_the_object(store):
    """256 MiB go up and down while this much more memory is not to be had."""
    put(store, "warm", bytes(20 * MIB))

    class Zeros(io.RawIOBase):
        size, at, most = 256 * MIB, 0, 0

        def seek(self, offset: int, whence: int = 0, /) -> int:
            self.at = offset + (self.size if whence == 2 else 0)
            return self.at

        def tell(self) -> int:
            return self.at

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            size = min(size, self.size - self.at)
            self.at += size
            self.most = max(self.most, resident())
            return bytes(size)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    source = Zeros()
    store.put("large", source, source.size)
    assert source.most - before < 120 * MIB
    most = 0
    with store.open("large") as stream:
        while stream.read(MIB):
            most = max(most, resident())
    assert most - before < 120 * MIB


def test_a_server_that_is_away_is_unavailable_soon_and_used_again_when_it_is_back(seaweedfs, store):
    put(store, "k", b"content")
    seaweedfs.stop()
    try:
        began = time.monotonic()
        for act in (
            lambda: store.stat("k"),
            lambda: get(store, "k"),
            lambda: put(store, "k", b"new"),
            lambda: put(store, "k", bytes(20 * MIB)),
            lambda: list(store.list("")),
        ):
            with pytest.raises(errors.StorageUnavailable) as caught:
                act()
            assert caught.value.endpoint == seaweedfs.endpoint
        assert not store.reachable()
        assert time.monotonic() - began < 60
    finally:
        seaweedfs.start()
    assert store.reachable()
    assert get(store, "k") == b"content"
    put(store, "k", b"new")
    assert get(store, "k") == b"new"


def test_a_server_that_comes_back_in_time_is_not_even_missed(seaweedfs, bucket):
    patient = S3Store(seaweedfs.location(bucket), Transport(patience=Patience(attempts=1000, retry_secs=100)))
    put(patient, "k", b"content")
    seaweedfs.stop()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(get, patient, "k")
        seaweedfs.start()
        assert reading.result() == b"content"


def test_stores_are_shared_by_place_and_credentials(seaweedfs):
    stores = Stores(config.S3())
    first = stores.store(seaweedfs.location("one", "a"))
    assert stores.store(seaweedfs.location("one", "b")) is first
    assert stores.store(seaweedfs.location("two", "a")) is not first
    assert stores.store(seaweedfs.location("one", "a", READER)) is not first
    stores.close()


def test_the_client_is_only_imported_for_an_s3_location():
    program = (
        "import sys; from runner import config; from runner.storage.base import Location\n"
        "from runner.storage.registry import Stores; stores = Stores(config.S3())\n"
        "stores.store(Location(scheme='file', bucket='/tmp')); assert 'minio' not in sys.modules\n"
        "stores.store(Location(scheme='s3', endpoint='h:9', bucket='bkt')); assert 'minio' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
