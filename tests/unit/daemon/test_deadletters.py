from __future__ import annotations

import base64
import json
import os
import stat

import pytest

from runner.daemon import deadletters
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
    for name in ("../../x", "..", "/etc", "a\x00b", "v?h", "x" * 400, "\u00e4" * 255):
        assert add(root, queue=name).parent.parent == root


def test_bytes_that_are_no_text_hide_their_secrets_too():
    body = b"\xff amqp://u:canary@h/ password=canary \xfe"
    shown = letter().as_document(body)["body_base64"]
    assert b"canary" not in base64.b64decode(shown)
    assert base64.b64decode(shown).startswith(b"\xff amqp://")


def test_json_as_only_python_writes_it_is_shown_as_json():
    body = b'{"experiment": {"key": "k", "x": NaN}, "config": {"env": {"MY_AUTH": "canary"}}}'
    assert letter().as_document(body)["body"]["config"] == {"env": {"MY_AUTH": "***"}}


def test_of_a_huge_message_only_the_beginning_is_looked_at():
    for body in (b"a word " * 20_000_000, b"x" * 140_000_000, b'["' + b"a " * 10_000_000 + b'"]'):
        assert len(letter().as_document(body)["body"]) <= deadletters.SHOWN_BYTES


def letter():
    return deadletters.DeadLetter(
        queue="q", account="a", reason="malformed", text="", attempts=0, time="", digest="", results=None
    )


def test_a_disk_that_takes_no_more_keeps_no_remains(tmp_path, monkeypatch):
    add(tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="space"):
        add(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
