"""What a directory of credentials holds. Content decides what a file is, never its name; blocking, small, bounded.

========================================  =========================================================
`credentials` and `config` side by side   an AWS account: SQS (here, or in a directory below)
a service account's JSON                  a Google project: Pub/Sub
`amqp://...` or `amqps://...`             a broker: RabbitMQ; or YAML with `url`, `management_url`,
                                          `match` and `mismatch`
an absolute path                          a directory of queues
========================================  =========================================================

Names with a leading dot are left out: editors' files, and the `..data` links of Kubernetes, whose targets are what the visible
names lead to.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import errors
from runner.credentials.accounts import Account, Pubsub, QueueDirectory, Rabbitmq, Sqs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: No credentials are larger.
MAX_BYTES = 64 * 1024
#: No operator has more accounts; a home directory named by mistake does.
MAX_ENTRIES = 1000
_AWS = ("credentials", "config")
_PAIR = "aws"  #: what these two are called where they lie beside the others
#: What parsers raise beside their own errors: a date that is none, digits without end, nesting without end.
_UNREADABLE = (ValueError, OverflowError, RecursionError)
_MEMBERS = frozenset({"url", "management_url", "match", "mismatch"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A directory at one moment."""

    accounts: Mapping[str, Account]  #: by label: the name of the file or folder
    problems: Mapping[str, str]  #: name -> why it cannot be used; no secrets


def scan(directory: Path, prefix: str = "") -> Found:
    """All accounts of a directory, each labelled with `prefix` and its name. One that cannot be read or parsed is a problem, and the others go on.

    Raises:
        errors.UsageError: the directory itself cannot be read, or is none of credentials.
    """
    try:
        names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as exc:
        raise errors.UsageError(f"{directory}: cannot be read: {exc.strerror}") from exc
    if len(names) > MAX_ENTRIES:
        raise errors.UsageError(f"{directory}: {len(names)} entries: that is no directory of credentials")
    accounts: dict[str, Account] = {}
    problems: dict[str, str] = {}
    folders: dict[str, Callable[[str], Account]] = {}
    if all(name in names for name in _AWS):
        names = [name for name in names if name not in _AWS]
        folders[_PAIR] = functools.partial(_aws, directory)
    for name in names:
        if not name.isprintable():
            problems[f"{prefix}{name!a}"] = "has a name that logs and pages cannot show: rename it"
        elif name in folders:
            problems[f"{prefix}{name}/"] = (
                "has the name of the pair `credentials` and `config` beside it: rename it"
            )
        else:
            folders[name] = functools.partial(_account, directory / name)
    for name, read in folders.items():
        label = f"{prefix}{name}"
        try:
            accounts[label] = read(label)
        except OSError as exc:
            problems[label] = f"cannot be read: {exc.strerror}"
        except errors.UsageError as exc:
            problems[label] = str(exc)
    return Found(accounts=accounts, problems=problems)


def _account(path: Path, label: str) -> Account:
    if path.is_dir():
        return _aws(path, label)
    data = _read(path)
    try:
        text = data.decode().strip()
    except UnicodeDecodeError as exc:
        raise errors.UsageError(
            "is no text: a URL, a service account's JSON, YAML or a path is expected"
        ) from exc
    if text.startswith("{"):
        return _google(path, label, text, data)
    if text.startswith(("amqp://", "amqps://")):
        return Rabbitmq(label=label, url=_one_line(text))
    if text.startswith("/"):
        return QueueDirectory(label=label, root=Path(_one_line(text)))
    return _yaml(label, text)


def _aws(folder: Path, label: str) -> Sqs:
    missing = [name for name in _AWS if not (folder / name).is_file()]
    if missing:
        raise errors.UsageError(
            f"is a folder without the file {missing[0]!r}: AWS needs `credentials` and `config` side by side"
        )
    digest = hashlib.sha256(b"\0".join(_read(folder / name) for name in _AWS)).hexdigest()
    return Sqs(label=label, directory=folder, content=digest)


def _google(path: Path, label: str, text: str, data: bytes) -> Pubsub:
    try:
        key = json.loads(text)
    except _UNREADABLE as exc:
        raise errors.UsageError("looks like JSON, and is not") from exc
    if not isinstance(key, dict) or key.get("type") != "service_account" or not key.get("project_id"):
        raise errors.UsageError("is JSON, but no service account's key: `type` and `project_id` are expected")
    return Pubsub(label=label, key=path, content=hashlib.sha256(data).hexdigest())


def _yaml(label: str, text: str) -> Rabbitmq:
    import yaml  # needed by few, and not at the start

    try:
        members = yaml.safe_load(text)
    except (yaml.YAMLError, *_UNREADABLE) as exc:
        raise errors.UsageError(
            "is neither a URL, nor a service account's JSON, nor YAML, nor an absolute path"
        ) from exc
    if not isinstance(members, dict) or not isinstance(members.get("url"), str):
        raise errors.UsageError(
            "is neither a URL, nor a service account's JSON, nor YAML with `url`, nor an absolute path"
        )
    if unknown := sorted(str(name) for name in members if name not in _MEMBERS):
        raise errors.UsageError(f"has {unknown[0]!r}; there are {', '.join(sorted(_MEMBERS))}")
    if not members["url"].startswith(("amqp://", "amqps://")):
        raise errors.UsageError("has a `url` that is no amqp:// or amqps:// URL")
    if not isinstance(members.get("management_url"), str | None):
        raise errors.UsageError("has a `management_url` that is no text")
    return Rabbitmq(
        label=label,
        url=members["url"],
        management_url=members.get("management_url"),
        match=_pattern("match", members),
        mismatch=_pattern("mismatch", members),
    )


def _pattern(name: str, members: dict[str, Any]) -> re.Pattern[str] | None:
    if members.get(name) is None:
        return None
    try:
        return re.compile(str(members[name]))
    except (re.error, *_UNREADABLE) as exc:
        raise errors.UsageError(f"has a `{name}` that is no regular expression: {exc}") from exc


def _one_line(text: str) -> str:
    if len(text.splitlines()) != 1:
        raise errors.UsageError("has more than one line; one URL or path is expected")
    if "\0" in text:
        raise errors.UsageError("has a NUL in it; one URL or path is expected")
    return text


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise errors.UsageError("is no file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise errors.UsageError("is larger than any credentials")
    return data
