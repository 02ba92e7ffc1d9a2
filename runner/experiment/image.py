"""The container image of a run, as executors know it: before its artifacts are fetched, and when they are there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runner import errors
from runner.executors.base import Image

if TYPE_CHECKING:
    from runner.experiment.artifacts import Artifacts
    from runner.experiment.workspace import Workspace
    from runner.request.model import Container


def asked(container: Container | None, artifacts: Artifacts) -> Image | None:
    """What the message asks for; of an image file, which is not there yet, the name that it will have unless it is packed.

    None: it wants none.
    """
    if container is None:
        return None
    if container.reference:
        return Image(engine=container.engine, reference=container.reference)
    return Image(engine=container.engine, file=Path(artifacts.file_name(container.tag)))


def staged(container: Container | None, workspace: Workspace) -> Image | None:
    """What was staged for it. Raises errors.UnsupportedRequest when that is not one file."""
    if container is None:
        return None
    if container.reference:
        return Image(engine=container.engine, reference=container.reference)
    files = list(workspace.artifact(container.tag).iterdir())
    if len(files) != 1 or not files[0].is_file() or files[0].is_symlink():
        raise errors.UnsupportedRequest(
            f"the artifact {container.tag} is not the one file of an image: send it with unpack false"
        )
    return Image(engine=container.engine, file=files[0])
