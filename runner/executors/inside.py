"""What is run first in a Singularity image: small shell scripts in the run's directory, never in an argument list.

The engines evaluate variables that they pass on in a shell of theirs, drop some and keep HOME for themselves; arguments can be
seen by everybody on the machine. So the variables are written down, quoted, in a file that the image's own `/bin/sh` reads
before it starts the program.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from runner import errors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NO_PYTHON, NO_PIP = 91, 92  #: exit codes of the installer
RUNSCRIPT = "/.singularity.d/runscript"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Shells keep these for themselves, and end when they are told otherwise.
_OF_THE_SHELL = frozenset(
    ("UID", "EUID", "PPID", "SHELLOPTS", "BASHOPTS", "BASH_VERSINFO", "OPTIND", "IFS", "PWD", "OLDPWD")
)

_PYTHON = f"""\
command -v "$1" >/dev/null 2>&1 || [ "$1" != python ] || {{ shift; set -- python3 "$@"; }}
command -v "$1" >/dev/null 2>&1 || {{ echo "studio-runner: the image has no $1" >&2; exit {NO_PYTHON}; }}
"""
# The shell stays: of the several TERMs that a program would get, one from its supervisor and one from each part of the engine
# that passes on its own, all but the first end here. It is told to say nothing of how its child died.
_RUN = """\
trap : TERM
exec 3>&2 2>/dev/null
( exec "$@" ) 2>&3 3>&-
exit $?
"""
# `--user` sees what the image has; a Python that is itself a virtual environment, or is told to have no user's packages, has
# no such place, so what is asked for is put, with all that it needs, before the image's own.
_INSTALL = f"""\
"$1" -c 'import pip' || exit {NO_PIP}
if "$1" -c 'import site, sys; sys.exit(not site.ENABLE_USER_SITE)'; then
    exec "$@" --user
fi
exec "$@" --target "$PYTHONUSERBASE/site"
"""


class Inside:
    """The scripts of one run, below `folder` in its directory. `overlay` is where its own packages go."""

    def __init__(self, folder: Path, overlay: Path, env: Mapping[str, str]) -> None:
        self.program = folder / "program.sh"
        self.installer = folder / "install.sh"
        self.started = (
            folder / "started"
        )  #: there when the image's shell has come up: the engine has done its part
        self._overlay = overlay
        self._env = env
        self.left_out = tuple(name for name in env if not _settable(name))

    def write(self) -> None:
        """Makes both scripts, mode 0600. Blocks. Raises errors.UnsupportedRequest, OSError."""
        begin = (
            b"# The variables of this run, and then its program; made by studio-runner.\n" + self._exports()
        )
        overlay = self._overlay_lines()
        start = f": > {quoted(str(self.started))} || exit\n{_RUN}"
        # Images made of Docker's evaluate arguments once more, unless they are told not to.
        own = "export APPTAINER_NO_EVAL=1 SINGULARITY_NO_EVAL=1"
        tail = f'if [ "$1" = {RUNSCRIPT} ]; then\n{own}\nelse\n{_PYTHON}fi\n{start}'
        _write(self.program, begin + (overlay + tail).encode())
        variables = (
            "export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore\n"
        )
        _write(self.installer, begin + (overlay + variables + _PYTHON + _INSTALL).encode())

    def _exports(self) -> bytes:
        lines = [b"{"]
        for name, value in self._env.items():
            if not _settable(name):
                continue
            if "\0" in value:
                raise errors.UnsupportedRequest(f"the value of the variable {name} holds a NUL character")
            text = quoted(value)
            if name == "LD_LIBRARY_PATH":  # what the engine put there is the GPU's
                text += '"${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"'
            lines.append(f"export {name}={text}".encode("utf-8", "surrogateescape"))
        # Some shells complain of a locale that the image has not.
        lines.append(b"} 2>/dev/null\n")
        return b"\n".join(lines) if len(lines) > 2 else b""  # noqa: PLR2004 - an empty group is a mistake to a shell

    def _overlay_lines(self) -> str:
        place = quoted(str(self._overlay))
        return (
            f'export PYTHONUSERBASE={place} PATH={place}/bin:"$PATH"\n'
            f'[ ! -d {place}/site ] || export PYTHONPATH={place}/site"${{PYTHONPATH:+:$PYTHONPATH}}" '
            f'PATH={place}/site/bin:"$PATH"\n'
        )


def quoted(text: str) -> str:
    """As one word of a POSIX shell that nothing is expanded in. Whatever is in it, but NUL."""
    return "'" + text.replace("'", "'\\''") + "'"


def _settable(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and name not in _OF_THE_SHELL


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
