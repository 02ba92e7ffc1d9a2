"""References of container images, in one spelling each, and the operator's list of those that may be used (INTEROP.md 3.8).

What is matched against the list is the very text that the engine gets, and a reference that has no such spelling is refused:
so `dockerhub://tensorflow/../evil`, user names, doubled slashes, percent signs and control characters lead nowhere.
"""

from __future__ import annotations

import dataclasses
import re
from typing import NoReturn

from runner import errors

ARTIFACT = "artifact:"  #: the pattern for image files that a message brings as an artifact
DOCKER_HUB = "docker.io"
_SCHEMES = ("docker", "dockerhub", "library", "shub")
_MAX_LENGTH = 1024
_MAX_SHOWN = 200

_DOCKER_NAME = re.compile(
    r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
)  # as registries define it; lower case only
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.))*")  # of the other two
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9-]|\.(?!\.))*(?::[0-9]{1,5})?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|[0-9a-f]{32,64}")
_PINNING_TAG = re.compile(r"sha256\.[0-9a-f]{64}")  # a library's way to say a digest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """An image on a server, in its only spelling."""

    name: str  #: "docker://docker.io/tensorflow/tensorflow": scheme, server, path
    version: str  #: ":1.4.0", "@sha256:...", or nothing
    endpoint: str  #: the server that has it
    pinned: bool  #: its version is a digest: it never changes

    def __str__(self) -> str:
        return self.name + self.version


def parse(text: str) -> Reference:
    """Reads `docker://`, `dockerhub://` (Docker Hub), `library://` and `shub://` references.

    Raises errors.UnsupportedRequest for everything else, with the words that the reference's users know.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in _SCHEMES or len(text) > _MAX_LENGTH:
        _refuse(text, "it is no docker://, dockerhub://, library:// or shub:// reference")
    path, at, digest = rest.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        _refuse(text, "what follows its '@' is no digest")
    # A colon before the last slash is that of a port.
    folder, slash, last = path.rpartition("/")
    last, colon, tag = last.partition(":")
    if colon and not _TAG.fullmatch(tag):
        _refuse(text, "its tag is not one that a server can have")
    parts = (folder + slash + last).split("/")
    if scheme in {"docker", "dockerhub"}:
        host, parts = _docker_host(scheme, parts)
        legal = all(_DOCKER_NAME.fullmatch(part) for part in parts) and digest[:7] in {"", "sha256:"}
        name = "/".join(("docker:/", host, *parts))
        version = f"@{digest}" if at else f":{tag or 'latest'}"  # engines refuse both; the digest decides
    else:
        host, parts = _other_host(scheme, parts)
        legal = all(_NAME.fullmatch(part) for part in parts) and 0 < len(parts) <= (
            2 if scheme == "shub" else 3
        )
        name = "/".join((f"{scheme}:/", *([host] if host else []), *parts))
        version = f"{colon}{tag}{at}{digest}"
    if not legal or (host and not _HOST.fullmatch(host)):
        _refuse(text, "its name is not one that a server can have")
    endpoint = host or {"shub": "singularity-hub.org", "library": "library.sylabs.io"}[scheme]
    return Reference(
        name=name, version=version, endpoint=endpoint, pinned=bool(at or _PINNING_TAG.fullmatch(tag))
    )


def canonical_pattern(text: str) -> str:
    """A pattern of the list, which is sound (`options`), in the spelling of `Reference`."""
    if text == ARTIFACT:
        return text
    scheme, _, rest = text.partition("://")
    first, slash, _ = rest.partition("/")
    if scheme == "dockerhub" or (
        scheme == "docker" and rest and "*" not in first and not _is_host(first, slash)
    ):
        alone = "" if slash or not rest or rest.startswith("*") else "library/"
        rest = f"{DOCKER_HUB}/{alone}{rest}"
        scheme = "docker"
    return f"{scheme}://{rest}" + ("*" if text.endswith("/") else "")


class AllowList:
    """What may be run: a pattern that ends with a slash is a beginning, `*` is any text, all else is itself."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._artifacts = ARTIFACT in patterns
        self._patterns = [
            _compiled(canonical_pattern(pattern)) for pattern in patterns if pattern != ARTIFACT
        ]

    def check(self, reference: Reference) -> None:
        """Raises errors.UnsupportedRequest unless a pattern names it, with any version or with this one."""
        for pattern in self._patterns:
            if pattern.fullmatch(reference.name) or pattern.fullmatch(str(reference)):
                return
        _refuse(str(reference), "no pattern of --allow-image names it")

    def check_file(self, name: str) -> None:
        """The same for an image file that came as an artifact."""
        if not self._artifacts:
            _refuse(name, f"--allow-image does not have '{ARTIFACT}', for image files that messages bring")


def _compiled(pattern: str) -> re.Pattern[str]:
    """Each part is looked for once, behind the one before: a name from a message must not make the search long."""
    first, *parts = map(re.escape, pattern.split("*"))
    if not parts:
        return re.compile(first)
    *middle, last = parts
    return re.compile(first + "".join(f"(?>.*?{part})" for part in middle) + ".*" + last)


def _docker_host(scheme: str, parts: list[str]) -> tuple[str, list[str]]:
    if scheme == "docker" and len(parts) > 1 and _is_host(parts[0], "/"):
        host, parts = parts[0], parts[1:]
        host = DOCKER_HUB if host in {"index.docker.io", "registry-1.docker.io"} else host
    else:
        host = DOCKER_HUB
    if host == DOCKER_HUB and len(parts) == 1:
        parts = ["library", *parts]
    return host, parts


def _other_host(scheme: str, parts: list[str]) -> tuple[str, list[str]]:
    """Their engines take the first of too many parts for a server; here it must look like one."""
    if len(parts) > (2 if scheme == "shub" else 3) and _is_host(parts[0], "/"):
        return parts[0], parts[1:]
    return "", parts


def _is_host(first: str, slash: str) -> bool:
    return bool(slash) and (first == "localhost" or "." in first or ":" in first)


def _refuse(text: str, why: str) -> NoReturn:
    shown = text if len(text) <= _MAX_SHOWN and text.isprintable() else repr(text[:_MAX_SHOWN])
    shown = re.sub(r"//[^/@]*@", "//***@", shown)
    raise errors.UnsupportedRequest(f"untrusted image specified: '{shown}': {why}")
