"""SQS for the tests: moto's server in a process of its own, with credentials checked. It is SQS as the network shows it."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from botocore import session as botocore_session

from runner.queues.sqs_account import SqsAccount, SqsKeys
from tests.servers.ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_SECS = 90.0
REGION = "us-east-1"


@dataclasses.dataclass(frozen=True)
class SqsServer:
    """Queues of one account; `admin` is another client than the runner's, for looking from outside."""

    port: int
    admin: Any
    user: SqsKeys  #: may do everything with SQS
    stranger: SqsKeys  #: a key that is known, and allowed nothing
    iam: Any  #: a client that may make and remove keys

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def account(self, *, port: int = 0, keys: SqsKeys | None = None, region: str = REGION) -> SqsAccount:
        """For a backend; through a proxy with `port`."""
        return SqsAccount(
            label="account",
            region=region,
            keys=keys or self.user,
            endpoint_url=f"http://127.0.0.1:{port or self.port}",
        )

    def create(self, name: str, **attributes: str) -> str:
        if name.endswith(".fifo"):
            attributes |= {"FifoQueue": "true"}
        return str(self.admin.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"])

    def delete(self, name: str) -> None:
        self.admin.delete_queue(QueueUrl=self.of(name))

    def of(self, name: str) -> str:
        return str(self.admin.get_queue_url(QueueName=name)["QueueUrl"])

    def depth(self, name: str) -> int:
        """Messages that wait, those held not counted."""
        return self._count(name, "ApproximateNumberOfMessages")

    def held(self, name: str) -> int:
        return self._count(name, "ApproximateNumberOfMessagesNotVisible")

    def send(self, name: str, body: bytes) -> None:
        """As a StudioML client; on a FIFO queue, which it does not know, in one group."""
        more = {"MessageGroupId": "theirs", "MessageDeduplicationId": uuid.uuid4().hex}
        self.admin.send_message(
            QueueUrl=self.of(name), MessageBody=body.decode(), **more if name.endswith(".fifo") else {}
        )

    def drop_account(self, folder: Path) -> None:
        """AWS's two files, side by side, as an operator drops them into `--certs-dir`. It appears whole."""
        made = folder.with_name(f".{folder.name}")
        made.mkdir(parents=True)
        (made / "credentials").write_text(
            f"[default]\naws_access_key_id = {self.user.access_key}\naws_secret_access_key = {self.user.secret_key}\n"
        )
        (made / "config").write_text(f"[default]\nregion = {REGION}\nendpoint_url = {self.url}\n")
        made.rename(folder)

    def another_key(self) -> SqsKeys:
        """A second key of the user."""
        return _key(self.iam, "user")

    def revoke(self, keys: SqsKeys) -> None:
        self.iam.delete_access_key(UserName="user", AccessKeyId=keys.access_key)

    def clear(self) -> None:
        """Delete every queue."""
        for url in self.admin.list_queues().get("QueueUrls", ()):
            self.admin.delete_queue(QueueUrl=url)

    def _count(self, name: str, attribute: str) -> int:
        answer = self.admin.get_queue_attributes(QueueUrl=self.of(name), AttributeNames=[attribute])
        return int(answer["Attributes"][attribute])


@pytest.fixture(scope="session")
def sqs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqsServer]:
    """The SQS of this test run."""
    (port,) = free_ports(1)
    directory = tmp_path_factory.mktemp("sqs")
    with (directory / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=output,
            cwd=directory,
            env={"PATH": os.environ["PATH"], "HOME": str(directory)},
        )
    try:
        _wait_until_it_answers(process, port, directory)
        yield _with_users(port)
    finally:
        process.kill()
        process.wait()


def _with_users(port: int) -> SqsServer:
    root = SqsKeys(access_key="root", secret_key="root-secret")
    iam = _client("iam", port, root)
    admin, user, stranger = (_user(iam, name) for name in ("admin", "user", "stranger"))
    for name, service in (("admin", "sqs"), ("admin", "iam"), ("user", "sqs")):
        everything = {"Effect": "Allow", "Action": f"{service}:*", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": everything})
        iam.put_user_policy(UserName=name, PolicyName=service, PolicyDocument=policy)
    _ask(port, "POST", "/moto-api/reset-auth", b"0")  # from now on signatures and rights are checked
    return SqsServer(
        port=port,
        admin=_client("sqs", port, admin),
        user=user,
        stranger=stranger,
        iam=_client("iam", port, admin),
    )


def _user(iam: Any, name: str) -> SqsKeys:
    iam.create_user(UserName=name)
    return _key(iam, name)


def _key(iam: Any, name: str) -> SqsKeys:
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return SqsKeys(access_key=key["AccessKeyId"], secret_key=key["SecretAccessKey"])


def _client(service: str, port: int, keys: SqsKeys) -> Any:
    return botocore_session.Session().create_client(
        service,
        region_name=REGION,
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=keys.access_key,
        aws_secret_access_key=keys.secret_key,
    )


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int, directory: Path) -> None:
    limit = time.monotonic() + START_SECS
    while True:
        assert process.poll() is None, (directory / "output.txt").read_text()[-4000:]
        try:
            _ask(port, "GET", "/moto-api/data.json")
        except OSError:
            assert time.monotonic() < limit, "moto does not answer"
            time.sleep(0.05)  # between questions
        else:
            return


def _ask(port: int, method: str, path: str, body: bytes | None = None) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, (path, answer.status)
    finally:
        connection.close()
