"""The unmodified StudioML client submits to RabbitMQ and S3, a real daemon runs it, and the client reads its results."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.servers.studioml_client import account, ended, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.servers.daemon import Daemon
    from tests.servers.rabbitmq import RabbitmqServer
    from tests.servers.seaweedfs import SeaweedFs
    from tests.servers.studioml_client import StudiomlClient

pytestmark = [pytest.mark.service, pytest.mark.slow, pytest.mark.timeout(300)]

QUEUES = "rmq_client_"


@pytest.fixture(scope="module")
def daemon(
    client_interpreter: Path,
    client_environments: Path,
    rabbitmq: RabbitmqServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Daemon]:
    """Serves all tests of this module."""
    directory = tmp_path_factory.mktemp("daemon")
    with serving(directory, rabbitmq, client_environments, match=f"^{QUEUES}") as daemon:
        yield daemon
        assert not daemon.dead_letters()


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> str:
    return str(request.node.name).removeprefix("test_").replace("_", "-")[:60].strip("-")


@pytest.fixture
def make_client(
    tmp_path: Path, client_interpreter: Path, client_broker: str, seaweedfs: SeaweedFs, bucket: str
) -> Callable[..., StudiomlClient]:
    def make(**changes: Any) -> StudiomlClient:
        return account(client_interpreter, tmp_path / "home", client_broker, seaweedfs, bucket, **changes)

    return make


def written(directory: Path, **files: str) -> Path:
    """A directory with these files; `__` in a name is a dot."""
    directory.mkdir()
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def metadata(seaweedfs: SeaweedFs, bucket: str) -> dict[str, list[tuple[str, bytes]]]:
    """`{"output" | "runner" | "scrape": [(name, content)]}` of all objects below metadata/, by name."""
    client = seaweedfs.client()
    found: dict[str, list[tuple[str, bytes]]] = {}
    names = sorted(str(item.object_name) for item in client.list_objects(bucket, "metadata/", recursive=True))
    for name in names:
        with client.get_object(bucket, name) as answer:
            kind = name.removeprefix("metadata/").split("-host-")[0]
            found.setdefault(kind, []).append((name, answer.read()))
    return found


def queue_facts(rabbitmq: RabbitmqServer, queue: str) -> dict[str, Any]:
    """What declared it; changes if somebody declares it otherwise."""
    status, facts = rabbitmq.api("GET", f"/api/queues/%2F/{queue}")
    assert status == 200, facts
    bindings = rabbitmq.api("GET", f"/api/queues/%2F/{queue}/bindings")[1]
    return {name: facts[name] for name in ("durable", "auto_delete", "exclusive", "arguments")} | {
        "bound": sorted((one["source"], one["routing_key"]) for one in bindings)
    }


NUMPY = "import json, numpy; print(json.dumps(numpy.__version__))"
LOOK = """
import json, os, pathlib, shutil, sys
import numpy
print("numpy", numpy.__version__)
print("argv", json.dumps(sys.argv[1:]))
print("once", json.dumps({str(p.relative_to("../data")): p.read_text() for p in pathlib.Path("../data").rglob("*") if p.is_file()}))
print("one", pathlib.Path("../single/one.txt").read_text())
print("env", os.environ["GREETING"], os.environ["PATH"])
print("own", shutil.which("mytool"))
print(json.dumps({"experiment": {"loss": 0.5, "epoch": 1}}))
print(json.dumps([{"op": "add", "path": "/experiment/accuracy", "value": 0.75}]))
print(json.dumps({"experiment": {"epoch": 2}}))
pathlib.Path("../modeldir/sub").mkdir()
pathlib.Path("../modeldir/model.txt").write_text("weights")
pathlib.Path("../modeldir/sub/deep.txt").write_text("deeper")
print("last words", file=sys.stderr)
"""


def test_an_experiment_from_studio_run_to_results_read_by_the_client(
    daemon: Daemon, make_client, *, rabbitmq, seaweedfs, bucket, tmp_path
):
    client = make_client(
        env={
            "PATH": "%PATH%:./bin",
            "GREETING": "good morning",
            "MY_TOKEN": "canary-of-the-token",
            "NUMBER": 3,
        }
    )
    workspace = written(tmp_path / "ws", look__py=LOOK)
    tool = written(workspace / "bin", mytool="#!/bin/sh\n") / "mytool"
    tool.chmod(0o755)
    data = written(tmp_path / "data", a__csv="1,2")
    written(data / "nested", b__csv="3,4")
    (tmp_path / "one.txt").write_text("only")
    queue = f"{QUEUES}first"
    client.submit(
        workspace,
        *(f"--queue={queue}", "--experiment=first", "--project=demo"),
        *(f"--capture-once={data}:data", f"--capture-once={tmp_path}/one.txt:single"),
        *("look.py", "--name", "two words", "--quote", """it's "so" $HOME""", ""),
    )
    before = queue_facts(rabbitmq, queue)

    run = ended(daemon, "first")
    assert (run["status"], run["reason"], run["fate"]) == ("completed", "exit", "ack")
    assert run["attempt"] == 1

    results = client.fetch("first", "output", "modeldir", "tb")
    lines = dict(line.split(" ", 1) for line in results["output"].splitlines() if line[0] not in "[{")
    assert json.loads(lines["argv"]) == ["--name", "two words", "--quote", """it's "so" $HOME""", ""]
    assert json.loads(lines["once"]) == {"a.csv": "1,2", "nested/b.csv": "3,4"}
    assert lines["one"] == "only"
    assert lines["numpy"] == client.python(NUMPY)  # the very packages of the submitter
    assert lines["env"].startswith("good morning /")
    assert lines["env"].endswith(f":{os.environ['PATH']}:./bin")  # the daemon has the PATH of this process
    assert lines["own"].endswith("bin/mytool")
    assert lines["last"] == "words"
    assert results["modeldir"] == {"model.txt": "weights", "sub/deep.txt": "deeper"}
    assert results["tb"] is None  # nothing was written there

    objects = metadata(seaweedfs, bucket)
    assert {kind: len(ones) for kind, ones in objects.items()} == {"output": 1, "runner": 1, "scrape": 1}
    assert objects["output"][0][1].decode() == results["output"]
    document = json.loads(objects["scrape"][0][1])
    assert document["experiment"] == {"loss": 0.5, "epoch": 2, "accuracy": 0.75}
    studioml = document["studioml"]
    assert (studioml["status"], studioml["experiment"], studioml["project"]) == ("completed", "first", "demo")
    assert set(studioml["artifacts"]) >= {"workspace", "output", "modeldir", "data", "single"}
    assert document["runner"]["request"]["experiment"]["filename"] == "look.py"
    records = [json.loads(line) for line in objects["runner"][0][1].splitlines()]
    assert "experiment started" in {record["event"] for record in records}

    # Made by the client, as it was before the runner came; and so it stays.
    assert before["durable"] is False
    assert ("StudioML.topic", f"StudioML.{queue}") in before["bound"]
    assert queue_facts(rabbitmq, queue) == before

    secret = json.loads(client.config.read_text())["storage"]["credentials"]["aws"]["secret_access_key"]
    stored = b"".join(content for ones in objects.values() for _, content in ones)
    seen = stored.decode() + daemon.log_text() + daemon.get("/metrics").decode() + json.dumps(daemon.runs())
    assert "GREETING" in seen
    for canary in (secret, "canary-of-the-token"):
        assert canary not in seen


STATE = """
import pathlib
for name in ("state", "modeldir"):
    path = pathlib.Path("..", name, "count")
    count = int(path.read_text()) if path.exists() else 0
    path.write_text(str(count + 1))
    print(name, count)
print('{"experiment": {"count": %d}}' % count)
"""


def test_two_runs_go_on_where_the_first_ended_and_keep_their_metadata_apart(
    daemon: Daemon, make_client, seaweedfs, bucket, tmp_path
):
    client = make_client()
    workspace = written(tmp_path / "ws", state__py=STATE)
    state = written(tmp_path / "state", seed="uploaded? no")
    for number in (1, 2):
        # Captured artifacts are not uploaded at submission; the second run finds what the first has stored.
        client.submit(
            workspace,
            *(f"--queue={QUEUES}state", "--experiment=again", f"--capture={state}:state", "state.py"),
        )
        assert ended(daemon, "again", number)["status"] == "completed"
    results = client.fetch("again", "output", "state", "modeldir")
    assert results["output"].splitlines()[:2] == ["state 1", "modeldir 1"]
    assert results["state"] == results["modeldir"] == {"count": "2"}

    objects = metadata(seaweedfs, bucket)
    assert {kind: len(ones) for kind, ones in objects.items()} == {"output": 2, "runner": 2, "scrape": 2}
    documents = []
    for _, content in objects["scrape"]:
        assert content.startswith(b"{")
        assert content.count(b"\n") == 1
        documents.append(json.loads(content))
    assert [document["experiment"]["count"] for document in documents] == [0, 1]  # names sort by time
    assert documents[0]["asset"] != documents[1]["asset"]

    reuse = written(tmp_path / "ws2", read__py="print(open('../prior/count').read())")
    client.submit(
        reuse, f"--queue={QUEUES}state", "--experiment=reuse", "--reuse=again/state:prior", "read.py"
    )
    assert ended(daemon, "reuse")["status"] == "completed"
    assert client.fetch("reuse", "output")["output"] == "2\n"


def test_an_experiment_that_takes_too_long_is_ended_and_its_results_are_kept(
    daemon: Daemon, make_client, seaweedfs, bucket, tmp_path
):
    script = (
        "import time\nopen('../modeldir/half', 'w').write('x')\nprint('begun', flush=True)\ntime.sleep(600)\n"
    )
    client = make_client()
    client.submit(
        written(tmp_path / "ws", endless__py=script),
        *(f"--queue={QUEUES}endless", "--experiment=endless", "--max-duration=8s", "endless.py"),
    )
    run = ended(daemon, "endless")
    assert (run["status"], run["reason"], run["fate"]) == ("failed", "timeout", "ack")
    results = client.fetch("endless", "output", "modeldir")
    first, last = results["output"].splitlines()
    assert first == "begun"
    assert "max_duration of 8 s" in last
    assert results["modeldir"] == {"half": "x"}
    document = json.loads(metadata(seaweedfs, bucket)["scrape"][0][1])
    assert (document["studioml"]["status"], document["studioml"]["reason"]) == ("failed", "timeout")


def test_a_persistent_queue_is_served_and_stays_persistent(
    daemon: Daemon, make_client, *, rabbitmq, client_broker, tmp_path
):
    queue = f"{QUEUES}lasting"
    client = make_client(cloud={"queue": {"rmq": client_broker, "persistent": True}})
    client.submit(
        written(tmp_path / "ws", fail__py="raise SystemExit(3)"),
        *(f"--queue={queue}", "--experiment=lasting", "fail.py"),
    )
    before = queue_facts(rabbitmq, queue)
    assert before["durable"] is True
    run = ended(daemon, "lasting")
    assert (run["status"], run["reason"], run["exit_code"], run["fate"]) == ("failed", "exit", 3, "ack")
    assert queue_facts(rabbitmq, queue) == before


def test_each_child_of_a_grid_search_runs_with_its_own_workspace(
    daemon: Daemon, make_client, bucket, tmp_path
):
    client = make_client()
    client.submit(
        written(tmp_path / "ws", search__py="print(lr)\n"),
        *(f"--queue={QUEUES}grid", "--experiment=grid", "--hyperparam=lr=0.25,0.5", "search.py"),
    )

    def children() -> list[dict[str, Any]]:
        found = [
            one
            for one in daemon.get("/api/runs")["recent"]
            if str(one["experiment"]).startswith("grid__opt__")
        ]
        return found if len(found) == 2 else []

    runs = daemon.until(children)
    assert {run["status"] for run in runs} == {"completed"}
    printed = [client.fetch(run["experiment"], "output")["output"] for run in runs]
    assert sorted(printed) == ["0.25\n", "0.5\n"]
