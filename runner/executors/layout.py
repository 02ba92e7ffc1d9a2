"""What a Python environment looks like on disk: the shared base, and the thin one of a run over it.

A thin environment has its own prefix, `bin` and site-packages; a `.pth` line in it adds the base's site-packages
behind its own. What pip installs at run time goes into the thin one and shadows the base; pip leaves packages outside
the prefix alone. Scripts of the base are copies that start the Python beside them (uv's relocatable form).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from runner.executors.interpreters import Interpreter

VERSION = 1  #: part of every key: raise it when a base of an earlier release can no longer be used
MANIFEST = "environment.json"  #: written last
BASE_PTH = "_studio_runner_base.pth"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A finished base environment, as its manifest describes it."""

    path: Path
    site_mtime_ns: int  #: of its site-packages: whether something was added to or taken from it
    scripts: tuple[str, ...]  #: names in bin that are text with a `#!`
    programs: tuple[str, ...]  #: names in bin that are binaries
    data: tuple[str, ...]  #: other files that wheels put below the prefix (share, etc, include, lib)
    build_secs: float
    expires: float | None  #: wall clock; None: everything in it is pinned
    warnings: tuple[str, ...] = ()  #: of the build

    @classmethod
    def load(cls, path: Path, minor: str) -> Self | None:
        """The base at `path`; None when it is not there, not finished, or was tampered with."""
        try:
            fields = json.loads((path / MANIFEST).read_bytes())
            lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            base = cls(path=path, **(fields | lists))
            return base if site_packages(path, minor).stat().st_mtime_ns == base.site_mtime_ns else None
        except (OSError, ValueError, TypeError):
            return None

    def save(self) -> None:
        """Writes the manifest: from here on it is finished."""
        fields = dataclasses.asdict(self)
        del fields["path"]
        (self.path / MANIFEST).write_text(json.dumps(fields))


def site_packages(prefix: Path, minor: str) -> Path:
    """Where an environment's packages are."""
    return prefix / "lib" / f"python{minor}" / "site-packages"


def create(prefix: Path, interpreter: Interpreter) -> None:
    """Makes an empty environment, as `uv venv --relocatable` does, less the activation scripts. Blocks, ~1 ms."""
    site = site_packages(prefix, interpreter.minor)
    # Python's byte code of single-file modules goes in there, and must not change what `Base.load` looks at.
    (site / "__pycache__").mkdir(parents=True)
    (prefix / "bin").mkdir()
    (prefix / "lib64").symlink_to("lib")
    (prefix / "bin" / "python").symlink_to(interpreter.path)
    for name in ("python3", f"python{interpreter.minor}"):
        (prefix / "bin" / name).symlink_to("python")
    (prefix / "pyvenv.cfg").write_text(
        f"home = {interpreter.path.parent}\n"
        "implementation = CPython\n"
        f"version_info = {interpreter}\n"
        "include-system-site-packages = false\n"
        "relocatable = true\n"
    )


def describe(prefix: Path, interpreter: Interpreter, *, build_secs: float, expires: float | None) -> Base:
    """Looks at an environment that was just built. Blocks for some milliseconds."""
    scripts: list[str] = []
    programs: list[str] = []
    for entry in sorted(os.scandir(prefix / "bin"), key=lambda entry: entry.name):
        if entry.is_file(follow_symlinks=False):
            with open(entry.path, "rb") as file:  # noqa: PTH123 - a DirEntry
                (scripts if file.read(2) == b"#!" else programs).append(entry.name)
    skipped = {prefix / "bin", prefix / "lib" / f"python{interpreter.minor}"}
    data = []
    for folder, subfolders, files in os.walk(prefix):
        subfolders[:] = [name for name in subfolders if Path(folder, name) not in skipped]
        if Path(folder) != prefix:
            data += [str(Path(folder, name).relative_to(prefix)) for name in files]
    return Base(
        path=prefix,
        site_mtime_ns=site_packages(prefix, interpreter.minor).stat().st_mtime_ns,
        scripts=tuple(scripts),
        programs=tuple(programs),
        data=tuple(data),
        build_secs=round(build_secs, 3),
        expires=expires,
    )


def create_thin(prefix: Path, interpreter: Interpreter, base: Base) -> None:
    """Makes a run's own environment over `base`; one that is there already is replaced. Blocks for milliseconds."""
    if prefix.exists():
        shutil.rmtree(prefix)
    create(prefix, interpreter)
    site = site_packages(base.path, interpreter.minor)
    # addsitedir rather than the bare path: it also runs the .pth files of the base. ASCII, as the encoding of .pth
    # files differs between versions.
    line = f"import site; site.addsitedir({str(site)!a})\n"
    (site_packages(prefix, interpreter.minor) / BASE_PTH).write_text(line)
    for name in base.scripts:
        copy = prefix / "bin" / name
        copy.write_bytes((base.path / "bin" / name).read_bytes())
        copy.chmod(0o755)
    for name in base.programs:
        (prefix / "bin" / name).symlink_to(base.path / "bin" / name)
    # Real directories and links to files: pip removes a file before it writes it anew, so never writes through.
    for folder in {str(Path(name).parent) for name in base.data}:
        (prefix / folder).mkdir(parents=True, exist_ok=True)
    for name in base.data:
        (prefix / name).symlink_to(base.path / name)
