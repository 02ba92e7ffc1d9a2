from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from runner import errors
from runner.credentials import directory, watch
from runner.credentials.accounts import Pubsub, QueueDirectory, Rabbitmq, Sqs

if TYPE_CHECKING:
    from pathlib import Path

KEY = {"type": "service_account", "project_id": "p1", "private_key": "canary"}
URL = "amqp://user:canary@h/"


def aws(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "credentials").write_text("[default]\naws_access_key_id=A\naws_secret_access_key=canary\n")
    (folder / "config").write_text("[default]\nregion=us-east-1\n")


def test_each_kind_of_file_opens_its_kind_of_account(tmp_path):
    (tmp_path / "google.json").write_text(json.dumps(KEY))
    (tmp_path / "broker").write_text(f"{URL}\n")
    (tmp_path / "broker.yaml").write_text(
        f"url: {URL}\nmanagement_url: http://h:1\nmatch: ^rmq_a\nmismatch: b$\n"
    )
    (tmp_path / "shared").write_text("/mnt/queues\n")
    aws(tmp_path / "amazon")
    aws(tmp_path)
    (tmp_path / ".hidden").write_text("amqp://")
    found = directory.scan(tmp_path, "x/")
    assert not found.problems
    kinds = {label: type(account) for label, account in found.accounts.items()}
    assert kinds == {
        "x/aws": Sqs, "x/amazon": Sqs, "x/broker": Rabbitmq, "x/broker.yaml": Rabbitmq, "x/google.json": Pubsub,
        "x/shared": QueueDirectory,
    }  # fmt: skip
    broker = found.accounts["x/broker.yaml"]
    assert isinstance(broker, Rabbitmq)
    assert broker.url == URL
    assert broker.management_url == "http://h:1"
    assert broker.match
    assert broker.match.pattern == "^rmq_a"
    assert "canary" not in repr(found)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe", "no text"),
        (b"{", "looks like JSON"),
        (b'{"type": "authorized_user"}', "no service account"),
        (b"amqp://a/\namqp://b/", "more than one line"),
        (b"url: http://h", "no amqp"),
        (b"url: amqp://h\nuser: x", "'user'"),
        (b"url: amqp://h\nmatch: '('", "no regular expression"),
        (b"just words", "neither"),
        (b"a: [", "neither"),
        (b"/mnt/a\0b", "NUL"),
        # What parsers raise beside their own errors; the daemon would end with it.
        (b"2024-13-45", "neither"),
        (b"!!int 'x'", "neither"),
        (b"[" * 500 + b"]" * 500, "neither"),
        (b'{"a":' * 10000, "looks like JSON"),
        (b"url: amqp://h\nmatch: 'a{99999999999999999999}'", "no regular expression"),
        (b"url: amqp://h\nmatch: '" + b"(" * 5000 + b"'", "no regular expression"),
        (b"x" * 70000, "larger"),
        (b"", "neither"),
    ],
)
def test_what_is_none_of_them_is_named_and_the_others_go_on(tmp_path, content, why):
    (tmp_path / "bad").write_bytes(content)
    (tmp_path / "good").write_text(URL)
    found = directory.scan(tmp_path)
    assert list(found.accounts) == ["good"]
    assert why in found.problems["bad"]
    assert "canary" not in found.problems["bad"]


def test_folders_and_oddities_never_crash(tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "credentials").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "caf\udce9").write_text(URL)  # a name in another encoding: no page could show it
    found = directory.scan(tmp_path)
    assert not found.accounts
    assert "'config'" in found.problems["half"]
    assert set(found.problems) == {"half", "dangling", "fifo", "'caf\\udce9'"}
    with pytest.raises(errors.UsageError, match="cannot be read"):
        directory.scan(tmp_path / "missing")


def test_a_folder_does_not_hide_the_pair_whose_name_it_has(tmp_path):
    aws(tmp_path)
    aws(tmp_path / "aws")
    found = directory.scan(tmp_path)
    assert isinstance(account := found.accounts["aws"], Sqs)
    assert account.directory == tmp_path
    assert "rename it" in found.problems["aws/"]


async def test_what_appears_changes_and_disappears_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "LOOK_SECS", 0.01)
    (tmp_path / "a").write_text(URL)
    (tmp_path / "b").write_text("/mnt/queues")
    events = watch.Watch(tmp_path).events()
    first = {(await anext(events)).account.label for _ in range(2)}  # type: ignore[union-attr]
    assert first == {"a", "b"}
    (tmp_path / "a").write_text("amqp://other/")
    assert isinstance(await anext(events), watch.Changed)
    (tmp_path / "b").unlink()
    assert await anext(events) == watch.Removed(label="b")
    await events.aclose()  # type: ignore[attr-defined]


async def test_the_swap_of_kubernetes_links_and_a_damaged_file(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "LOOK_SECS", 0.01)
    for version, url in (("..1", URL), ("..2", "amqp://new/")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "broker").write_text(url)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "broker").symlink_to("..data/broker")
    looking = watch.Watch(tmp_path)
    events = looking.events()
    await anext(events)
    (tmp_path / "..tmp").symlink_to("..2")
    (tmp_path / "..tmp").rename(tmp_path / "..data")
    changed = await anext(events)
    assert isinstance(changed, watch.Changed)
    assert isinstance(changed.account, Rabbitmq)
    assert changed.account.url == "amqp://new/"
    # Nobody removes an account by damaging its file: it stays as it was, and the damage is told.
    (tmp_path / "..2" / "broker").write_text("half-writ")
    (tmp_path / "other").write_text("/mnt/queues")
    added = await anext(events)
    assert isinstance(added, watch.Added)
    assert "broker" in looking.problems
    await events.aclose()  # type: ignore[attr-defined]
