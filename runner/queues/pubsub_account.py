"""What the Pub/Sub backend is told: the account, and its times. Imports nothing of Google's."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from runner.errors import UsageError

if TYPE_CHECKING:
    import pathlib

GOOGLE = "pubsub.googleapis.com"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PubsubAccount:
    """One project, and the key that opens it. Holds no secret: the key stays in its file."""

    label: str  #: for logs and metrics
    project: str  #: the project's id
    key: pathlib.Path | None = None  #: a service account's JSON; needed unless `emulator` is given
    emulator: str = ""  #: host:port that is spoken to in clear and without credentials: $PUBSUB_EMULATOR_HOST
    endpoint: str = GOOGLE  #: host or host:port of the service, reached by TLS; not used with `emulator`

    def __post_init__(self) -> None:
        if not self.project:
            raise UsageError(f"the Pub/Sub account {self.label} has no project")
        if self.key is None and not self.emulator:
            raise UsageError(f"the Pub/Sub account {self.label} has neither a key file nor an emulator")

    @classmethod
    def from_key(cls, key: pathlib.Path, *, label: str = "", emulator: str = "") -> PubsubAccount:
        """The account that a service account's JSON file opens (INTEROP.md 2.6). Reads the file.

        With `emulator`, $PUBSUB_EMULATOR_HOST, only the file's `project_id` counts, as for the StudioML client.
        `label` defaults to `pubsub://<project>`. Raises `UsageError`, which shows nothing of what the file holds.
        """
        try:
            content = json.loads(key.read_bytes())
        except OSError as error:
            raise UsageError(f"{key} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise UsageError(f"{key} is not JSON") from error
        if not isinstance(content, dict) or (content.get("type") != "service_account" and not emulator):
            raise UsageError(f"{key} is not a service account's key")
        project = content.get("project_id")
        if not isinstance(project, str) or not project:
            raise UsageError(f"{key} has no project_id")
        return cls(label=label or f"pubsub://{project}", project=project, key=key, emulator=emulator)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PubsubTimes:
    """How long things may take, in seconds."""

    #: A message is held for so long at a time, and renewed at half of it: an outage of half of it is survived for
    #: certain, and the work of a runner that died is with others after it. Whole seconds, at most 600 (Pub/Sub's limit).
    lease_secs: int = 120
    call_secs: float = 15.0  #: one request
    keepalive_secs: float = 30.0  #: a connection is asked for a sign of life so often, as Google's clients do
