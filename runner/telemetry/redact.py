"""Takes secrets out of whatever leaves the runner: log lines, metrics, pages, documents, dead letters (DESIGN.md rule 9).

Three ways to know a secret: the shape of a text (`redact_text`), the name of a key (`redact_value`), and its
literal value, learned from a message while that message's experiment runs (`secrets`).
Where in doubt it redacts: a word too many costs a reader a moment, a word too few costs a password.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MARK = "***"

#: Shorter values are not searched for: they would occur in ordinary words.
MIN_LITERAL = 6
#: Deeper nesting than any document of ours; what lies below is replaced as a whole.
_MAX_DEPTH = 100
#: Longer texts are no names and do not come again.
_REMEMBERED = 256

_NAMES = r"secret|pass(?:word|wd|phrase|code)|token(?!iz)|access[_-]?key|api[_-]?key|private[_-]?key|_pwd\b|_pass\b"
_SECRET_NAME = re.compile(rf"{_NAMES}|credential|^authorization$|^(?-i:[A-Z][A-Z0-9_]*_KEY)$", re.IGNORECASE)
_SECRET_FLAG = re.compile(rf"^--?[\w-]*(?:{_NAMES})[\w-]*$", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d[\d.,_]*(?:e[-+]?\d+)?[)\]},;]*", re.IGNORECASE)

#: None of the patterns can match a text without one of these; looking for them is many times faster.
_HINTS = (
    *("://", "secret", "pass", "token", "access", "api", "private", "_pwd"),
    *("auth", "bearer", "sig", "credential", "_key"),
)

# Repetitions are bounded: the patterns stay linear on hostile input.
_USER_INFO = re.compile(
    r"""://(?:
          [^\s/:@"'<>]{0,1024}:(?!\d{1,5}[/?\#])[^\s"'<>]{0,2048}@   # user:password, also one with a slash or an @
        | (?<=http://)[^\s/@"'<>]{1,2048}@ | (?<=https://)[^\s/@"'<>]{1,2048}@  # a token alone
    )""",
    re.VERBOSE,
)
_VALUE = (
    r"""(?:"(?:[^"\\]|\\.){0,16384}"?|\\{1,3}".{0,16384}?\\{1,3}"|'(?:[^'\\]|\\.){0,16384}'?|[^\s&"']+)"""
)
_ASSIGNMENT = re.compile(
    rf"""((?:{_NAMES}|(?-i:\b[A-Z][A-Z0-9_]{{0,64}}_KEY(?==)))[\w.-]{{0,64}}\\{{0,3}}["']?[ \t]{{0,4}}(?:=>|[=:])[ \t]{{0,4}})({_VALUE})""",
    re.IGNORECASE | re.DOTALL,
)
_FLAG = re.compile(
    rf"""((?<![\w-])--?[\w-]{{0,64}}?(?:{_NAMES})[\w-]{{0,64}}[ \t]{{1,4}})({_VALUE})""", re.IGNORECASE
)
_AUTHORIZATION = re.compile(
    r"""(authorization\\{0,3}["']?\s{0,4}[:=]\s{0,4}\\{0,3}["']?)[^\r\n"'\\]+""", re.IGNORECASE
)
_BEARER = re.compile(r"(\bbearer\s{1,4})[\w.~+/=-]{6,}", re.IGNORECASE)
_SIGNED = re.compile(r"""([?&;](?:[\w-]{0,32}(?:signature|credential)|sig)=)[^&\s"'<>]+""", re.IGNORECASE)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----(?:[^-]|-(?!----)){0,20000}(?:-----END [A-Z ]{0,40}-----)?"
)


class Secrets:
    """Literal values that are secret for the time being, counted: two experiments may share one. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._pattern: re.Pattern[str] | None = None

    @contextlib.contextmanager
    def known(self, values: Iterable[str | None]) -> Iterator[None]:
        """While it is open, these values are replaced wherever they occur, also URL-quoted or JSON-escaped.

        Values shorter than `MIN_LITERAL` and None are passed over.
        """
        wanted = {form for value in values if value and len(value) >= MIN_LITERAL for form in _forms(value)}
        self._change(wanted, 1)
        try:
            yield
        finally:
            self._change(wanted, -1)

    def replace(self, text: str) -> str:
        """The text with every known value replaced by `MARK`."""
        pattern = self._pattern
        return pattern.sub(MARK, text) if pattern else text

    def _change(self, values: Iterable[str], by: int) -> None:
        with self._lock:
            for value in values:
                self._counts[value] += by
            self._counts = +self._counts
            longest_first = sorted(self._counts, key=len, reverse=True)
            self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


#: The one registry of the process: a secret of one experiment may turn up in any line.
secrets = Secrets()


def redact_text(text: str) -> str:
    """The text without the secrets that its shape or the registry gives away. Never raises."""
    text = secrets.replace(text)
    return _masked_again(text) if len(text) <= _REMEMBERED else _masked(text)


def _masked(text: str) -> str:
    lower = text.lower()
    if not any(hint in lower for hint in _HINTS):
        return text
    if "://" in lower:
        text = _USER_INFO.sub(f"://{MARK}@", text)
    if "private key" in lower:
        text = _PRIVATE_KEY.sub(MARK, text)
    if "auth" in lower:
        text = _AUTHORIZATION.sub(rf"\1{MARK}", text)
    if "bearer" in lower:
        text = _BEARER.sub(rf"\1{MARK}", text)
    text = _ASSIGNMENT.sub(_assigned, text)
    if "-" in lower:
        text = _FLAG.sub(_assigned, text)
    return _SIGNED.sub(rf"\1{MARK}", text)


#: The same names, hosts and words come in every record.
_masked_again = functools.lru_cache(4096)(_masked)


def redact_value(value: Any) -> Any:
    """A copy of a JSON-like value without its secrets. Never raises, never changes what it was given.

    Everything below a key that names a secret is replaced (its own keys stay, None and booleans too), every other text
    goes through `redact_text`. What is neither text, number nor container becomes its redacted text.
    """
    return _redact(value, inside=False, depth=0)


def names_secret(name: str) -> bool:
    """Whether a key or variable of this name holds a secret."""
    return _named_again(name) if len(name) <= _REMEMBERED else _named(name)


def _named(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


_named_again = functools.lru_cache(4096)(_named)


def _redact(value: Any, *, inside: bool, depth: int) -> Any:
    if type(value) is str and depth <= _MAX_DEPTH:
        return MARK if inside else redact_text(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping) and depth <= _MAX_DEPTH:
        return {_key(key): _entry(key, item, inside, depth) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset) and depth <= _MAX_DEPTH:
        return _items(value, inside, depth)
    if inside or depth > _MAX_DEPTH:
        return MARK
    return _scalar(value)


def _scalar(value: Any) -> Any:
    if isinstance(value, int | float):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        value = bytes(value).decode(errors="replace")
    return redact_text(value if isinstance(value, str) else str(value))


def _key(key: Any) -> Any:
    return redact_text(key) if isinstance(key, str) else key


def _entry(key: Any, item: Any, inside: bool, depth: int) -> Any:
    named = isinstance(key, str) and names_secret(key)
    if named and isinstance(item, int | float) and "tokens" in key.lower():
        named = False  # a count of tokens, as language models have
    return _redact(item, inside=inside or named, depth=depth + 1)


def _items(values: Iterable[Any], inside: bool, depth: int) -> list[Any]:
    """An argument vector hides a secret behind its flag: ["--password", "x"]."""
    done: list[Any] = []
    after_flag = False
    for value in values:
        done.append(_redact(value, inside=inside or after_flag, depth=depth + 1))
        after_flag = isinstance(value, str) and _SECRET_FLAG.match(value) is not None
    return done


def _assigned(match: re.Match[str]) -> str:
    head, value = match.groups()
    if "tokens" in head.lower() and _NUMBER.fullmatch(value):
        return match.group()
    if value.startswith(MARK):
        return match.group()
    quote = re.match(r"""\\{0,3}["']""", value)
    if quote is None:
        return head + MARK
    ends = len(value) > len(quote.group()) and value.endswith(quote.group())
    return head + quote.group() + MARK + (quote.group() if ends else "")


def _forms(value: str) -> set[str]:
    return {value, urllib.parse.quote(value, safe=""), json.dumps(value)[1:-1]}
