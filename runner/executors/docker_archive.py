"""An image that came as a file: an archive as `docker save` writes it, with a name that nobody else can take.

An archive says itself what its images are to be called, and an engine obeys: one could give itself the name of an image
that others use. So what is loaded is a copy with a name of ours, made of the digest of the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

from runner import errors

if TYPE_CHECKING:
    from pathlib import Path

#: No reference of a message may begin like this.
LOADED = "localhost/studio-runner-loaded"
_MAX_JSON_BYTES = 8 << 20
_COPY_BYTES = 1 << 20
_NOT_COPIED = {"repositories"}  # names in the form of old engines


def name_of(file: Path) -> str:
    """What the image in that file is called here. Blocking. Raises OSError."""
    with file.open("rb") as content:
        return f"{LOADED}:{hashlib.file_digest(content, 'sha256').hexdigest()}"


def rename(source: Path, target: Path, name: str, *, max_bytes: int) -> None:
    """Write `target`, the image of `source` with that name and no other. Blocking; streams.

    Raises errors.ArchiveRefused (no such archive, damaged, of several images, larger than `max_bytes`), OSError.
    """
    total, renamed = 0, False
    try:
        with (
            tarfile.open(source, "r|*") as original,
            tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as copy,
        ):
            for member in original:
                total += member.size
                if total > max_bytes:
                    raise errors.ArchiveRefused(
                        "the image is larger than the disk that the experiment asks for"
                    )
                plain = member.name.removeprefix("./")
                if plain in _NOT_COPIED:
                    continue
                content = original.extractfile(member) if member.isreg() else None
                if plain in {"manifest.json", "index.json"} and content is not None:
                    content = _renamed(plain, content.read(_MAX_JSON_BYTES + 1), name)
                    member.size, member.pax_headers = len(content.getbuffer()), {}
                    renamed = renamed or plain == "manifest.json"
                copy.addfile(member, content)
    except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError) as exc:
        raise errors.ArchiveRefused(
            f"the file of the image is no archive that `docker save` writes: {exc}"
        ) from exc
    if not renamed:
        raise errors.ArchiveRefused(
            "the file of the image is no archive that `docker save` writes: no manifest.json"
        )


def _renamed(member: str, content: bytes, name: str) -> io.BytesIO:
    """The list of images in an archive, in the form of docker or of OCI, with our name. Raises ValueError and its like."""
    if len(content) > _MAX_JSON_BYTES:
        raise ValueError(f"{member} is too large")
    listed: Any = json.loads(content)
    images = listed if member == "manifest.json" else listed["manifests"]
    if len(images) != 1:
        raise ValueError(f"{member} lists {len(images)} images, not one")
    if member == "manifest.json":
        images[0]["RepoTags"] = [name]
    else:
        images[0]["annotations"] = {
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name.partition(":")[2],
        }
    return io.BytesIO(json.dumps(listed).encode())
