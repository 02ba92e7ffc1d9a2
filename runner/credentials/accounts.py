"""What a file of credentials says, as values. None of them shows a secret."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import re
    from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rabbitmq:
    """A broker's URL."""

    label: str  #: unique among the accounts of a daemon, the same after a restart
    url: str = dataclasses.field(repr=False)
    management_url: str | None = dataclasses.field(default=None, repr=False)
    match: re.Pattern[str] | None = None  #: of this account's queues only those; beside --queue-match
    mismatch: re.Pattern[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sqs:
    """AWS's `credentials` and `config`, side by side; or AWS's own chain of ambient credentials."""

    label: str
    directory: Path | None  #: None: the ambient chain
    region: str = ""  #: empty: what the files say
    content: str = ""  #: a digest of both files: the value changes when they do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pubsub:
    """A service account's key file."""

    label: str
    key: Path
    content: str = ""  #: a digest of the file


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueueDirectory:
    """A directory whose sub-directories are queues."""

    label: str
    root: Path


Account: TypeAlias = Rabbitmq | Sqs | Pubsub | QueueDirectory
