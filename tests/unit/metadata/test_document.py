from __future__ import annotations

import json
import re
import uuid
from typing import Any

import pytest

from runner.metadata import document
from runner.metadata.document import Document, Subject, timestamp
from runner.metadata.names import Accession
from runner.metadata.scrape import Scraper
from runner.metadata.store import manifest, manifest_name

SUBJECT = Subject(
    key="k1",
    project="p1",
    host="h1",
    request={"experiment": {"key": "k1"}},
    artifacts={"output": "s3://h/b/output.tar"},
)
START, STOP = 1540315105.511, 1540315200.0


def read(made: Document) -> Any:
    data = made.to_bytes()
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 1
    assert data.startswith(b"{")
    return json.loads(data)


def running(schema: str = "1.0") -> Document:
    made = Document.begin(SUBJECT, schema=schema)
    made.set_running(started=START, machine={"cpus": 4})
    return made


def test_a_document_of_a_run_that_goes_on_and_ends():
    made = running()
    first = read(made)
    assert first["runner"] == {
        "host": "h1",
        "request": {"experiment": {"key": "k1"}},
        "start": "2018-10-23T17:18:25.511Z",
        "machine": {"cpus": 4},
    }
    assert first["studioml"] == {
        "experiment": "k1",
        "project": "p1",
        "artifacts": {"output": "s3://h/b/output.tar"},
        "status": "running",
    }
    assert first["experiment"] == {}
    assert str(uuid.UUID(first["asset"])) == first["asset"]
    assert made.apply({"experiment": {"loss": 0.5}})
    made.set_final(status="failed", reason="exit", stopped=STOP, exit_code=3, used={"cpu_secs": 2.5})
    last = read(made)
    assert last["runner"]["stop"] == "2018-10-23T17:20:00.000Z"
    assert last["runner"]["used"] == {"cpu_secs": 2.5}
    assert (last["studioml"]["status"], last["studioml"]["reason"], last["studioml"]["exit_code"]) == (
        "failed",
        "exit",
        3,
    )
    assert last["experiment"] == {"loss": 0.5} == made.last
    assert last["asset"] == first["asset"]
    assert read(Document.begin(SUBJECT))["asset"] != first["asset"]


def test_the_later_layout():
    made = running("0.14")
    made.apply({"experiment": {"loss": 0.5}})
    made.set_final(status="completed", reason="exit", stopped=STOP, exit_code=0, used={})
    assert read(made) == {
        "studioml": {
            "experiment": {"key": "k1", "project": "p1"},
            "artifacts": {"output": "s3://h/b/output.tar"},
            "host": "h1",
            "start_time": "2018-10-23T17:18:25.511Z",
            "stop_time": "2018-10-23T17:20:00.000Z",
            "status": "completed",
            "reason": "exit",
            "exit_code": 0,
        },
        "experiment": {"loss": 0.5},
    }


def test_other_schemas_are_refused():
    with pytest.raises(ValueError, match=re.escape("'2.0'; there are 1.0, 0.14")):
        Document.begin(SUBJECT, schema="2.0")


def test_the_scrape_vectors():
    made, scraper = running(), Scraper()
    output = b"""
{"experiment": {"name": "Zaphod", "count": 1}}
noise {"experiment": 3}
{"experiment": {"count": 2, "gone": true}, "other": {"kept": 1}}
[{"op": "replace", "path": "/experiment/name", "value": "Ford"}, {"op": "add", "path": "/experiment/list", "value": []}]
[{"op": "add", "path": "/experiment/list/-", "value": 1}]
{"experiment": {"gone": null}}
[{"op": "remove", "path": "/experiment/none"}]
{"studioml": {"status": "completed"}}
{"studioml": {"note": "mine"}}
[{"op": "test", "path": "/experiment/count", "value": 1}, {"op": "remove", "path": "/experiment/count"}]
[{"a": 1}]
{not json}
{"runner": {"host": "evil"}}
"""
    for directive in scraper.feed(output):
        made.apply(directive)
    result = read(made)
    assert result["experiment"] == {"name": "Ford", "count": 2, "list": [1]}
    assert result["other"] == {"kept": 1}
    assert result["studioml"]["status"] == "running"
    assert result["studioml"]["note"] == "mine"
    assert result["runner"]["host"] == "h1"
    assert made.bad == 5


@pytest.mark.parametrize("directive", [[1, 2], [[]], ["op"], 3, None, "x", [None], [{}]])
def test_what_is_no_directive_is_skipped_and_counted(directive):
    made = running()
    before = read(made)
    assert made.apply(directive) is False
    assert made.bad == 1
    assert read(made) == before


def test_a_workload_cannot_say_how_it_ended():
    made = running()
    assert made.apply({"studioml": {"reason": "fame", "exit_code": 0, "stop_time": "never"}})
    made.set_final(status="failed", reason="signal", stopped=STOP)
    assert (read(made)["studioml"]["reason"], read(made)["studioml"]["exit_code"]) == ("signal", None)


def test_a_document_is_gone_on_with_after_a_restart():
    made = running()
    made.apply({"experiment": {"loss": 0.5}})
    again = Document.load(made.to_bytes(), schema="1.0")
    assert read(again) == read(made)
    again.set_final(status="failed", reason="runner", stopped=STOP)
    assert read(again)["asset"] == read(made)["asset"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"runner": {}, "studioml": {}}',
        b'{"runner": 1, "studioml": {}, "asset": ""}',
        b"\xff",
    ],
)
def test_what_is_no_document_is_not_gone_on_with(data):
    with pytest.raises(ValueError):
        Document.load(data, schema="1.0")


def test_a_document_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(document, "MAX_BYTES", 3_000_000)
    made = running()
    lines = 0
    while made.apply({"experiment": {f"n{lines}": "x" * 100_000}}):
        lines += 1
        assert lines < 100
    assert 25 <= lines <= 30
    assert made.apply({"experiment": {"y": "x" * 100_000}}) is False
    assert made.apply([{"op": "copy", "from": "/experiment", "path": "/again"}]) is False
    assert len(made.to_bytes()) <= 3_000_000
    for _ in range(50):  # what was removed makes room again, after a while
        made.apply({"experiment": {f"n{number}": None for number in range(lines)}})
        made.apply({"noise": "x" * 100_000})
    assert read(made)["noise"]


def test_saying_the_same_thing_again_and_again_fills_nothing(monkeypatch):
    monkeypatch.setattr(document, "MAX_BYTES", 3_000_000)
    made = running()
    for number in range(200):
        assert made.apply({"experiment": {"text": "x" * 100_000, "number": number}})
    assert made.last["number"] == 199


def test_copies_cannot_make_it_explode(monkeypatch):
    monkeypatch.setattr(document, "MAX_BYTES", 3_000_000)
    made = running()
    made.apply({"a": ["x" * 1000]})
    for _ in range(40):
        made.apply([{"op": "copy", "from": "/a", "path": "/a/-"}])
    assert made.bad > 20
    assert len(made.to_bytes()) <= 3_000_000


def test_numbers_that_json_cannot_say_are_null():
    made, scraper = running(), Scraper()
    for directive in scraper.feed(
        b'{"experiment": {"loss": NaN, "best": -Infinity, "n": 123456789012345678901234567890}}\n'
    ):
        assert made.apply(directive)
    assert read(made)["experiment"] == {"loss": None, "best": None, "n": 1.2345678901234568e29}


def test_times_have_milliseconds():
    assert timestamp(0) == "1970-01-01T00:00:00.000Z"
    assert timestamp(1540315105.5119) == "2018-10-23T17:18:25.511Z"


@pytest.mark.parametrize(
    ("project", "key", "name"),
    [
        ("p", "k", "p/k/h1-1r31eq.json"),
        (None, "k", "_/k/h1-1r31eq.json"),
        ("", "k", "_/k/h1-1r31eq.json"),
        ("_", "k", "%5F/k/h1-1r31eq.json"),
        ("..", "../x y", "%2E./%2E.%2Fx%20y/h1-1r31eq.json"),
    ],
)
def test_where_a_manifest_lies(project, key, name):
    assert manifest_name(project=project, key=key, accession=Accession("h1", 1700000000)) == name


def test_what_a_manifest_says():
    data = manifest(
        SUBJECT,
        Accession("h1", 1700000000),
        attempt=2,
        status="running",
        reason=None,
        started=START,
        metadata={"scrape": "s3://h/b/x"},
    )
    assert data.endswith(b"\n")
    assert json.loads(data) == {
        "accession": "h1-1r31eq",
        "experiment": "k1",
        "project": "p1",
        "host": "h1",
        "attempt": 2,
        "status": "running",
        "reason": None,
        "exit_code": None,
        "start": "2018-10-23T17:18:25.511Z",
        "stop": None,
        "artifacts": {"output": "s3://h/b/output.tar"},
        "metadata": {"scrape": "s3://h/b/x"},
        "request": {"experiment": {"key": "k1"}},
    }
