"""What a check of `doctor` says."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

Verdict: TypeAlias = Literal["ok", "warning", "problem"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    subject: str  #: what: "python", "account amqp://host:5672", ...
    verdict: Verdict
    text: str  #: what was found; no secrets
    advice: str = ""  #: what to do, where there is something to do
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  #: the same for programs

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return dataclasses.asdict(self)


def unusable(subject: str, why: str) -> Finding:
    """Something of the operator's that is wrong as it is."""
    return Finding(subject=subject, verdict="problem", text=why, advice="correct or remove it")
