from __future__ import annotations

import json
import math
from typing import Any

import orjson
import pytest

from runner import errors
from tests.unit.request.messages import decode, message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"), (b"{", "not JSON"), (b"hello", "not JSON"), (b"null", "not an object"), (b"[]", "not an object"),
        (b'"x"', "not an object"), (b"3", "not an object"), (b"{}", "experiment is null"), (b'{"experiment": []}', "experiment is a list"),
        (b"\xff\xfe{\x00}\x00", "UTF-16"), ('{"experiment":{}}'.encode("utf-16-le"), "UTF-16"), (b"\x00\x00\x00{", "UTF-16"),
        (b'{"experiment": "\xff"}', "not UTF-8"), (b"1" * 5000, "not JSON"), (b"[" * 100_000, "nested"),
        (b'{"experiment":' * 200 + b"{}" + b"}" * 200, "nested"),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused_with_its_reason(body, words):
    with pytest.raises(errors.MalformedMessage, match=words):
        decode(body)


def test_a_message_may_have_a_certain_size_and_no_more():
    body = json.dumps(message()).encode()
    assert decode(body, max_bytes=len(body)).key == "k1"
    with pytest.raises(errors.MalformedMessage, match="at most"):
        decode(body, max_bytes=len(body) - 1)


def test_what_pythons_writer_makes_is_read():
    body = json.dumps(
        message({"info": {"loss": math.nan, "best": math.inf}, "project": "half \ud800 a pair", "n": 10**30})
    )
    request = decode(body.encode())
    assert request.project.startswith("half \ufffd")
    assert math.isnan(request.raw["experiment"]["info"]["loss"])
    assert orjson.loads(orjson.dumps(request.raw))["experiment"]["n"] == 1e30


def test_a_byte_order_mark_is_passed_over():
    assert decode(b"\xef\xbb\xbf" + json.dumps(message()).encode()).key == "k1"


def test_of_equal_names_the_last_wins():
    assert decode(b'{"experiment": {"key": "a", "filename": "f", "key": "b"}}').key == "b"


def test_nesting_as_deep_as_allowed_is_read_and_writable():
    info: list[Any] = []
    for _ in range(96):
        info = [info]
    request = decode(json.dumps(message({"info": info})).encode())
    assert orjson.dumps(request.raw)
    with pytest.raises(errors.MalformedMessage, match="nested more than 100 levels"):
        decode(json.dumps(message({"info": [[info]]})).encode())
