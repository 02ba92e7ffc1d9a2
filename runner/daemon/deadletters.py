"""Messages that will not be tried again, on disk with their reasons (DESIGN.md 5.9)."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime as dt
import os
import secrets
from typing import TYPE_CHECKING, Any

import orjson

from runner import errors
from runner.metadata.names import safe_component
from runner.queues.base import QueueRef
from runner.request import document as reading
from runner.request.redact import redact as redact_request
from runner.telemetry import redact

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: Larger messages are none that could be read; looking for secrets in them would stop the daemon for seconds.
SHOWN_JSON_BYTES = 8 << 20
#: Of what is no JSON so much is shown.
SHOWN_BYTES = 64 << 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """What the message was and why it died. `body` is redacted: the original lies beside it."""

    queue: str
    account: str
    vhost: str = ""
    identity: str | None = None  #: of the account's backend: by what that is called it may not be found again
    reason: str
    text: str
    attempts: int
    time: str
    digest: str
    results: str | None  #: a directory with results that could not be stored

    def as_document(self, body: bytes) -> dict[str, Any]:
        """For the file that people read: `body`, or `body_base64` when it is not UTF-8 text; of what is no JSON the beginning."""
        document: dict[str, Any] = {
            key: value for key, value in dataclasses.asdict(self).items() if value is not None
        }
        try:
            if len(body) > SHOWN_JSON_BYTES:
                raise ValueError("nobody reads that")
            parsed = reading.loads(body)
        except ValueError:
            return document | _beginning(body)
        document["body"] = redact_request(parsed) if isinstance(parsed, dict) else redact.redact_value(parsed)
        return document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A dead letter on disk."""

    id: str  #: its file's name without the ending; times first, so that ids sort by age
    path: Path
    document: dict[str, Any]  #: as `DeadLetter.as_document` made it; redacted

    @property
    def original(self) -> bytes:
        """The message as it came, secrets included. Raises OSError."""
        return self.path.with_suffix(".body").read_bytes()

    @property
    def ref(self) -> QueueRef:
        """The queue that it came from."""
        account, vhost = str(self.document["account"]), str(self.document.get("vhost", ""))
        name = str(self.document["queue"])
        return QueueRef(account=account, vhost=vhost, name=name.removeprefix(f"{vhost}?"))


class DeadLetters:
    """The directory `dead-letter/<queue>/<time>-<id>.json`, each with the original message beside it (mode 0600)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def add(
        self,
        queue: QueueRef,
        body: bytes,
        *,
        digest: str,
        reason: str,
        text: str,
        attempts: int,
        results: Path | None = None,
        identity: str = "",
    ) -> Path:
        """Write it down, durably, before the message is acknowledged; the path of the readable file. Blocking.

        Raises:
            OSError: the disk is full or read-only; then the message must not be acknowledged.
        """
        now = dt.datetime.now(dt.UTC)
        letter = DeadLetter(
            queue=str(queue),
            account=queue.account,
            vhost=queue.vhost,
            identity=identity or None,
            reason=reason,
            text=redact.redact_text(text),
            attempts=attempts,
            time=now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            digest=digest,
            results=str(results) if results else None,
        )
        folder = self.directory / safe_component(str(queue))
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"{now:%Y%m%dT%H%M%S.%f}Z-{secrets.token_hex(4)}"
        shown = orjson.dumps(letter.as_document(body), option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_INDENT_2)
        original, path = folder / f"{name}.body", folder / f"{name}.json"
        try:
            _write(original, body)
            _write(path, shown)
        except OSError:
            original.unlink(missing_ok=True)  # it would be tried again under another name
            raise
        _sync(folder)
        return path

    def entries(self, queue: str | None = None) -> list[Entry]:
        """All of them, or those of one queue, oldest first. Blocking; files that cannot be read are left out."""
        found = _read(self.directory.glob("*/*.json"))
        return [entry for entry in found if queue in {None, entry.document.get("queue")}]

    def find(self, name: str) -> Entry:
        """The one whose id is, begins or ends with `name`. Blocking.

        Raises:
            errors.UsageError: there is none, or more than one.
        """
        paths = self.directory.glob("*/*.json")  # thousands, maybe: only what is meant is read
        found = _read(path for path in paths if path.stem.startswith(name) or path.stem.endswith(name))
        if len(found) != 1 or not name:
            how_many = "no dead letter is" if not found else f"{len(found)} dead letters are"
            raise errors.UsageError(
                f"{how_many} called {name!r} below {self.directory}: `dlq list` names them"
            )
        return found[0]

    def drop(self, entry: Entry) -> None:
        """Remove it, for good. Blocking. Idempotent; raises OSError."""
        entry.path.with_suffix(".body").unlink(missing_ok=True)
        entry.path.unlink(missing_ok=True)


def _read(paths: Iterable[Path]) -> list[Entry]:
    """Those that can be read, oldest first."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError, orjson.JSONDecodeError):
            found.append(Entry(id=path.stem, path=path, document=orjson.loads(path.read_bytes())))
    return sorted(found, key=lambda entry: entry.id)


def _beginning(body: bytes) -> dict[str, str]:
    """What is shown of a message that is no JSON, cut where no word is."""
    cut = body if len(body) <= SHOWN_BYTES else b"".join(body[:SHOWN_BYTES].rpartition(b" ")[:2])
    try:
        return {"body": redact.redact_text(cut.decode())}
    except UnicodeDecodeError:
        shown = redact.redact_text(cut.decode("latin-1"))  # which gives each byte its character
        return {"body_base64": base64.b64encode(shown.encode("latin-1")).decode()}


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123 - a mode at birth
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
