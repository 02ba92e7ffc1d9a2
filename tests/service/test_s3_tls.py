"""S3 over TLS: the operator's own authority, client certificates, and servers that nobody vouches for."""

from __future__ import annotations

import io
import os
import shutil
import ssl
import subprocess
from typing import TYPE_CHECKING

import pytest

from runner import config, errors
from runner.storage.base import Location, ObjectStore
from runner.storage.registry import Stores
from runner.storage.transport import Patience
from tests.servers.faulty_http import FaultyHttp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    if shutil.which("openssl") is None:
        absent = "the program openssl is missing; install the package openssl"
        if os.environ.get("CI") == "true":
            pytest.fail(absent)
        pytest.skip(absent)
    directory = tmp_path_factory.mktemp("certificate")
    cert, key = directory / "cert.pem", directory / "key.pem"
    argv = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    argv += [
        "-subj",
        "/CN=127.0.0.1",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(key),
        "-out",
        str(cert),
    ]
    subprocess.run(argv, check=True, capture_output=True)
    return cert, key


@pytest.fixture
def server(certificate: tuple[Path, Path]) -> Iterator[FaultyHttp]:
    """Shows the certificate, and wants to be shown it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.load_verify_locations(certificate[0])
    context.verify_mode = ssl.CERT_REQUIRED
    made = FaultyHttp(tls=context)
    yield made
    made.close()


def store(server: FaultyHttp, s3: config.S3) -> ObjectStore:
    location = Location(scheme="s3", endpoint=server.endpoint, tls=True, bucket="bucket")
    return Stores(s3, patience=Patience(attempts=1)).store(location)


def test_objects_come_and_go_over_tls(server, certificate):
    cert, key = certificate
    found = store(server, config.S3(ca=cert, cert=cert, key=key))
    server.content = os.urandom(3_000_000)
    with found.open("k") as stream:
        assert stream.read() == server.content
    found.put("k", io.BytesIO(bytes(3_000_000)), 3_000_000)
    assert [method for method, _, _ in server.seen] == ["GET", "PUT"]


def test_a_server_that_nobody_vouches_for_gets_nothing(server):
    with pytest.raises(errors.StorageUnavailable, match="TLS"):
        store(server, config.S3()).stat("k")
    assert not server.seen


def test_without_the_certificate_that_the_server_wants_there_is_no_answer(server, certificate):
    with pytest.raises(errors.StorageUnavailable):
        store(server, config.S3(ca=certificate[0])).stat("k")
    assert not server.seen
