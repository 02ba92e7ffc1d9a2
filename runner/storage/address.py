"""Hosts, ports and the shapes of addresses as messages write them. Pure; raises only `ValueError`."""

from __future__ import annotations

import functools
import ipaddress
import re

AMAZON = "s3.amazonaws.com"

_HOST = re.compile(
    r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_][a-z0-9._-]{0,252})(?::(?P<port>[0-9]{1,5}))?",
    re.IGNORECASE | re.ASCII,
)
_AMAZON = re.compile(r"(^|\.)amazonaws\.com(\.cn)?$")
_AMAZON_REGIONAL = re.compile(r"s3[.-](?P<region>[a-z]{2}(?:-[a-z]+)+-\d)\.amazonaws\.com")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")
_MOST_PORTS = 65_535


@functools.lru_cache(256)  # the same few servers in every message
def split_host(host: str) -> tuple[str, int | None]:
    """Name, in lower case (an IPv6 address keeps its brackets), and port of `host[:port]`."""
    found = _HOST.fullmatch(host)
    if not found:
        raise ValueError("its host is none")
    name = found["name"].lower()
    if name.startswith("["):
        ipaddress.IPv6Address(name[1:-1])
    port = int(found["port"]) if found["port"] else None
    if port is not None and not 0 < port <= _MOST_PORTS:
        raise ValueError("its port is none")
    return name, port


def endpoint(host: str) -> tuple[str, str | None]:
    """`host[:port]` in the one way in which it is compared, and the region that Amazon's regional hosts carry."""
    name, port = split_host(host)
    regional = _AMAZON_REGIONAL.fullmatch(name)
    if regional:
        return AMAZON, regional["region"]
    return (f"{name}:{port}" if port else name), None


def is_amazon(name: str) -> bool:
    """Whether the host belongs to Amazon."""
    return _AMAZON.search(name) is not None


def is_ip(name: str) -> bool:
    """Whether the host is an address, not a name."""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def split_endpoint(text: str) -> tuple[str, bool | None]:
    """The host of `[http[s]://][user@]host[:port][/...]`, and whether it says TLS. The user is dropped."""
    scheme, separator, rest = text.strip().partition("://")
    tls = {"https": True, "http": False}.get(scheme.lower()) if separator else None
    return (rest if separator else scheme).split("/")[0].rpartition("@")[2], tls


def file_path(rest: str) -> str:
    """The path of an address after `file:`. The client's loses its first slash: `file://tmp/x` is /tmp/x."""
    if not rest.startswith("//"):
        return rest
    host, slash, path = rest[2:].partition("/")
    return slash + path if host in {"", "localhost"} else f"/{host}{slash}{path}"


def split_path(path: str) -> list[str]:
    """The names in a path, without the empty ones."""
    names = [name for name in path.split("/") if name]
    if "." in names or ".." in names:
        raise ValueError("it has '.' or '..' inside")
    return names


def check_text(text: str) -> None:
    """Refuses what no address may hold, before anything looks closer."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it is no valid text") from None
    if _UNPRINTABLE.search(text):
        raise ValueError("it has control characters inside")
