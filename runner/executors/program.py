"""What follows `python` on the command line of an experiment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from runner import errors

if TYPE_CHECKING:
    from runner.executors.base import RunSpec


def arguments(spec: RunSpec) -> tuple[str, ...]:
    """The script and its arguments, or "-m" and its. A script that is missing is left to Python to report.

    Raises errors.UnsupportedRequest: no program is named, it is outside of the workspace, or it cannot be written down.
    """
    if spec.filename is None:
        raise errors.UnsupportedRequest("the message names no program, and no container image that has one")
    if any("\0" in part for part in (spec.filename, *spec.args)):
        raise errors.UnsupportedRequest("the command line of the experiment holds a NUL character")
    if spec.filename == "-m":
        if not spec.args:
            raise errors.UnsupportedRequest("filename is '-m', but args names no module")
        return ("-m", *spec.args)
    inside = os.path.relpath(os.path.normpath(spec.workspace / spec.filename), spec.workspace)
    if inside in {".", ".."} or inside.startswith("../"):
        raise errors.UnsupportedRequest(f"filename '{spec.filename}' is not below the workspace")
    # Python takes a leading "-" for an option.
    return (f"./{inside}" if inside.startswith("-") else inside, *spec.args)
