"""Messages for the tests of this room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import runner.request.decode

DATA = Path(__file__).parents[2] / "data"
EXAMPLES = sorted((DATA / "requests").glob("example-*.json"))
CAPTURED = [path for path in sorted((DATA / "captured").glob("*.json")) if path.name.count(".") == 1]


def example(letter: str) -> Any:
    return json.loads((DATA / "requests" / f"example-{letter}.json").read_bytes())


def message(experiment: dict[str, Any] | None = None, config: Any = None) -> dict[str, Any]:
    """A small request with changes; a member set to ... is left out."""
    members = {"key": "k1", "filename": "main.py"} | (experiment or {})
    return {
        "experiment": {name: value for name, value in members.items() if value is not ...},
        "config": config,
    }


def decode(body: bytes, **limits: Any) -> Any:
    """As the real one, but untyped: tests know what is there."""
    return runner.request.decode.decode(body, **limits)


def decoded(experiment: dict[str, Any] | None = None, config: Any = None) -> Any:
    return decode(json.dumps(message(experiment, config)).encode())
