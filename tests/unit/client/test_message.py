"""The message is the real client's: same members, same order, same forms."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from runner import errors
from runner.client import message
from runner.client.message import Artifact, Credentials, Experiment, Storage
from runner.request import decode

CAPTURED = Path(__file__).parents[2] / "data" / "captured"


def experiment(**more: Any) -> Experiment:
    known: dict[str, Any] = {
        "key": "plain-hello",
        "command": ["hello.py"],
        "storage": Storage(type="s3", endpoint="http://127.0.0.1:5055", bucket="studioml-artifacts"),
        "workspace": Artifact(tag="workspace", local="/home/user/ws", key="blobstore/" + "ab" * 32 + ".tar"),
        "credentials": Credentials(access_key="FAKEACCESSKEY", secret_access_key="FAKESECRETKEY"),
        "requirements": ["numpy==1.24.4"],
        "python": "3.8",
        "resources": {"gpus": 0, "cpus": 1, "ram": "1gb", "hdd": "1gb"},
        "max_duration": "5m",
        "lifetime": "30m",
        "env": {"EXTRA_ENV": "from-config"},
        "queue": {
            "rmq": "amqp://guest:guest@127.0.0.1:5672/%2f?connection_attempts=3&retry_delay=.5&socket_timeout=5"
        },
        "home": "/home/user",
        "time_added": 1795307649.9937932,
        "time_packed": 1795307650.0848641,
    }
    return Experiment(**(known | more))


def captured(name: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((CAPTURED / f"{name}.json").read_bytes())
    return told


def shape(value: Any) -> Any:
    """Members in order and the types of values."""
    if isinstance(value, dict):
        return [(name, shape(member)) for name, member in value.items()]
    return type(value).__name__


def test_every_member_stands_where_the_real_client_puts_it():
    ours, theirs = message.build(experiment()), captured("plain")
    assert shape(ours["experiment"]) == shape(theirs["experiment"])
    assert list(ours["config"]) == list(theirs["config"])
    for name in ("cloud", "env"):
        assert shape(ours["config"][name]) == shape(theirs["config"][name])


def test_the_values_are_the_real_clients():
    ours, theirs = message.build(experiment()), captured("plain")
    for one in (ours, theirs):
        one["experiment"]["pythonenv"] = ["numpy==1.24.4"]
        one["config"]["database"]["bucket"] = "meta"  # the client has two; for us one is enough
        archive = one["experiment"]["artifacts"]["workspace"]
        archive["qualified"] = archive["qualified"].replace(archive["key"], "KEY")
        archive["key"] = "KEY"
    assert ours["experiment"] == theirs["experiment"]
    assert ours["config"]["storage"] == theirs["config"]["storage"]
    assert sorted(ours["config"]["database"]) == sorted(theirs["config"]["database"])
    assert ours["config"]["cloud"] == theirs["config"]["cloud"]


def test_captures_look_as_the_real_clients():
    home = "/home/user/.studioml/experiments/data-exp"
    others = [
        Artifact(
            tag="weights", local=f"{home}/weights", key="experiments/data-exp/weights.tar", mutable=True
        ),
        Artifact(
            tag="data",
            local="/home/user/data",
            key="blobstore/4733f949ddbf35da345587f82cf8b249082e5d9679642d8fae90474e98506647.tar",
        ),
        Artifact(tag="webdata", url="http://127.0.0.1:5055/public/thing.tgz"),
    ]
    ours = message.build(experiment(key="data-exp", others=others))["experiment"]["artifacts"]
    theirs = captured("data")["experiment"]["artifacts"]
    for tag in ("weights", "data", "webdata"):
        assert ours[tag] == theirs[tag]
        assert list(ours[tag]) == list(theirs[tag])
    assert [tag for tag in ours if tag != "onefile"] == [tag for tag in theirs if tag != "onefile"]


def test_a_runner_understands_an_image_and_cards():
    resources = {"gpus": 4, "gpuMem": "8gb", "gpuCount": 2}
    _, request = message.encode(message.build(experiment(image="python:3.11", resources=resources)))
    assert request.container is not None
    assert (request.container.engine, request.container.reference) == ("docker", "python:3.11")
    assert (request.resources.gpus, request.resources.gpu_count) == (4, 2)
    assert "container" not in message.build(experiment())["config"]


def test_arguments_are_quoted_as_the_real_client_quotes_them():
    theirs = captured("args")["experiment"]["args"]
    typed = [word for element in theirs for word in shlex.split(element)]
    built = message.build(experiment(command=["train.py", *typed]))
    assert built["experiment"]["args"] == theirs
    _, request = message.encode(built)
    assert request.args == tuple(typed)


def test_credentials_go_where_a_runner_looks_and_never_into_a_repr():
    asked = experiment(
        credentials=Credentials(
            access_key="AK", secret_access_key="very-secret", session_token="very-token", region="eu-1"
        )
    )
    assert "very" not in repr(asked)
    body, request = message.encode(message.build(asked))
    for artifact in request.artifacts:
        assert artifact.credentials is not None
        assert artifact.credentials.secret_key == "very-secret"
        assert artifact.credentials.session_token == "very-token"
        assert artifact.region == "eu-1"
    assert json.loads(body)["config"]["storage"]["credentials"]["aws"]["region"] == "eu-1"


def test_without_credentials_there_are_no_such_members():
    built = message.build(dataclasses.replace(experiment(), credentials=None))
    assert all("credentials" not in artifact for artifact in built["experiment"]["artifacts"].values())
    assert "credentials" not in built["config"]["storage"]


def test_what_a_runner_would_not_understand_is_refused():
    built = message.build(experiment())
    built["config"]["env"]["A"] = ["no", "text"]
    with pytest.raises(errors.UsageError, match=r"config\.env"):
        message.encode(built)
    built["experiment"]["filename"] = None
    with pytest.raises(errors.UsageError, match="nothing to run"):
        message.encode(built)


@pytest.mark.parametrize(
    ("text", "endpoint", "bucket", "qualified"),
    [
        ("http://minio.lan:9000/art", "http://minio.lan:9000", "art", "s3://minio.lan:9000/art/k"),
        ("https://minio.lan:9000/art/", "https://minio.lan:9000", "art", "s3://minio.lan:9000/art/k"),
        ("s3://s3.amazonaws.com/art", "https://s3.amazonaws.com", "art", "s3://s3.amazonaws.com/art/k"),
        ("s3://minio:9000/art", "http://minio:9000", "art", "s3://minio:9000/art/k"),
        ("s3://store.lan/art", "https://store.lan", "art", "s3://store.lan/art/k"),
        ("store", "/here", "store", "file:///here/store/k"),
        ("/a/b", "/a", "b", "file:///a/b/k"),
        ("/b", "/", "b", "file:///b/k"),
        ("file:///a/b", "/a", "b", "file:///a/b/k"),
    ],
)
def test_storage_is_read_and_found_again_by_a_runner(text: str, endpoint: str, bucket: str, qualified: str):
    storage = Storage.parse(text, Path("/here"))
    assert (storage.endpoint, storage.bucket, storage.qualified("k")) == (endpoint, bucket, qualified)
    _, request = message.encode(message.build(experiment(storage=storage)))
    from runner import config
    from runner.storage.location import locate

    output = request.artifact("output")
    assert output is not None
    location = locate(output, request, config.S3(), allow_env_secrets=False)
    assert location.key == "experiments/plain-hello/output.tar"
    if storage.type == "s3":
        assert (location.bucket, location.tls) == (bucket, endpoint.startswith("https"))
        assert location.credentials is not None
    else:
        assert Path(location.bucket) == Path(endpoint) / bucket


@pytest.mark.parametrize(
    "text",
    [
        "http://minio.lan",
        "http://minio.lan/a/b",
        "ftp://h/b",
        "http://u:p@h/b",
        "s3:///b",
        "http://ho st/b",
        "",
        "..",
        "/",
    ],
)
def test_what_is_no_storage_is_refused_without_repeating_secrets(text: str):
    with pytest.raises(errors.UsageError, match="--storage") as refused:
        Storage.parse(text, Path("/here"))
    assert "u:p" not in str(refused.value)


@pytest.mark.parametrize("key", ["", ".", "..", "a/b", "a b", "x" * 201, "a\n", "ä"])
def test_keys_that_are_no_names_are_refused(key: str):
    with pytest.raises(errors.UsageError, match="--experiment"):
        message.check_key(key)


def test_the_captured_messages_themselves_pass_our_check():
    for name in ("plain", "args", "data"):
        body, request = message.encode(captured(name))
        assert decode.decode(body) == request
