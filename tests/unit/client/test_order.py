"""What cannot be is refused before anything is packed or sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from runner import config, errors
from runner.client.message import Storage
from runner.client.order import Capture, Order, Queue
from runner.client.submit import submit
from runner.storage.registry import Stores

if TYPE_CHECKING:
    from pathlib import Path


def order(tmp_path: Path, **more: Any) -> Order:
    directory = tmp_path / "src"
    directory.mkdir(exist_ok=True)
    (directory / "train.py").write_text("print()")
    known: dict[str, Any] = {
        "directory": directory,
        "command": ["train.py"],
        "queue": Queue(name="local_a", root=tmp_path / "queue"),
        "storage": Storage(type="local", endpoint=str(tmp_path), bucket="storage"),
        "python": "3.11",
    }
    return Order(**(known | more))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"command": []}, "nothing to run"),
        ({"command": ["other.py"]}, "holds no other.py"),
        ({"command": ["../train.py"]}, "named as seen from there"),
        ({"command": ["-m"]}, "-m takes"),
        ({"key": "a/b"}, "--experiment"),
        ({"python": "three"}, "pythonver"),
        ({"resources": {"ram": "much"}}, "ram"),
        ({"max_duration": "0s"}, "max_duration"),
        ({"env": {"A": "nul\0"}}, "NUL"),
        ({"captures": [Capture(source="/does/not/exist", tag="a", mutable=False)]}, "no such file"),
        ({"captures": [Capture(source="/a", tag="a", mutable=True)] * 2}, "more than one"),
        ({"captures": [Capture(source="s3://only", tag="a", mutable=False)]}, "refuse"),
        ({"storage": Storage(type="s3", endpoint="http://h:1", bucket="no bucket")}, "bucket"),
    ],
)
def test_refused(tmp_path: Path, more: dict[str, Any], said: str):
    asked = order(tmp_path, **more)
    with pytest.raises(errors.UsageError, match=said):
        submit(asked, Stores(config.S3()), None)  # type: ignore[arg-type]  # it is not even told
    assert not (tmp_path / "queue").exists()
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize(
    "name", ["sqs_a", "ec2_a", "something", "pubsub_x", "rmq_a_response", "local/../x", "local\n"]
)
def test_queues_that_cannot_be_published_to_are_refused(tmp_path: Path, name: str):
    with pytest.raises(errors.UsageError, match="--queue"):
        Queue.named(name, amqp_url=None, root=tmp_path)


def test_a_rabbitmq_queue_needs_its_broker(tmp_path: Path):
    with pytest.raises(errors.UsageError, match="AMQP_URL"):
        Queue.named("rmq_a", amqp_url=None, root=tmp_path)
    queue = Queue.named("rmq_a", amqp_url="amqp://u:secret@h/", root=tmp_path)
    assert "secret" not in repr(queue)
    assert queue.as_member(persistent=True) == {"rmq": "amqp://u:secret@h/", "persistent": True}


@pytest.mark.parametrize("text", ["", "a", ":t", "a:", "a:..", "a:b/c", "a:-x", "dir:workspace"])
def test_captures_are_written_as_path_and_tag(text: str):
    with pytest.raises(errors.UsageError, match="--capture"):
        Capture.parse(text, mutable=True)


def test_an_address_cannot_be_stored_back(tmp_path: Path):
    parsed = Capture.parse("https://h:8/d.csv:data", mutable=False)
    assert (parsed.source, parsed.tag, parsed.is_url) == ("https://h:8/d.csv", "data", True)
    with pytest.raises(errors.UsageError, match="--capture-once"):
        Capture.parse("https://h/d.csv:data", mutable=True)
