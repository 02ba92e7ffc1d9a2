"""What breaks on the way: stalls, resets, early ends, busy servers, redirects; for S3 and for plain web servers."""

from __future__ import annotations

import gzip
import io
import os
import socket
import time
from typing import TYPE_CHECKING

import pytest

from runner import config, errors
from runner.storage.base import Credentials, Forbidden, Location, NotFound, ObjectStore
from runner.storage.http import HttpStore
from runner.storage.s3 import S3Store
from runner.storage.transport import Patience, Transport
from tests.servers.faulty_http import Fault, FaultyHttp

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.service
SIZE = 3_000_000
BREAKS = ["stall", "reset", "end"]
COMPLETED = b"<R><UploadId>u</UploadId><Bucket>bucket</Bucket><Key>k</Key><ETag>e</ETag></R>"


@pytest.fixture
def transport(request: pytest.FixtureRequest) -> Iterator[Transport]:
    """Impatient only where the server falls silent: elsewhere requests are counted, and a slow machine adds none."""
    silent = getattr(request.node, "callspec", None) and request.node.callspec.params.get("how") == "stall"
    patience = Patience(attempts=6, stall_secs=1) if silent else Patience(attempts=3)
    made = Transport(patience=patience)
    yield made
    made.close()


@pytest.fixture(params=["s3", "http"])
def store(request: pytest.FixtureRequest, faulty_http: FaultyHttp, transport: Transport) -> ObjectStore:
    faulty_http.content = os.urandom(SIZE)
    if request.param == "s3":
        return S3Store(Location(scheme="s3", endpoint=faulty_http.endpoint, bucket="bucket"), transport)
    return HttpStore(Location(scheme="http", endpoint=faulty_http.endpoint), transport)


@pytest.fixture
def s3(faulty_http: FaultyHttp, transport: Transport) -> S3Store:
    return S3Store(Location(scheme="s3", endpoint=faulty_http.endpoint, bucket="bucket"), transport)


@pytest.fixture
def web(faulty_http: FaultyHttp, transport: Transport) -> HttpStore:
    return HttpStore(Location(scheme="http", endpoint=faulty_http.endpoint), transport)


def get(store: ObjectStore, key: str = "deep/key") -> bytes:
    with store.open(key) as stream:
        return b"".join(iter(lambda: stream.read(100_000), b""))


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_download_goes_on_where_it_broke(store, faulty_http, how):
    faulty_http.faults.extend(Fault(after=after, how=how) for after in (1_000_000, 0, 700_001))
    assert get(store) == faulty_http.content
    ranges = [headers.get("range") for _, _, headers in faulty_http.seen]
    assert ranges[0] is None
    assert len(ranges) == 4 or (how == "stall" and len(ranges) > 4)  # it may be this machine that was silent
    starts = [int(text.removeprefix("bytes=").removesuffix("-")) for text in ranges[1:]]
    # a reset takes with it what had arrived and was not yet read
    assert starts == sorted(starts)
    assert (0 if how == "reset" else 1) <= starts[0]
    assert starts[-1] < SIZE
    assert all(headers.get("if-match") == '"etag-1"' for _, _, headers in faulty_http.seen[1:])


@pytest.mark.parametrize("how", BREAKS)
def test_a_download_that_breaks_for_good_is_unavailable(store, faulty_http, how):
    faulty_http.faults.append(Fault(after=1_000_000, how=how))
    faulty_http.always = Fault(after=0, how=how)
    with pytest.raises(errors.StorageUnavailable) as caught:
        get(store)
    assert caught.value.endpoint == faulty_http.endpoint


@pytest.mark.parametrize("conditions", [True, False])
def test_an_object_that_changes_while_it_is_read_is_never_mixed(store, faulty_http, conditions):
    faulty_http.conditions = conditions
    faulty_http.faults.append(Fault(after=1_000_000, how="end"))
    with store.open("k") as stream:
        assert stream.read(10) == faulty_http.content[:10]
        faulty_http.etag, faulty_http.content = "etag-2", os.urandom(SIZE)
        with pytest.raises(errors.StorageUnavailable, match="changed while it was read"):
            list(iter(lambda: stream.read(100_000), b""))


def test_a_server_that_cannot_resume_is_not_asked_for_the_middle(store, faulty_http):
    faulty_http.ranges = False
    faulty_http.faults.append(Fault(after=1_000_000, how="end"))
    with pytest.raises(errors.StorageUnavailable):
        get(store)


def test_without_an_etag_nothing_is_resumed(store, faulty_http):
    faulty_http.etag = ""
    faulty_http.faults.append(Fault(after=1_000_000, how="end"))
    with pytest.raises(errors.StorageUnavailable):
        get(store)
    assert len(faulty_http.seen) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(store, faulty_http, status):
    faulty_http.faults.extend([Fault(status=status, body=b"<html>busy"), Fault(status=status)])
    assert get(store) == faulty_http.content
    assert len(faulty_http.seen) == 3


def test_a_server_that_stays_busy_is_unavailable(store, faulty_http):
    faulty_http.always = Fault(status=503)
    for act in (store.stat, lambda key: get(store, key)):
        with pytest.raises(errors.StorageUnavailable, match="status 503"):
            act("k")
    assert not store.reachable()


@pytest.fixture
def deaf() -> Iterator[str]:
    """The endpoint of a server whose kernel takes connections, but which reads and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("size", [0, 10_000_000])
def test_a_server_that_says_nothing_is_unavailable_within_the_limits(deaf, size):
    transport = Transport(patience=Patience(attempts=2, connect_secs=1, stall_secs=1))
    store = S3Store(Location(scheme="s3", endpoint=deaf, bucket="bucket"), transport)
    began = time.monotonic()
    for act in (
        lambda: store.stat("k"),
        lambda: get(store),
        lambda: store.put("k", io.BytesIO(bytes(size)), size),
    ):
        with pytest.raises(errors.StorageUnavailable):
            act()
    assert not store.reachable()
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("size", [0, 5, 20_000_000])
def test_a_put_is_sent_again_whole_and_from_where_the_source_stood(s3, faulty_http, size):
    faulty_http.content = COMPLETED
    faulty_http.faults.extend([Fault(status=503), Fault(status=500)])
    source = io.BytesIO(b"before" + bytes(size))
    source.seek(6)
    s3.put("k", source, size)
    sent = [
        int(headers.get("content-length") or 0) for method, _, headers in faulty_http.seen if method == "PUT"
    ]
    assert sum(sent) == (3 * size if size < 1_000_000 else size)


@pytest.mark.parametrize(
    ("status", "code", "error", "said"),
    [
        (403, "RequestTimeTooSkewed", Forbidden, "the clock"),
        (403, "InvalidAccessKeyId", Forbidden, "does not know this access key"),
        (400, "ExpiredToken", Forbidden, "has expired"),
        (404, "NoSuchKey", NotFound, "NoSuchKey"),
        (404, "NoSuchBucket", NotFound, "NoSuchBucket"),
        (404, "NoSuchUpload", errors.StorageUnavailable, "NoSuchUpload"),
        (400, "RequestTimeout", errors.StorageUnavailable, "RequestTimeout"),
        (400, "InvalidArgument", errors.ArtifactFailed, "InvalidArgument"),
        (301, "PermanentRedirect", errors.ArtifactFailed, "PermanentRedirect"),
    ],
)
def test_what_an_s3_server_says_is_understood(s3, faulty_http, status, code, error, said):  # noqa: PLR0917 - a table
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>".encode()
    faulty_http.always = Fault(status=status, headers={"Content-Type": "application/xml"}, body=body)
    for act in (lambda: get(s3), lambda: s3.put("k", io.BytesIO(b"x"), 1), lambda: list(s3.list(""))):
        with pytest.raises(error, match=said) as caught:
            act()
        assert not isinstance(caught.value, NotFound) or caught.value.bucket_missing == (
            code == "NoSuchBucket"
        )
    assert len(faulty_http.seen) == 3  # 4xx is not asked again


@pytest.mark.parametrize(
    ("status", "error"), [(403, Forbidden), (404, NotFound), (400, errors.ArtifactFailed)]
)
@pytest.mark.parametrize("body", [b"", b"<html>a proxy's page", b"\xff\xfe", bytes(1_000_000)])
def test_an_answer_of_something_else_than_an_s3_server_is_understood_by_its_status(
    s3, faulty_http, status, error, body
):
    faulty_http.always = Fault(status=status, body=body)
    for act in (
        lambda: s3.stat("k"),
        lambda: get(s3),
        lambda: s3.put("k", io.BytesIO(b"x"), 1),
        lambda: list(s3.list("")),
    ):
        with pytest.raises(error):
            act()


def test_a_bucket_in_another_region_is_found_there(faulty_http, transport):
    credentials = Credentials(access_key="A", secret_key="S")
    location = Location(scheme="s3", endpoint=faulty_http.endpoint, bucket="bucket", credentials=credentials)
    store = S3Store(location, transport)
    faulty_http.content = b"content"
    faulty_http.faults.append(Fault(status=301, headers={"x-amz-bucket-region": "eu-north-1"}))
    assert get(store) == b"content"
    assert get(store) == b"content"
    regions = [headers["authorization"].split("/")[2] for _, _, headers in faulty_http.seen]
    assert regions == ["us-east-1", "eu-north-1", "eu-north-1"]


def test_an_upload_in_parts_that_fails_within_an_answer_of_200_has_failed(s3, faulty_http):
    faulty_http.content = COMPLETED.replace(b"<ETag>e</ETag>", b"")
    with pytest.raises(errors.StorageUnavailable):
        s3.put("k", io.BytesIO(bytes(17 << 20)), 17 << 20)


@pytest.mark.parametrize("content", [b"no XML", b"<a>", b"\xff", b"<ListBucketResult/>"])
def test_a_listing_that_is_none_is_unavailable(s3, faulty_http, content):
    faulty_http.content = content
    with pytest.raises((errors.StorageUnavailable, errors.UnsupportedRequest)):
        list(s3.list(""))


def test_an_answer_without_end_is_not_taken_in(s3, faulty_http):
    faulty_http.content = bytes(20_000_000)
    with pytest.raises(errors.StorageUnavailable, match="without end"):
        list(s3.list(""))


def test_redirects_are_followed_to_web_addresses_only_and_not_for_ever(web, faulty_http):
    faulty_http.content = b"content"
    for target in ("/elsewhere", f"http://{faulty_http.endpoint}/b?c=d", "relative"):
        faulty_http.faults.append(Fault(status=302, headers={"Location": target}))
    assert get(web, "deep/key") == b"content"
    assert [path for _, path, _ in faulty_http.seen] == ["/deep/key", "/elsewhere", "/b?c=d", "/relative"]
    for target in ("file:///etc/passwd", "ftp://h/x", "http://[", ""):
        faulty_http.faults.append(Fault(status=302, headers={"Location": target}))
        with pytest.raises(errors.ArtifactFailed):
            get(web)
    faulty_http.always = Fault(status=307, headers={"Location": "/again"})
    with pytest.raises(errors.ArtifactFailed, match="more than 5 redirects"):
        get(web)


@pytest.mark.parametrize(
    ("status", "error"), [(404, NotFound), (410, NotFound), (401, Forbidden), (403, Forbidden)]
)
def test_a_refused_url_never_shows_its_query(web, faulty_http, status, error):
    faulty_http.always = Fault(status=status)
    with pytest.raises(error) as caught:
        get(web, "path?X-Signature=hunter2")
    assert "hunter2" not in str(caught.value)
    assert "/path" in str(caught.value)
    faulty_http.always = Fault(status=503)
    with pytest.raises(errors.StorageUnavailable) as away:
        get(web, "path?X-Signature=hunter2")
    assert "hunter2" not in str(away.value)


def test_a_web_server_need_not_tell_the_size(web, faulty_http):
    faulty_http.lengths = False
    faulty_http.content = os.urandom(SIZE)
    assert web.stat("k").size == -1
    assert get(web, "k") == faulty_http.content


def test_an_encoding_of_the_content_is_left_alone(store, faulty_http):
    """A .gz that a server declares as encoded is still the file that was stored."""
    faulty_http.content = gzip.compress(b"content")
    faulty_http.extra = {"Content-Encoding": "gzip"}
    assert get(store) == faulty_http.content


def test_no_server_is_no_answer(transport):
    location = Location(scheme="http", endpoint="no-such-host.invalid")
    with pytest.raises(errors.StorageUnavailable, match=r"no-such-host\.invalid"):
        get(HttpStore(location, Transport(patience=Patience(attempts=1))))


@pytest.mark.parametrize("endpoint", ["a..b", "-x-.h", "h:0x", "x" * 70 + ".h"])
def test_an_address_that_is_none_is_refused(transport, endpoint):
    for store in (HttpStore, S3Store):
        with pytest.raises((errors.UnsupportedRequest, errors.StorageUnavailable)):
            get(store(Location(scheme="http", endpoint=endpoint, bucket="bucket"), transport))


def test_tls_files_that_are_none_are_the_operators_error(tmp_path):
    (tmp_path / "ca.pem").write_text("nonsense")
    for path in (tmp_path / "ca.pem", tmp_path / "absent.pem"):
        with pytest.raises(errors.UsageError, match="--s3-ca"):
            Transport(tls=config.S3(ca=path))
