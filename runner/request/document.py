"""Bytes -> a JSON object that the rest of the program can walk, copy and write again without surprises."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson

from runner import errors, units

MAX_DEPTH = 100  # real messages have six levels; orjson writes at most 254
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
_FLOAT_BITS = 1023
_UTF8_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")


def parse(body: bytes, *, max_bytes: int) -> dict[str, Any]:
    """The object in `body`: JSON in UTF-8, as `loads` reads it; of equal names the last wins.

    Raises errors.MalformedMessage for anything else.
    """
    if len(body) > max_bytes:
        size, most = units.format_bytes(len(body)), units.format_bytes(max_bytes)
        raise errors.MalformedMessage(f"the message is {size}; at most {most} are accepted")
    body = body.removeprefix(_UTF8_BOM)
    if body.startswith(_WIDE_BOMS) or b"\0" in body[:2]:
        raise errors.MalformedMessage("the message is not UTF-8 but looks like UTF-16 or UTF-32")
    try:
        parsed = loads(body)
    except UnicodeDecodeError as bad:
        raise errors.MalformedMessage(f"the message is not UTF-8: byte {bad.start} is {bad.reason}") from bad
    except ValueError as bad:
        raise errors.MalformedMessage(f"the message is not JSON that can be used: {bad}") from bad
    if not isinstance(parsed, dict):
        raise errors.MalformedMessage(f"the message is JSON, but not an object ({type(parsed).__name__})")
    return parsed


def loads(text: bytes) -> Any:
    """JSON, also as Python's own writer makes it: NaN, Infinity, halves of surrogate pairs, long integers.

    What comes back can be written by any JSON writer: halves of surrogate pairs are U+FFFD, integers beyond 64 bits are
    floats. Raises ValueError (UnicodeDecodeError where that is why) for anything else, and for more than `MAX_DEPTH` levels.
    """
    try:
        parsed, plain = orjson.loads(text), True
    except orjson.JSONDecodeError:
        parsed, plain = _loads_slowly(text), False
    if len(text) > 2 * MAX_DEPTH and text.count(b"{") + text.count(b"[") > MAX_DEPTH and _is_too_deep(parsed):
        raise ValueError(_TOO_DEEP)
    return parsed if plain else _writable(parsed)


def _loads_slowly(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except RecursionError as bad:
        raise ValueError(_TOO_DEEP) from bad


def _is_too_deep(parsed: Any) -> bool:
    level, depth = [parsed], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            return True
        level = [inner for outer in level for inner in _members(outer) if isinstance(inner, dict | list)]
    return False


def _members(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _writable(parsed: Any) -> Any:
    """A copy that any JSON writer takes: U+FFFD for halves of surrogate pairs, a float for integers beyond 64 bits.

    `parsed` is as deep as `MAX_DEPTH` at most.
    """
    match parsed:
        case dict():
            return {_writable(name): _writable(value) for name, value in parsed.items()}
        case list():
            return [_writable(value) for value in parsed]
        case str():
            return parsed.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case int() if abs(parsed) >> 63 and not isinstance(parsed, bool):
            return math.inf if parsed.bit_length() > _FLOAT_BITS else float(parsed)
    return parsed
