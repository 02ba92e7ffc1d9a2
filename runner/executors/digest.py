"""The identity of a file or directory: what an environment built from it is kept under."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: what changes without the package changing
IGNORED = frozenset({".git", "__pycache__", ".venv", ".mypy_cache", ".pytest_cache"})


def digest(path: Path) -> str:
    """sha256 (hex) over a file's bytes, or over names and bytes below a directory. Links are not followed. Blocks."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for name, content in _contents(path):
        whole.update(f"{len(name)}:{name}:{content}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()


def _contents(root: Path) -> Iterator[tuple[str, str]]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - IGNORED)
        for name in sorted(files):
            path = root.__class__(folder, name)
            if path.is_symlink():
                yield str(path.relative_to(root)), f"-> {path.readlink()}"
            elif path.is_file():  # not a pipe, which would block
                yield str(path.relative_to(root)), digest(path)
