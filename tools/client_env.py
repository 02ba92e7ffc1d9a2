"""Makes the virtual environment of the real StudioML client, and prints the path of its Python.

    python tools/client_env.py

Made once per machine, in .test-venvs/studioml-<hash of the pins>; a second call costs nothing, calls at the same time wait
for each other, and one that is killed leaves nothing that a later one would take for whole. Needs a Python 3.8 to 3.11
(exit code 3: there is none on this machine), uv (beside this interpreter, or on PATH) and the package index.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
LOCK_FILE = CHECKOUT / "tools" / "client-requirements.lock"
FOLDER = CHECKOUT / ".test-venvs"
MINORS = (11, 10, 9, 8)
NO_PYTHON = 3  #: exit code


def main() -> int:
    """Make it, unless it is there; print where it is."""
    python = find_python()
    if python is None:
        print("the StudioML client needs a Python 3.8 to 3.11, and this machine has none", file=sys.stderr)
        return NO_PYTHON
    pins = LOCK_FILE.read_bytes()
    home = FOLDER / f"studioml-{hashlib.sha256(pins + os.fsencode(python)).hexdigest()[:12]}"
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "whole").exists():
            build(home, python)
            (home / "whole").touch()
    print(home / "bin" / "python")
    return 0


def build(home: pathlib.Path, python: str) -> None:
    """The environment, from the pins; what an earlier call left is removed."""
    shutil.rmtree(home, ignore_errors=True)
    beside = pathlib.Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv") or "uv"
    env = os.environ | {"UV_PYTHON_DOWNLOADS": "never"}
    subprocess.run([uv, "venv", "-q", "--python", python, str(home)], env=env, check=True)
    # The pins are the whole environment: nothing is resolved.
    install = [uv, "pip", "install", "-q", "--no-deps", "--python", str(home / "bin" / "python")]
    subprocess.run([*install, "--requirement", str(LOCK_FILE)], env=env, check=True)


def find_python() -> str | None:
    """The newest Python that the client can run on; a real file where possible, since shims do not always answer."""
    return next((path for minor in MINORS for path in candidates(minor) if answers(path, minor)), None)


def candidates(minor: int) -> list[str]:
    """Where a Python of that version may be."""
    found = [f"python3.{minor}"]
    if sys.version_info[1] == minor:
        found.insert(0, getattr(sys, "_base_executable", sys.executable))
    for places in (f".pyenv/versions/3.{minor}.*/bin", f".local/share/uv/python/cpython-3.{minor}.*/bin"):
        found += sorted(str(path / f"python3.{minor}") for path in pathlib.Path.home().glob(places))
    return found


def answers(candidate: str, minor: int) -> bool:
    """Whether that is a Python of that version, with all that environments need."""
    probe = f"import ssl, zlib, sys; raise SystemExit(sys.version_info[:2] != (3, {minor}))"
    try:
        return (
            subprocess.run([candidate, "-c", probe], capture_output=True, timeout=30, check=False).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


if __name__ == "__main__":
    raise SystemExit(main())
