from __future__ import annotations

import base64
import json
import stat

from runner.daemon.deadletters import DeadLetters
from runner.queues.base import QueueRef

BODY = json.dumps(
    {
        "experiment": {"key": "k"},
        "config": {"env": {"AWS_SECRET_ACCESS_KEY": "canary"}, "cloud": "amqp://u:canary@h/"},
    }
).encode()


def add(tmp_path, body=BODY, queue="rmq_a"):
    ref = QueueRef(account="amqp://h:5672", name=queue)
    return DeadLetters(tmp_path).add(ref, body, digest="d" * 64, reason="artifact", text="gone", attempts=3)


def test_a_dead_letter_tells_why_and_shows_no_secret(tmp_path):
    path = add(tmp_path)
    document = json.loads(path.read_text())
    assert (document["reason"], document["attempts"], document["queue"]) == ("artifact", 3, "rmq_a")
    assert document["body"]["experiment"] == {"key": "k"}
    assert document["time"].endswith("Z")
    assert "canary" not in path.read_text()


def test_the_original_lies_beside_it_for_nobody_else(tmp_path):
    original = add(tmp_path).with_suffix(".body")
    assert original.read_bytes() == BODY
    assert stat.S_IMODE(original.stat().st_mode) == 0o600


def test_what_is_no_text_is_kept_as_base64(tmp_path):
    document = json.loads(add(tmp_path, body=b"\xff\x00").read_text())
    assert base64.b64decode(document["body_base64"]) == b"\xff\x00"


def test_a_queue_name_never_leaves_the_directory(tmp_path):
    root = tmp_path / "dead-letter"
    for name in ("../../x", "..", "/etc", "a\x00b", "v?h"):
        assert add(root, queue=name).parent.parent == root
