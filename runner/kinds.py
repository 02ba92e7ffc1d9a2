"""How values are written on a command line, in a variable, in a file: what each kind is read to, and refused for. No I/O."""

from __future__ import annotations

import dataclasses
import re
import urllib.parse
from typing import TYPE_CHECKING, Any

from runner import units

if TYPE_CHECKING:
    from collections.abc import Callable

_MIN_CACHE_BYTES = 100_000_000
_MIN_LEASE_SECS = 1.0
_MAX_LEASE_SECS = 24 * 3600.0
_MAX_PORT = 65535
_IMAGE_PATTERN = re.compile(r"artifact:|(docker|dockerhub|library|shub)://[A-Za-z0-9._:/@*-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How a value is written. `parse` raises ValueError with the reason, without the value (it may be secret)."""

    metavar: str
    parse: Callable[[str], Any]
    example: str


def _flag(text: str) -> bool:
    word = text.strip().lower()
    if word in {"1", "t", "true", "yes", "on"}:
        return True
    if word in {"0", "f", "false", "no", "off"}:
        return False
    raise ValueError("neither true nor false")


def _count(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError("not a whole number from 0 on")
    return int(text[:20])


def _size(text: str) -> int:
    try:
        return units.parse_bytes(text)
    except ValueError as exc:
        raise ValueError("not a size (b, kb, mb, gb, tb are decimal; kib, mib, gib, tib binary)") from exc


def _cache_size(text: str) -> int:
    size = _size(text)
    if size < _MIN_CACHE_BYTES:
        raise ValueError(f"less than {units.format_bytes(_MIN_CACHE_BYTES)}")
    return size


def _duration(text: str) -> float:
    try:
        secs = units.parse_duration(text)
    except ValueError as exc:
        raise ValueError("not a duration (units ms, s, m, h, d)") from exc
    if secs < 0:
        raise ValueError("a negative duration")
    return secs


def _lease(text: str) -> float | None:
    """Seconds; 0 for off, None for auto."""
    word = text.strip().lower()
    if word in {"off", "auto"}:
        return 0.0 if word == "off" else None
    secs = _duration(word)
    if not _MIN_LEASE_SECS <= secs <= _MAX_LEASE_SECS:
        raise ValueError(f"not from {_MIN_LEASE_SECS:g} s to a day")
    return secs


def _regex(text: str) -> re.Pattern[str]:
    if not text:
        raise ValueError("empty; '.*' takes every queue")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as exc:
        raise ValueError(f"not a regular expression: {exc}") from exc


def _url(*schemes: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        text = text.strip()  # a file that became a variable ends with a newline
        try:
            parts = urllib.parse.urlsplit(text)
            host, _ = parts.hostname, parts.port
        except ValueError as exc:  # its text shows parts of the URL, perhaps of a password
            raise ValueError(
                "not a URL; characters such as / @ : % in a password must be percent-encoded"
            ) from exc
        if parts.scheme not in schemes:
            raise ValueError(f"its scheme is not {' or '.join(schemes)}")
        if not host:
            raise ValueError("it names no host")
        return text

    return parse


def _store(text: str) -> str:
    if not re.match(r"[a-z][a-z0-9+.-]*:.", text):
        raise ValueError("not the URI of a storage location")
    return text


def _image_patterns(text: str) -> tuple[str, ...]:
    patterns = tuple(text.replace(",", " ").split())
    if not all(_IMAGE_PATTERN.fullmatch(pattern) for pattern in patterns):
        raise ValueError(
            "a pattern is artifact: or begins with docker://, dockerhub://, library:// or shub://, and '*' is any text"
        )
    return patterns


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if (
        not colon
        or not port.isdecimal()
        or int(port) > _MAX_PORT
        or (":" in host and not host.startswith("["))
    ):
        raise ValueError("not host:port (an IPv6 address in brackets)")
    return host.strip("[]"), int(port)


def _user(text: str) -> str:
    if not re.fullmatch(r"[a-z_][a-z0-9_.-]*\$?|\d{1,10}(:\d{1,10})?", text.strip(), re.IGNORECASE):
        raise ValueError("neither the name of a user nor UID or UID:GID")
    return text.strip()


def _token(text: str) -> str:
    text = text.strip()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("only visible ASCII characters can stand in a header")
    return text


def _choice(*words: str, also: dict[str, str] | None = None) -> Kind:
    def parse(text: str) -> str:
        word = (also or {}).get(text.lower(), text.lower())
        if word not in words:
            raise ValueError(f"none of {', '.join(words)}")
        return word

    return Kind(metavar="|".join(words), parse=parse, example=words[-1])


def _engine(text: str) -> str:
    word = text.strip()
    if not word or word.startswith("-"):
        raise ValueError("not auto, off, or a program")
    return word


def _network(text: str) -> str:
    word = text.strip()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]*", word, re.ASCII):
        raise ValueError("not the name of a network")
    return word


TEXT = Kind(metavar="TEXT", parse=str, example="text")
PATH = Kind(metavar="PATH", parse=str, example="/var/lib/studio-runner")
FLAG = Kind(metavar="BOOL", parse=_flag, example="true")
COUNT = Kind(metavar="N", parse=_count, example="4")
SIZE = Kind(metavar="SIZE", parse=_size, example="512gb")
CACHE_SIZE = Kind(metavar="SIZE", parse=_cache_size, example="10gb")
DURATION = Kind(metavar="DURATION", parse=_duration, example="1h30m")
LEASE = Kind(metavar="off|auto|SECONDS", parse=_lease, example="600")
REGEX = Kind(metavar="REGEX", parse=_regex, example="'^(rmq|local)_.*$'")
AMQP_URL = Kind(metavar="URL", parse=_url("amqp", "amqps"), example="'amqp://${USER}:${PASSWORD}@host:5672/'")
HTTP_URL = Kind(metavar="URL", parse=_url("http", "https"), example="http://host:15672")
IMAGES = Kind(
    metavar="PATTERNS", parse=_image_patterns, example="shub://sentient-singularity/,docker://ghcr.io/us/*"
)
STORE = Kind(metavar="URI", parse=_store, example="s3://host:9000/bucket/prefix")
ADDRESS = Kind(metavar="HOST:PORT", parse=_address, example=":9090")
TOKEN = Kind(metavar="TOKEN", parse=_token, example='"$(openssl rand -hex 16)"')
USER = Kind(metavar="USER", parse=_user, example="nobody")
LEVEL = _choice("debug", "info", "warning", "error", also={"warn": "warning"})
FORMAT = _choice("auto", "console", "json")
SCHEMA = _choice("1.0", "0.14")
ENGINE = Kind(metavar="auto|off|PROGRAM", parse=_engine, example="/usr/bin/podman")
NETWORK = Kind(metavar="NETWORK", parse=_network, example="none")
PULL = _choice("missing", "always", "never")
