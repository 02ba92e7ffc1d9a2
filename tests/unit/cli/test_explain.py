"""What `explain` makes of the daemon's answer (which tests/integration/test_explained.py and the end-to-end tests ask for)."""

from __future__ import annotations

import types
from typing import Any

import pytest

from runner.cli import explain, where

QUEUE = {
    "queue": "rmq_a", "account": "amqp://h", "running": 0, "closed_because": None, "parked": None, "trouble": None
}  # fmt: skip
ANSWER: dict[str, Any] = {"queues": [], "accounts": [], "credentials": {}, "why": None}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"queues": [QUEUE]}, ["rmq_a (amqp://h): open, waiting for its next message"]),
        (
            {"queues": [QUEUE | {"running": 2, "closed_because": "the runner is draining"}]},
            ["rmq_a (amqp://h): 2 running; no more is taken: the runner is draining"],
        ),
        (
            {
                "queues": [
                    QUEUE | {"parked": "1 message is parked", "trouble": "connection refused (for 7 s)"}
                ]
            },
            [
                "rmq_a (amqp://h): 1 message is parked; open, but nothing can come: connection refused (for 7 s)",
            ],
        ),
        (
            {
                "why": "no account has a queue of that name",
                "credentials": {"broker.yaml": "has 'user'"},
                "accounts": [
                    {
                        "account": "a",
                        "error": "it does not answer",
                        "unavailable_since": "2026-01-02T03:04:05Z",
                    },
                    {"account": "b", "error": None, "unavailable_since": None},
                ],
            },
            [
                "rmq_a: no account has a queue of that name",
                "credentials broker.yaml cannot be used: has 'user'",
                "account a does not answer since 2026-01-02T03:04:05Z: it does not answer",
            ],
        ),
        ({}, ["no queue is served"]),
    ],
)
def test_it_says_why_nothing_runs(monkeypatch, capsys, answer: dict[str, Any], told: list[str]):
    daemon = types.SimpleNamespace(get_json=lambda _: ANSWER | answer)
    monkeypatch.setattr(where, "daemon", lambda *_: daemon)
    explain.explain("rmq_a", address="h:1", token=None)
    assert capsys.readouterr().out.splitlines() == told
