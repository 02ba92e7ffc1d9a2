"""How the Pub/Sub backend is let in: the service account's key, TLS, and what is said when either is wrong."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from runner import errors
from runner.queues import base
from runner.queues.pubsub import PubsubBackend
from runner.queues.pubsub_account import PubsubAccount
from tests.servers.ports import free_ports
from tests.servers.pubsub import PROGRAM

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator

pytestmark = pytest.mark.service

CLIENT = """
import asyncio, pathlib, sys, time
from runner import errors
from runner.queues.pubsub import PubsubBackend
from runner.queues.pubsub_account import PubsubAccount

async def main(key, endpoint, replacement=None):
    account = PubsubAccount.from_key(pathlib.Path(key))
    backend = PubsubBackend(PubsubAccount(label="x", project=account.project, key=account.key, endpoint=endpoint))
    await backend.open()
    end = time.monotonic() + 60
    while True:
        try:
            print("found", await backend.discover())
        except errors.QueueUnavailable as error:
            if "failed to connect" in str(error) and time.monotonic() < end:  # the server starts just now
                await asyncio.sleep(0.2)
                continue
            if replacement and time.monotonic() < end:
                assert "UNAUTHENTICATED" in str(error), error
                pathlib.Path(key).write_bytes(pathlib.Path(replacement).read_bytes())
                await asyncio.sleep(0.2)
                continue
            print("error", error)
        break
    await backend.aclose()

asyncio.run(main(*sys.argv[1:]))
"""


def rsa_key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def pem(key: Any) -> str:
    from cryptography.hazmat.primitives import serialization as s

    return str(
        key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()).decode(),
    )


def account_file(path: pathlib.Path, key: Any) -> pathlib.Path:
    content = {
        "type": "service_account",
        "project_id": "some-project",
        "private_key_id": "1",
        "private_key": pem(key),
        "client_email": "runner@some-project.iam.gserviceaccount.com",
        "token_uri": "http://127.0.0.1:1/nobody-asks-here",
    }
    path.write_text(json.dumps(content))
    return path


def certificate(key: Any) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import NameOID

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    return built.public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def secure(tmp_path: pathlib.Path) -> Iterator[int]:
    """A server with TLS that takes only what the account's key has signed; its port."""
    from cryptography.hazmat.primitives import serialization as s

    account, tls = rsa_key(), rsa_key()
    account_file(tmp_path / "key.json", account)
    public = account.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    contents = {"public": public, "tls_key": pem(tls).encode(), "tls_certificate": certificate(tls)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (port,) = free_ports(1)
    files = json.dumps({name: str(tmp_path / name) for name in contents})
    process = subprocess.Popen([sys.executable, str(PROGRAM), str(port), files])
    yield port
    process.kill()
    process.wait()


def ask(directory: pathlib.Path, port: int, key: str, *more: str) -> str:
    """What `discover` says, of one backend, in a process that trusts the server's certificate: grpc reads that setting once."""
    environment = os.environ | {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(directory / "tls_certificate")}
    argv = [sys.executable, "-c", CLIENT, str(directory / key), f"localhost:{port}", *more]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=100, check=True)
    return done.stdout.splitlines()[-1]


def test_the_key_opens_the_project_and_no_token_server_is_asked(tmp_path: pathlib.Path, secure: int) -> None:
    assert ask(tmp_path, secure, "key.json") == "found []"


def test_another_key_is_refused_without_a_secret_in_the_text(tmp_path: pathlib.Path, secure: int) -> None:
    other = rsa_key()
    account_file(tmp_path / "other.json", other)
    said = ask(tmp_path, secure, "other.json")
    assert said.startswith("error x: its subscriptions cannot be listed: UNAUTHENTICATED")
    assert pem(other).splitlines()[1][:20] not in said


def test_a_key_that_is_rotated_in_place_is_read_again(tmp_path: pathlib.Path, secure: int) -> None:
    right = (tmp_path / "key.json").read_text()
    account_file(tmp_path / "key.json", rsa_key())  # what is revoked
    (tmp_path / "new.json").write_text(right)
    assert ask(tmp_path, secure, "key.json", str(tmp_path / "new.json")) == "found []"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("not json SECRET", "is not JSON"),
        ('["SECRET"]', "is not a service account's key"),
        ('{"type": "authorized_user", "client_secret": "SECRET"}', "is not a service account's key"),
        ('{"type": "service_account", "private_key": "SECRET"}', "has no project_id"),
    ],
)
def test_a_file_that_is_no_key_is_named_but_not_shown(tmp_path: pathlib.Path, content: str, why: str) -> None:
    path = tmp_path / "key.json"
    path.write_text(content)
    with pytest.raises(errors.UsageError, match=why) as caught:
        PubsubAccount.from_key(path)
    assert str(path) in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UsageError, match=r"missing\.json cannot be read: No such file"):
        PubsubAccount.from_key(tmp_path / "missing.json")


def test_with_an_emulator_the_project_is_enough(tmp_path: pathlib.Path) -> None:
    (tmp_path / "key.json").write_text('{"project_id": "p"}')
    account = PubsubAccount.from_key(tmp_path / "key.json", emulator="127.0.0.1:1")
    assert (account.label, account.project) == ("pubsub://p", "p")


async def test_a_damaged_key_is_unavailable_until_it_is_whole(tmp_path: pathlib.Path) -> None:
    path = account_file(tmp_path / "key.json", rsa_key())
    whole = path.read_text()
    path.write_text(whole.replace("-----BEGIN", "SECRET"))
    backend = PubsubBackend(
        PubsubAccount(label="x", project="some-project", key=path, endpoint="127.0.0.1:1")
    )
    await backend.open()
    async with contextlib.aclosing(backend):
        with pytest.raises(errors.QueueUnavailable, match=r"the key .*key\.json cannot be used") as caught:
            await backend.discover()
        assert "SECRET" not in str(caught.value)
        queue = base.QueueRef(account="x", name="pubsub_q")
        assert await backend.existence(queue) is base.Existence.UNKNOWN
        path.write_text(whole)
        with pytest.raises(errors.QueueUnavailable, match="its subscriptions cannot be listed"):
            await backend.discover()  # that far it comes now: nobody listens there
