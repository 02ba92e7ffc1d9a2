"""Sizes and durations as people write them, and back: "3gb", "2GiB", "1h30m" (INTEROP.md 7.1, 7.2). Pure.

Sizes count as the Go runner's do: SI units are decimal (`3g` = `3gb` = 3 000 000 000), IEC units are binary
(`2GiB` = `2gi` = 2 147 483 648). The old Python worker took all of them as binary; its users get up to 10 % less.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NoReturn

_MAX_BYTES = 2**63 - 1
_MAX_SECS = 9_223_372_036  # what a Go duration holds: 292 years
_MAX_CHARS = 100  # longer texts are no sizes; also bounds the work on hostile ones

_PREFIXES = ["", "k", "m", "g", "t", "p", "e"]
_SIZE_UNITS = {
    **{prefix + tail: 1000**power for power, prefix in enumerate(_PREFIXES) for tail in ("", "b")},
    **{prefix + tail: 1024**power for power, prefix in enumerate(_PREFIXES) if power for tail in ("i", "ib")},
}
_SIZE = re.compile(r"([0-9.,]+)\s*([a-z]*)", re.ASCII)

_DURATION_UNITS = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "\u00b5s": Fraction(1, 10**6),  # micro sign
    "\u03bcs": Fraction(1, 10**6),  # Greek mu
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
    "w": Fraction(7 * 86400),
}
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_PART = re.compile(rf"({_NUMBER})\s*([a-z\u00b5\u03bc]+)\s*", re.ASCII)
_BARE = re.compile(_NUMBER)


def parse_bytes(value: object) -> int:
    """A size in bytes: a number, or a text such as "512mb", "2 GiB", "1,024", "1.5g"; None and "" are 0.

    Fractions of a byte are cut off. Raises ValueError, with a text that names the value and an example, for anything
    else: booleans, negative, NaN and infinite numbers, unknown units, more than 2**63-1 bytes.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return 0
    amount = _number(value)
    if amount is None and isinstance(value, str) and len(value) <= _MAX_CHARS:
        amount = _size_of(value.strip().lower())
    if amount is None or not 0 <= amount <= _MAX_BYTES:
        _refuse(value, "a size", "512mb, 3g, 2GiB")
    return int(amount)


def _size_of(text: str) -> Fraction | None:
    found = _SIZE.fullmatch(text)
    if found is None or found[2] not in _SIZE_UNITS:
        return None
    try:
        amount = Fraction(found[1].replace(",", ""))
    except ValueError:  # "1.2.3", "."
        return None
    return amount * Fraction(_SIZE_UNITS[found[2]])


def parse_duration(value: object) -> float:
    """A duration in seconds: a number of seconds, or a text such as "30", "1h30m", "1h 30m", "250ms", "2d", "-10m".

    Negative ones are allowed: the caller decides. Raises ValueError, with a text that names the value and an example,
    for anything else: None, "", booleans, NaN and infinite numbers, unknown units, more than 292 years.
    """
    amount = _number(value)
    if amount is None and isinstance(value, str) and len(value) <= _MAX_CHARS:
        amount = _duration_of(value.strip().lower())
    if amount is None or abs(amount) > _MAX_SECS:
        _refuse(value, "a duration", "30s, 1h30m, 2d")
    return float(amount)


def _duration_of(text: str) -> Fraction | None:
    sign = -1 if text.startswith("-") else 1
    if text.startswith(("+", "-")):
        text = text[1:]
    if _BARE.fullmatch(text):
        return sign * Fraction(text)
    total, end = Fraction(0), 0
    while end < len(text):
        part = _PART.match(text, end)
        if part is None or part[2] not in _DURATION_UNITS:
            return None
        total += Fraction(part[1]) * _DURATION_UNITS[part[2]]
        end = part.end()
    return sign * total if end else None


def format_bytes(count: int) -> str:
    """For people: "0 B", "512 B", "3 GB", "1.25 TB"; decimal units, at most four digits; `parse_bytes` reads it."""
    if count < 0:
        return f"-{format_bytes(-count)}"
    power, amount = 0, float(count)
    while amount >= 999.95 and power < len(_PREFIXES) - 1:  # noqa: PLR2004 - from here on four digits round up to 1000
        power, amount = power + 1, count / 1000 ** (power + 1)
    digits = f"{amount:.2f}" if amount < 100 else f"{amount:.1f}"  # noqa: PLR2004 - four digits in all
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits} {_PREFIXES[power].upper()}B"


def _number(value: object) -> Fraction | None:
    """A JSON number, exactly; None for everything that is none, or not finite."""
    if isinstance(value, float):
        return Fraction(value) if math.isfinite(value) else None
    return Fraction(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _refuse(value: object, kind: str, examples: str) -> NoReturn:
    if isinstance(value, str):
        shown = repr(value if len(value) <= _MAX_CHARS else value[:_MAX_CHARS] + "...")
    elif isinstance(value, float) or (isinstance(value, int) and abs(value) <= 2 * _MAX_BYTES):
        shown = repr(value)
    else:  # a huge number (its text may be refused by the interpreter), a list, an object: the type says enough
        shown = f"this {type(value).__name__}"
    raise ValueError(f"{shown} is not {kind}; examples: {examples}")
