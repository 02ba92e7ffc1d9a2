"""Which names and which link targets are safe. Pure; the walk in `tree` is the second lock on the same door."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from runner.storage.archive.limits import refuse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runner.storage.archive.limits import UnpackLimits

_COMPONENT_BYTES = 255  # what Linux file systems take
_DRIVE = re.compile(r"[A-Za-z]:([\\/]|$)")


def components(name: str, limits: UnpackLimits) -> tuple[str, ...]:
    """The components of an entry's name below the directory; () is the directory itself.

    `.` and empty components vanish. Raises `errors.ArchiveRefused` for every name that means, or could mean to somebody,
    a place outside. A backslash is a character like others, unless reading it as a separator would leave the directory.
    """
    if "\0" in name:
        refuse(name, "has a NUL in its name")
    if name.startswith("/"):
        refuse(name, "has an absolute name")
    if _DRIVE.match(name):
        refuse(name, "has a name with a drive")
    if "\\" in name:
        pieces = name.replace("\\", "/").split("/")
        if not pieces[0] or ".." in pieces:
            refuse(name, "has a name that leaves the directory where a backslash separates")
    parts = tuple(part for part in name.split("/") if part not in {"", "."})
    if ".." in parts:
        refuse(name, "has a name with '..'")
    if len(parts) > limits.depth:
        refuse(name, f"lies deeper than {limits.depth} directories")
    if _encoded_length(name) > limits.name_bytes or any(
        _encoded_length(part) > _COMPONENT_BYTES for part in parts
    ):
        refuse(name, "has a name that is too long")
    return parts


def leaves(parent: Sequence[str], target: str) -> bool:
    """Whether a symbolic link in directory `parent` (components below the root) may point out of the root.

    `..` may only lead: no more of them than `parent` has components. After a name it is an escape waiting for that name to
    become a link itself (`a/link/../../..`), and no look at the disk now can tell. As `parent` holds no link (`tree` walks
    it without following any), a link that passes leads to a place inside, from which the rest of its target goes down,
    through links that passed as well: by induction nothing that passes ever leaves.
    """
    if not target or target.startswith("/") or "\0" in target:
        return True
    parts = [part for part in target.split("/") if part not in {"", "."}]
    ups = next((at for at, part in enumerate(parts) if part != ".."), len(parts))
    return ups > len(parent) or ".." in parts[ups:]


def _encoded_length(text: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(os.fsencode(text))
    except UnicodeEncodeError:
        refuse(text, "has a name that this system cannot spell")
