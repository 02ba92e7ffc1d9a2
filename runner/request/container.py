"""Which container image a request wants to run in: an artifact of a special tag, else `config.container.image`. Pure."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Literal

from runner import errors
from runner.request.model import Container

if TYPE_CHECKING:
    from runner.request.model import Artifact
    from runner.request.wire import Notes

#: Tags of artifacts that name an image (INTEROP.md 3.8).
TAGS: dict[str, Literal["docker", "singularity"]] = {"_singularity": "singularity", "_docker": "docker"}
#: Addresses that an engine fetches by itself; every other one is an artifact's like any other, a file.
_REFERENCE = {
    "singularity": re.compile(r"(docker|dockerhub|shub|library)://", re.IGNORECASE),
    # Without a scheme it is what people write after `docker run`.
    "docker": re.compile(r"(docker|dockerhub)://|(?!/|\w+://|file:)", re.IGNORECASE),
}


def choose(
    artifacts: tuple[Artifact, ...], configured: str | None, notes: Notes
) -> tuple[Container | None, tuple[Artifact, ...]]:
    """The image, and the artifacts as they are with it: that of the image is one file, which nobody stores back.

    An artifact is the experiment's own, so it wins over the configuration; one without an address says nothing. Raises
    errors.UnsupportedRequest when two artifacts name an image each: the request does not say which it wants.
    """
    named = [each for each in artifacts if each.tag in TAGS and (each.qualified or each.url or each.key)]
    if len(named) > 1:
        raise errors.UnsupportedRequest(
            "the message names two container images: leave out the artifact _docker or _singularity"
        )
    if not named:
        image = (configured or "").strip()
        return (Container(engine="docker", reference=image) if image else None), artifacts
    artifact = named[0]
    if configured:
        notes.add("container.image", f"is ignored: the artifact {artifact.tag} names another image")
    if artifact.mutable:
        notes.lines.append(f"the artifact {artifact.tag} is mutable; an image is never stored back")
    image_file = dataclasses.replace(artifact, mutable=False, unpack=bool(artifact.unpack))
    others = tuple(image_file if each is artifact else each for each in artifacts)
    return _of(artifact), others


def _of(artifact: Artifact) -> Container:
    engine, address = TAGS[artifact.tag], artifact.qualified or artifact.url or ""
    is_reference = bool(address) and _REFERENCE[engine].match(address) is not None
    return Container(engine=engine, reference=address if is_reference else "", tag=artifact.tag)
