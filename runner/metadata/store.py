"""The metadata store: one manifest per attempt, from which tools find experiments without access to their data (DESIGN.md 5.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from runner.metadata.document import Subject, timestamp
from runner.metadata.names import Accession, safe_component

if TYPE_CHECKING:
    from collections.abc import Mapping

NO_PROJECT = "_"


def manifest_name(*, project: str | None, key: str, accession: Accession) -> str:
    """Where in the store it lies: `<project>/<key>/<host>-<T>.json`, every part safe as a component of a path."""
    folder = NO_PROJECT if not project else "%5F" if project == NO_PROJECT else safe_component(project)
    return f"{folder}/{safe_component(key)}/{accession}.json"


def manifest(
    subject: Subject,
    accession: Accession,
    *,
    attempt: int,
    status: str,
    reason: str | None,
    started: float,
    stopped: float | None = None,
    exit_code: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """What there is to know of one attempt, one line of JSON. `metadata` are the URIs of its metadata objects.

    `subject.request` has to be redacted already; URIs carry no credentials.
    """
    members: dict[str, Any] = {
        "accession": str(accession),
        "experiment": subject.key,
        "project": subject.project,
        "host": subject.host,
        "attempt": attempt,
        "status": status,
        "reason": reason,
        "exit_code": exit_code,
        "start": timestamp(started),
        "stop": None if stopped is None else timestamp(stopped),
        "artifacts": dict(subject.artifacts),
        "metadata": dict(metadata or {}),
        "request": dict(subject.request),
    }
    return orjson.dumps(members, option=orjson.OPT_APPEND_NEWLINE)
