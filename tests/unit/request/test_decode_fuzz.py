from __future__ import annotations

import json
import os

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner import errors
from runner.request.decode import decode
from runner.request.model import Request
from runner.request.redact import redact
from tests.unit.request.messages import CAPTURED, EXAMPLES

BODIES = [path.read_bytes() for path in [*CAPTURED, *EXAMPLES]]
TREES = [json.loads(body) for body in BODIES]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(codec=None, categories=None)),
    st.sampled_from(["", "none", "\0", "3g", "-1", "1e999", "\ud800", "$X", "..", 10**400, -(2**70)]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def check(body):
    """Any bytes give a request that the rest of the program can use, or a typed refusal."""
    try:
        request = decode(body)
    except (errors.MalformedMessage, errors.UnsupportedRequest, errors.NoKey):
        return None
    assert isinstance(request, Request)
    texts = [request.filename or "x", *request.args, *request.env, *request.env.values()]
    texts += [artifact.tag for artifact in request.artifacts]
    assert all("\0" not in text and os.fsencode(text) is not None for text in texts)
    orjson.dumps(redact(request.raw))
    return request


@given(st.binary())
def test_any_bytes(body):
    check(body)


@given(VALUES)
def test_any_json(value):
    check(json.dumps(value).encode())


@given(
    st.dictionaries(st.sampled_from(list(TREES[0]["experiment"])), VALUES),
    st.dictionaries(st.sampled_from([*TREES[0]["config"], "pip"]), VALUES),
)
def test_known_members_with_any_values(experiment, config):
    check(json.dumps({"experiment": {"key": "k", "filename": "f", **experiment}, "config": config}).encode())


@given(st.sampled_from(BODIES), st.data())
def test_real_messages_with_bytes_changed(body, data):
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, min(len(body), start + 50)))
    check(body[:start] + data.draw(st.binary(max_size=20)) + body[end:])


def places(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, member in items:
        yield from places(member, (*path, name))


@given(st.data())
def test_real_messages_with_any_member_replaced(data):
    tree = data.draw(st.sampled_from(TREES))
    path = data.draw(st.sampled_from([path for path in places(tree) if path and "pythonenv" not in path]))
    changed = json.loads(json.dumps(tree))
    parent = changed
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = data.draw(VALUES)
    check(json.dumps(changed).encode())


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree["experiment"]["key"])
def test_no_single_unused_member_matters(tree):
    for section, member in [(part, name) for part in tree for name in tree[part]]:
        if member in ("key", "filename"):
            continue
        changed = json.loads(json.dumps(tree))
        del changed[section][member]
        assert check(json.dumps(changed).encode())
