"""What a Python environment looks like on disk: the shared base, and the thin one of a run over it.

A thin environment has its own prefix, `bin` and site-packages; a `.pth` line in it adds the base's site-packages
behind its own. What pip installs at run time goes into the thin one and shadows the base; pip leaves packages outside
the prefix alone. Scripts of the base are copies that start the Python beside them (uv's relocatable form).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from runner.executors.interpreters import Interpreter

VERSION = 2  #: part of every key: raise it when a base of an earlier release can no longer be used
MANIFEST = "environment.json"  #: written last
BASE_PTH = "_studio_runner_base.pth"
TEMPLATE = "thin"  #: in a base: what a thin environment over it begins as


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


def create_template(prefix: Path, interpreter: Interpreter, base: Base, *, home: Path) -> None:
    """Makes, in the base at `prefix` that will be at `home`, what every thin environment over it begins as. Blocks, ~1 ms."""
    template = prefix / TEMPLATE
    create(template, interpreter)
    site = site_packages(template, interpreter.minor)
    (site / "__pycache__").rmdir()
    # addsitedir rather than the bare path: it also runs the .pth files of the base. ASCII, as the encoding of .pth
    # files differs between versions.
    line = f"import site; site.addsitedir({str(site_packages(home, interpreter.minor))!a})\n"
    (site / BASE_PTH).write_text(line)
    for name in base.scripts:
        copy = template / "bin" / name
        copy.write_bytes((prefix / "bin" / name).read_bytes())
        copy.chmod(0o755)
    for name in base.programs:
        (template / "bin" / name).symlink_to(home / "bin" / name)
    # Real directories and links to files: pip removes a file before it writes it anew, so never writes through.
    for folder in {str(Path(name).parent) for name in base.data}:
        (template / folder).mkdir(parents=True, exist_ok=True)
    for name in base.data:
        (template / name).symlink_to(home / name)


def create_thin(prefix: Path, base: Base) -> None:
    """Makes a run's own environment over `base`; one that is there already is replaced. Blocks for less than a millisecond.

    Its links and settings are further names of those in the template: a new file costs many times more where runs come and
    go (ext4 passes over inodes that were freed in the last minutes, one by one). Scripts are copies: old pips write them in
    place.
    """
    if prefix.exists():
        shutil.rmtree(prefix)
    _replicate(os.fspath(base.path / TEMPLATE), os.fspath(prefix), frozenset(base.scripts))


def _replicate(source: str, target: str, copies: frozenset[str]) -> None:
    os.mkdir(target)  # noqa: PTH102 - pathlib costs more than the call
    with os.scandir(source) as listing:
        for entry in listing:
            path = f"{target}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                _replicate(entry.path, path, copies)
            elif entry.name in copies or not _linked(entry.path, path):
                shutil.copy2(entry.path, path, follow_symlinks=False)


def _linked(source: str, target: str) -> bool:
    """Whether it could be given a second name: not on another file system, nor without end."""
    with contextlib.suppress(OSError):
        os.link(source, target, follow_symlinks=False)
        return True
    return False
