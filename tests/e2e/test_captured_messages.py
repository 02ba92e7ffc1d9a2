"""Messages that the real client once put on a broker run through a real daemon: bytes as captured but for addresses, keys and time."""

from __future__ import annotations

import io
import json
import pathlib
import pickle
import sys
import tarfile
import time
from typing import TYPE_CHECKING, Any

import pika
import pytest

from tests.servers.seaweedfs import ADMIN, PUBLIC
from tests.servers.studioml_client import ended, serving
from tools import client_env

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.daemon import Daemon
    from tests.servers.rabbitmq import RabbitmqServer
    from tests.servers.seaweedfs import SeaweedFs

pytestmark = [pytest.mark.service, pytest.mark.slow, pytest.mark.timeout(300)]

CAPTURED = pathlib.Path(__file__).parents[1] / "data" / "captured"
CASES = ("plain", "args", "data", "hyperparam-0", "hyperparam-1", "completion-0")
BUCKET = "studioml-artifacts"
#: What the messages name and was not captured: a child of a grid search, and the three artifacts of a completion service.
SEARCH = "import os; print('found', sorted(os.listdir('..')))"
COMPLETION = """
import os, pickle
(script,), (arguments,), (data,) = (os.listdir("../" + tag) for tag in ("clientscript", "args", "mydata"))
namespace = {}
exec(open("../clientscript/" + script).read(), namespace)
value = namespace["clientFunction"](pickle.load(open("../args/" + arguments, "rb")), {"mydata": "../mydata/" + data})
os.makedirs("../retval", exist_ok=True)
with open("../retval/retval", "wb") as file:
    pickle.dump(value, file, protocol=2)
"""
CLIENT_SCRIPT = "def clientFunction(args, files): return [args, open(files['mydata']).read()]"


class Captured:
    """Captured messages, made fit for the servers of this test run."""

    def __init__(self, rabbitmq: RabbitmqServer, seaweedfs: SeaweedFs) -> None:
        self.rabbitmq = rabbitmq
        self.seaweedfs = seaweedfs

    def message(self, case: str, **experiment: Any) -> dict[str, Any]:
        text = (CAPTURED / f"{case}.json").read_text()
        for theirs, ours in (
            ("127.0.0.1:5055", self.seaweedfs.endpoint),
            ("FAKEACCESSKEY", ADMIN.access_key),
            ("FAKESECRETKEY", ADMIN.secret_key),
        ):
            text = text.replace(theirs, ours)
        message: dict[str, Any] = json.loads(text)
        message["experiment"] |= experiment
        return message

    def fresh(self, case: str) -> dict[str, Any]:
        """As if submitted now. Without their Python on this machine, they get another and none of their packages."""
        if has_their_python():
            return self.message(case, time_added=time.time())
        other = f"{sys.version_info.major}.{sys.version_info.minor}"
        return self.message(case, time_added=time.time(), pythonver=other, pythonenv=[])

    def publish(self, case: str, message: dict[str, Any]) -> None:
        """Through the exchange, with the properties of the captured one."""
        facts = json.loads((CAPTURED / f"{case}.amqp.json").read_text())
        exchange, key = facts["method"]["exchange"], facts["method"]["routing_key"]
        queue = key.removeprefix("StudioML.")
        self.rabbitmq.declare(queue)
        with self.rabbitmq.channel() as channel:
            channel.confirm_delivery()
            properties = pika.BasicProperties(**facts["properties"])
            channel.basic_publish(exchange, key, json.dumps(message).encode(), properties, mandatory=True)

    def put(self, key: str, content: bytes, bucket: str = BUCKET) -> None:
        self.seaweedfs.make_bucket(bucket)
        self.seaweedfs.client().put_object(bucket, key, io.BytesIO(content), len(content))

    def get(self, key: str) -> bytes:
        with self.seaweedfs.client().get_object(BUCKET, key) as answer:
            return bytes(answer.read())

    def opened(self, key: str) -> tarfile.TarFile:
        return tarfile.open(fileobj=io.BytesIO(self.get(key)))

    def members(self, key: str) -> dict[str, bytes]:
        with self.opened(key) as archive:
            return {
                member.name: (archive.extractfile(member) or io.BytesIO()).read()
                for member in archive.getmembers()
            }

    def output(self, experiment: str) -> list[str]:
        (content,) = self.members(f"experiments/{experiment}/output.tar").values()
        return content.decode().splitlines()

    def documents(self, experiment: str) -> list[dict[str, Any]]:
        """The metadata documents of an experiment; all experiments of a bucket share their place."""
        names = self.seaweedfs.client().list_objects(BUCKET, "metadata/scrape-host-", recursive=True)
        documents = [json.loads(self.get(str(item.object_name))) for item in names]
        return [document for document in documents if document["studioml"]["experiment"] == experiment]


def has_their_python() -> bool:
    return any(client_env.answers(path, 8) for path in client_env.candidates(8))


def packed(**files: bytes) -> bytes:
    """A tar of files, as the client packs a directory, or with `./`, a file; `__` in a name is a dot."""
    with io.BytesIO() as target:
        with tarfile.open(fileobj=target, mode="w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name.replace("__", "."))
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return target.getvalue()


@pytest.fixture(scope="module")
def captured(rabbitmq: RabbitmqServer, seaweedfs: SeaweedFs) -> Captured:
    """With all that the messages name in storage."""
    captured = Captured(rabbitmq, seaweedfs)
    for blob in (CAPTURED / "blobs").iterdir():
        captured.put(f"blobstore/{blob.name}", blob.read_bytes())
    captured.put("thing.tgz", b"from the web", PUBLIC)
    for case in CASES:
        artifacts = captured.message(case)["experiment"]["artifacts"]
        if case.startswith("hyperparam"):
            captured.put(artifacts["workspace"]["key"], packed(hp2__py=SEARCH.encode()))
        elif case.startswith("completion"):
            workspace = packed(completion_service_client__py=COMPLETION.encode())
            captured.put(artifacts["workspace"]["key"], workspace)
            captured.put(artifacts["clientscript"]["key"], packed(**{"./func__py": CLIENT_SCRIPT.encode()}))
            captured.put(artifacts["args"]["key"], packed(**{"./x": pickle.dumps([1, "two"])}))
    return captured


@pytest.fixture(scope="module")
def daemon(
    captured: Captured, client_environments: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    match = "^rmq_(test|args|data|hp|cs)$"
    directory = tmp_path_factory.mktemp("daemon")
    with serving(directory, captured.rabbitmq, client_environments, match=match) as daemon:
        yield daemon
        assert not daemon.dead_letters()


def test_their_python_is_on_this_machine():
    if not has_their_python():
        pytest.skip("no Python 3.8 here: the captured messages run without the packages they name")


def test_a_message_whose_lifetime_is_over_ends_without_a_run(captured: Captured, daemon: Daemon):
    captured.publish("plain", captured.message("plain"))
    run = ended(daemon, "plain-hello")
    assert (run["status"], run["reason"], run["fate"]) == ("failed", "expired", "ack")
    (document,) = captured.documents("plain-hello")
    assert (document["studioml"]["status"], document["experiment"]) == ("failed", {})
    (line,) = captured.output("plain-hello")
    assert "lifetime" in line


def test_captured_messages_run(captured: Captured, daemon: Daemon):
    messages = {case: captured.fresh(case) for case in CASES}
    ahead = time.time() + 60  # the clock of the client
    messages["completion-0"]["experiment"]["time_last_checkpoint"] = ahead
    runs_before = len(daemon.get("/api/runs")["recent"])
    for case, message in messages.items():
        captured.publish(case, message)
    recent = daemon.until(
        lambda: found if len(found := daemon.get("/api/runs")["recent"][runs_before:]) == len(CASES) else [],
        200,  # each builds an environment of its own
    )
    assert {run["experiment"]: (run["status"], run["reason"], run["fate"]) for run in recent} == {
        message["experiment"]["key"]: ("completed", "exit", "ack") for message in messages.values()
    }

    assert captured.output("plain-hello")[0].startswith("hello ")
    assert captured.documents("plain-hello")[-1]["experiment"] == {"loss": 0.25, "name": "trivial"}

    arguments = ["--lr", "0.1", "--name", "two words", 'quo"te', "$HOME", "--flag"]
    assert captured.output("args-exp") == [f"argv {json.dumps(arguments)}"]
    (document,) = captured.documents("args-exp")
    assert document["studioml"]["project"] == "proj1"

    siblings = dict(line.split(" ", 1) for line in captured.output("data-exp"))
    assert siblings.keys() >= {"workspace", "output", "modeldir", "weights"}
    assert siblings["data"] in {"['nested', 'train.csv']", "['train.csv', 'nested']"}
    assert siblings["onefile"] == "['onefile.txt']"
    assert siblings["webdata"] == "['thing.tgz']"
    assert siblings["weights"] == "[]"

    for case in ("hyperparam-0", "hyperparam-1"):
        (line,) = captured.output(messages[case]["experiment"]["key"])
        assert "'workspace'" in line

    retval = captured.members("experiments/completion_service_csdemo_0/retval.tar")
    assert list(retval) == ["./retval"]  # with any other name the service waits for ever
    assert pickle.loads(retval["./retval"]) == [[1, "two"], "single\n"]
    with captured.opened("experiments/completion_service_csdemo_0/retval.tar") as archive:
        assert (
            archive.getmember("./retval").mtime > ahead + 1
        )  # nor does it take what seems older than its submission
