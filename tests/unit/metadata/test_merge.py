from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.metadata.merge import BadDirective, apply_merge, apply_patch, merged

DATA = Path(__file__).parents[2] / "data" / "metadata"
MERGES = json.loads((DATA / "rfc7386.json").read_bytes())
PATCHES = json.loads((DATA / "rfc6902.json").read_bytes())


def document() -> dict[str, Any]:
    return {
        "runner": {"host": "h", "request": {"experiment": {"key": "k"}}},
        "experiment": {"epoch": 1, "list": [1, 2, 3]},
        "studioml": {"status": "running", "artifacts": {"output": "s3://x"}, "log": [{"msg": "Init"}]},
        "asset": "uuid",
        "mine": {"a": {"b": 1}},
    }


@pytest.mark.parametrize("vector", MERGES)
def test_merge_vectors_of_rfc_7386(vector):
    assert merged(copy.deepcopy(vector["original"]), vector["patch"]) == vector["result"]


def test_there_are_as_many_vectors_as_in_the_appendices():
    assert len(MERGES) == 15 + 1  # and the example of section 3
    assert [vector["name"].split()[0] for vector in PATCHES] == [f"A.{number}" for number in range(1, 17)]


@pytest.mark.parametrize("vector", PATCHES, ids=lambda vector: vector["name"])
def test_patch_vectors_of_rfc_6902(vector):
    target = copy.deepcopy(vector["document"])
    if "result" in vector:
        apply_patch(target, vector["patch"], room=1000)
        assert target == vector["result"]
    else:
        with pytest.raises(BadDirective):
            apply_patch(target, vector["patch"], room=1000)
        assert target == vector["document"]


@pytest.mark.parametrize(
    ("directive", "place", "value"),
    [
        ({"experiment": {"epoch": 2, "list": None}}, "experiment", {"epoch": 2}),
        ({"experiment": None}, "experiment", None),
        ({"new": [1]}, "new", [1]),
        ({"studioml": {"extra": 1}}, "studioml", document()["studioml"] | {"extra": 1}),
        (
            {"studioml": {"artifacts": {"more": "s3://y"}}},
            "studioml",
            {**document()["studioml"], "artifacts": {"output": "s3://x", "more": "s3://y"}},
        ),
        ({"studioml": {"status": "running", "none": None}}, "studioml", document()["studioml"]),
        ({}, "mine", {"a": {"b": 1}}),
    ],
)
def test_what_a_line_may_merge(directive, place, value):
    target = document()
    apply_merge(target, directive)
    assert target.get(place) == value
    for name in ("runner", "asset"):
        assert target[name] == document()[name]


@pytest.mark.parametrize(
    "directive",
    [
        {"runner": {"host": "x"}}, {"runner": None}, {"runner": {}}, {"asset": "x"}, {"asset": None}, {"studioml": None}, {"studioml": 3},
        {"studioml": []}, {"studioml": {"status": "completed"}}, {"studioml": {"status": None}}, {"studioml": {"artifacts": None}},
        {"studioml": {"artifacts": {"output": "x"}}}, {"studioml": {"artifacts": {"output": None}}}, {"studioml": {"artifacts": "x"}},
        {"studioml": {"log": []}}, {"studioml": {"status": {"x": 1}}},
    ],
)  # fmt: skip
def test_what_a_line_may_not_merge_is_skipped_whole(directive):
    target = document()
    with pytest.raises(BadDirective):
        apply_merge(target, {"experiment": {"epoch": 99}, **directive})
    assert target == document()


def add(path, value=1):
    return {"op": "add", "path": path, "value": value}


def change(op, path="/mine/x", **rest):
    return {"op": op, "path": path, **rest}


@pytest.mark.parametrize(
    "operation",
    [
        *(add(path) for path in ("/runner", "/runner/x", "/asset", "/asset/x", "/studioml", "/studioml/status", "/studioml/artifacts", "/studioml/artifacts/output")),
        *(change("replace", path, value=1) for path in ("/runner", "/runner/host", "/asset", "/studioml", "/studioml/status", "/studioml/log/0", "/studioml/log/0/msg")),
        *(change("remove", path) for path in ("/runner", "/runner/host", "/asset", "/studioml", "/studioml/status", "/studioml/log/0", "")),
        *(change("move", **{"from": path}) for path in ("/runner", "/runner/host", "/asset", "/studioml", "/studioml/status", "/studioml/log/0", "")),
        *(change("move", path, **{"from": "/mine"}) for path in ("/runner", "/runner/x", "/asset", "/studioml", "/studioml/status")),
        *(change("copy", path, **{"from": "/mine"}) for path in ("/runner", "/runner/x", "/asset", "/studioml", "/studioml/status")),
        change("replace", "", value={"runner": {}}), change("replace", "", value={"asset": "x"}), change("add", "", value={"studioml": {"status": "x"}}),
        change("replace", "", value={"studioml": {"status": None}}), change("replace", "", value={"studioml": []}),
        change("replace", "", value=[]), change("add", "", value=3), change("replace", "", value=None),
        change("copy", "", **{"from": "/experiment/list"}), change("copy", "", **{"from": "/runner/request/none"}), change("move", "", **{"from": "/runner"}),
        change("test", "/experiment/epoch", value=2), change("test", "/no/such", value=2), change("remove", "/no"), change("add", "/no/x", value=1),
        change("add", "/experiment/list/9", value=1), change("add", "/experiment/list/x", value=1), change("remove", "/experiment/list/-"),
        change("move", "/none/x", **{"from": "/mine/a"}), change("move", "/mine/a/b/c", **{"from": "/mine/a"}), change("add", "no-slash", value=1), change("add", "/bad~2", value=1),
        change("add", 3, value=1), change("add"), change("move"), change("copy", **{"from": 3}), change("frobnicate"), change([]), {"path": "/x"}, {"op": "add"},
        1, "text", None, [],
    ],
)  # fmt: skip
def test_a_patch_that_fails_or_must_not_be_changes_nothing(operation):
    for operations in (
        [operation],
        [add("/mine/first"), change("remove", "/mine/a"), add("/experiment/list/0"), operation],
        [operation, add("/mine/x")],
    ):
        target = document()
        with pytest.raises(BadDirective):
            apply_patch(target, copy.deepcopy(operations), room=10_000)
        assert json.dumps(target) == json.dumps(document())


@pytest.mark.parametrize(
    ("operations", "place", "value"),
    [
        ([add("/experiment/list/-", 4)], "experiment", {"epoch": 1, "list": [1, 2, 3, 4]}),
        ([add("/studioml/log/-", {"msg": "x"})], "studioml", {**document()["studioml"], "log": [{"msg": "Init"}, {"msg": "x"}]}),
        ([add("/studioml/new", 1)], "studioml", document()["studioml"] | {"new": 1}),
        ([change("copy", "/mine/was", **{"from": "/studioml/status"})], "mine", {"a": {"b": 1}, "was": "running"}),
        ([change("copy", "/studioml/mine", **{"from": "/mine"})], "studioml", document()["studioml"] | {"mine": {"a": {"b": 1}}}),
        ([change("move", "/studioml/mine", **{"from": "/mine"})], "mine", None),
        ([change("test", "/runner/host", value="h"), change("replace", "/mine", value=7)], "mine", 7),
        ([change("move", "/experiment/list/0", **{"from": "/experiment/list/2"})], "experiment", {"epoch": 1, "list": [3, 1, 2]}),
        ([], "mine", {"a": {"b": 1}}),
    ],
)  # fmt: skip
def test_what_a_patch_may(operations, place, value):
    target = document()
    apply_patch(target, operations, room=10_000)
    assert target.get(place) == value
    for name in ("runner", "asset"):
        assert target[name] == document()[name]


@pytest.mark.parametrize(
    "operation",
    [
        change("replace", "", value={"new": 1, "studioml": {"extra": 2}}),
        change("add", "", value={"new": 1, "studioml": {"status": "running", "extra": 2}}),
        change("copy", "", **{"from": "/experiment/whole"}),
        change("move", "", **{"from": "/experiment/whole"}),
    ],
)
def test_replacing_the_whole_keeps_the_runners_roots(operation):
    target = document()
    target["experiment"]["whole"] = {"new": 1, "studioml": {"extra": 2}}
    apply_patch(target, [operation], room=10_000)
    wanted = {name: document()[name] for name in ("runner", "asset", "studioml")}
    wanted["studioml"]["extra"] = 2
    assert target == {**wanted, "new": 1}
    before = copy.deepcopy(target)
    with pytest.raises(BadDirective):
        apply_patch(
            target,
            [change("replace", "", value={"studioml": {"artifacts": {"z": 1}}}), change("remove", "/none")],
            room=10_000,
        )
    assert target == before


def test_copies_have_to_fit_the_room():
    target: dict[str, Any] = {"a": ["x" * 1000]}
    bomb = [change("copy", "/a/-", **{"from": "/a"}) for _ in range(60)]
    with pytest.raises(BadDirective, match="too large"):
        apply_patch(target, bomb, room=1_000_000)
    assert target == {"a": ["x" * 1000]}
    assert apply_patch(target, bomb[:3], room=1_000_000) == pytest.approx(7_000, rel=0.1)


@pytest.mark.parametrize("op", ["move", "copy"])
def test_nothing_gets_deeper_than_can_be_written(op):
    target: dict[str, Any] = {"a": {}}
    deeper = [add("/b", {}), change(op, "/b/x", **{"from": "/a"}), change("copy", "/a", **{"from": "/b"})]
    refused = []
    for _ in range(200):
        try:
            apply_patch(target, copy.deepcopy(deeper), room=10_000)
        except BadDirective as bad:
            refused.append(str(bad))
    assert set(refused) == {"the document would become too deep"}
    assert json.dumps(target).count("{") <= 202


JSON = st.recursive(st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "status", "log", "runner", "asset", "studioml", "experiment", "host"]), inner, max_size=3), max_leaves=6)  # fmt: skip
POINTERS = st.lists(st.sampled_from(["runner", "asset", "studioml", "experiment", "mine", "status", "log", "list", "a", "b", "0", "-", "host", "artifacts"]), max_size=3).map(lambda parts: "".join("/" + part for part in parts))  # fmt: skip
OPERATIONS = st.fixed_dictionaries({"op": st.sampled_from(["add", "remove", "replace", "move", "copy", "test"]), "path": POINTERS, "from": POINTERS, "value": JSON})  # fmt: skip


@given(st.lists(st.one_of(JSON, st.lists(OPERATIONS | JSON, max_size=4)), max_size=5))
def test_no_directive_touches_what_is_the_runners(directives):
    target = document()
    for directive in directives:
        before = json.dumps(target)
        try:
            if isinstance(directive, dict):
                apply_merge(target, directive)
            elif isinstance(directive, list):
                apply_patch(target, copy.deepcopy(directive), room=10_000)
        except BadDirective:
            assert json.dumps(target) == before
    assert target["runner"] == document()["runner"]
    assert target["asset"] == "uuid"
    assert target["studioml"]["status"] == "running"
    assert target["studioml"]["artifacts"]["output"] == "s3://x"
    assert {"msg": "Init"} in target["studioml"]["log"]
