"""Messages that will not be tried again, on disk with their reasons (DESIGN.md 5.9)."""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import os
import re
import secrets
from typing import TYPE_CHECKING, Any

import orjson

from runner.request.redact import redact as redact_request
from runner.telemetry import redact

if TYPE_CHECKING:
    from pathlib import Path

    from runner.queues.base import QueueRef

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """What the message was and why it died. `body` is redacted: the original lies beside it."""

    queue: str
    account: str
    reason: str
    text: str
    attempts: int
    time: str
    digest: str
    results: str | None  #: a directory with results that could not be stored

    def as_document(self, body: bytes) -> dict[str, Any]:
        """For the file that people read: `body`, or `body_base64` when it is not UTF-8 text."""
        document: dict[str, Any] = {
            key: value for key, value in dataclasses.asdict(self).items() if value is not None
        }
        try:
            parsed = orjson.loads(body)
            document["body"] = (
                redact_request(parsed) if isinstance(parsed, dict) else redact.redact_value(parsed)
            )
        except orjson.JSONDecodeError:
            try:
                document["body"] = redact.redact_text(body.decode())
            except UnicodeDecodeError:
                document["body_base64"] = base64.b64encode(body).decode()
        return document


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
    ) -> Path:
        """Write it down, durably, before the message is acknowledged; the path of the readable file. Blocking.

        Raises:
            OSError: the disk is full or read-only; then the message must not be acknowledged.
        """
        now = dt.datetime.now(dt.UTC)
        letter = DeadLetter(
            queue=str(queue),
            account=queue.account,
            reason=reason,
            text=redact.redact_text(text),
            attempts=attempts,
            time=now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            digest=digest,
            results=str(results) if results else None,
        )
        folder = self.directory / (_UNSAFE.sub("_", str(queue)).strip(".") or "_")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"{now:%Y%m%dT%H%M%S.%f}Z-{secrets.token_hex(4)}"
        _write(folder / f"{name}.body", body)
        path = folder / f"{name}.json"
        _write(
            path,
            orjson.dumps(letter.as_document(body), option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_INDENT_2),
        )
        _sync(folder)
        return path


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123 - a mode at birth
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _sync(folder: Path) -> None:
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
