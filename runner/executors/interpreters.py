"""Which Pythons this machine has, and which of them a request gets (INTEROP.md 1.2 `pythonver`).

Nothing happens at import or construction: the machine is searched when the first run asks. Each executable is asked
for its version once; the answer is kept on disk for as long as the file does not change.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import glob
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from runner import errors
from runner.process.base import Command

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from runner.process.spawner import Spawner

log = structlog.get_logger(__name__)

Version = tuple[int, int, int]

OLDEST = (3, 6)  #: uv makes no environment for older ones
PROBE_TIMEOUT_SECS = 30.0
#: where Pythons are when they are not on PATH; `~` is the home of the runner's user
PLACES = (
    "~/.pyenv/versions/*/bin",
    "~/.local/share/uv/python/*/bin",
    "~/.asdf/installs/python/*/bin",
    "/opt/python*/bin",
    "/opt/python*/*/bin",
    "/usr/local/bin",
    "/usr/bin",
)
#: variables that say that pyenv's and uv's are not where they are by custom
ELSEWHERE = {"PYENV_ROOT": "versions/*/bin", "UV_PYTHON_INSTALL_DIR": "*/bin"}
_NAME = re.compile(r"python[23]?(\.\d+)?")  # not python3.13t (free-threaded), python3-config, ...
_WANTED = re.compile(
    r"\s*(?:c?python)?\s*(\d+)(?:\.(\d+))?(?:\.(\d+))?(?:[^\d].*)?", re.DOTALL | re.IGNORECASE
)
# Runs on Python 2 as well, so that an old one can be named in the list of what is there. What uv and pip import is
# tried: distributions split the standard library, and without these no environment can be made.
_PROBE = """
import sys
assert getattr(getattr(sys, 'implementation', None), 'name', 'cpython') == 'cpython'
assert not getattr(sys, 'abiflags', '').strip('mu')
import ssl, sysconfig, zlib
if sys.version_info < (3, 10):
    import distutils.command.install
print('version %d.%d.%d' % sys.version_info[:3])
"""


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Interpreter:
    """One CPython, as a real file (no shim, no link, no virtual environment)."""

    version: Version
    path: Path
    mtime_ns: int

    @property
    def minor(self) -> str:
        """`3.11`, as in the name of its library directory."""
        return f"{self.version[0]}.{self.version[1]}"

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The interpreter that a request gets; `warning` says where it is not what was asked for."""

    interpreter: Interpreter
    warning: str | None = None


class Interpreters:
    """The Pythons of this machine. One instance per daemon; safe to ask from many tasks."""

    def __init__(
        self,
        spawner: Spawner,
        cache_file: Path,
        *,
        environ: Mapping[str, str],
        places: Sequence[str] = PLACES,
    ) -> None:
        self._spawner = spawner
        self._cache_file = cache_file
        self._environ = environ
        self._places = places
        self._known: dict[str, tuple[int, Version | None]] = {}  # path -> mtime and version; None: not usable
        self._found: tuple[Interpreter, ...] | None = None
        self._searching = asyncio.Lock()

    async def choose(self, wanted: str | None, *, fallback: bool) -> Choice:
        """The interpreter for `wanted`.

        None and "3" give the newest patch of the runner's own minor version, the one most tested with it, and else
        the newest there is. "3.6" gives the highest patch of 3.6; "3.11.7" exactly that, or with a warning another
        3.11. Anything else raises `errors.UnsupportedRequest` with the list of what is there, or, with `fallback`,
        gives the nearest minor version (rather a newer than an older one) and a warning.
        """
        major, minor, patch, note = _parse(wanted)
        found = self._found or await self.discover()
        choice = _select(found, major, minor, patch)
        if choice is None or not await asyncio.to_thread(_unchanged, choice.interpreter):
            found = await self.discover()  # installed or removed since
            choice = _select(found, major, minor, patch)
        usable = [one for one in found if one.version[:2] >= OLDEST]
        if choice is None and fallback and usable:
            nearest = _nearest(usable, (major, minor if minor is not None else 0))
            note = f"Python {wanted} is not on this machine; {nearest} was taken (--python-fallback)"
            choice = Choice(interpreter=nearest)
        if choice is None:
            raise errors.UnsupportedRequest(
                f"Python {wanted or 3} is not on this machine. It has {_listing(found)}. "
                "Install it, ask for another, or start the runner with --python-fallback to use the nearest."
            )
        return dataclasses.replace(choice, warning=choice.warning or note)

    async def discover(self) -> tuple[Interpreter, ...]:
        """Searches the machine: every CPython found, also those too old to use, in the order of preference."""
        async with self._searching:
            if not self._known:
                self._known = await asyncio.to_thread(_load, self._cache_file)
            before = dict(self._known)
            candidates = await asyncio.to_thread(lambda: dict(self._candidates()))
            async with asyncio.TaskGroup() as probes:
                for path, mtime in candidates.items():
                    if self._known.get(path, (0, None))[0] != mtime:
                        probes.create_task(self._ask(path, mtime), name="ask python")
            if self._known != before:
                await asyncio.to_thread(_save, self._cache_file, self._known)
            self._found = tuple(
                Interpreter(version=version, path=Path(path), mtime_ns=mtime)
                for path, mtime in candidates.items()
                if (version := self._known.get(path, (0, None))[1]) is not None
            )
            log.debug("interpreters found", interpreters=[str(one) for one in self._found])
            return self._found

    def _candidates(self) -> Iterator[tuple[str, int]]:
        """Real paths and modification times of what is called python: the runner's own, PATH, the usual places."""
        home = self._environ.get("HOME", "~")
        places = [home + place[1:] if place.startswith("~") else place for place in self._places]
        for name, below in ELSEWHERE.items():
            if root := self._environ.get(name):
                places.append(f"{root}/{below}")
        folders = self._environ.get("PATH", os.defpath).split(os.pathsep)
        folders += [folder for place in places for folder in sorted(glob.glob(place))]  # noqa: PTH207 - text, as PATH is
        own = str(getattr(sys, "_base_executable", sys.executable))
        for path in (own, *(entry.path for folder in folders if folder for entry in _entries(folder))):
            real = os.path.realpath(path)
            with contextlib.suppress(OSError):
                if _is_program(real):
                    yield real, os.stat(real).st_mtime_ns  # noqa: PTH116 - a hot loop over strings

    async def _ask(self, path: str, mtime_ns: int) -> None:
        with tempfile.TemporaryDirectory(prefix="ask-python-") as folder:
            answer = Path(folder, "answer")
            command = Command(
                argv=(path, "-E", "-s", "-S", "-c", _PROBE),
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
                cwd=Path(folder),
                output=answer,
            )
            try:
                ended = await self._spawner.run(command, timeout_secs=PROBE_TIMEOUT_SECS, grace_secs=1.0)
            except errors.ProcessLost as exc:
                log.warning("interpreter could not be asked", path=path, error=str(exc))
                return
            text = answer.read_text(errors="replace") if ended.ok else ""  # noqa: ASYNC240 - one line
        if match := re.search(r"^version (\d+)\.(\d+)\.(\d+)$", text, re.MULTILINE):
            self._known[path] = mtime_ns, (int(match[1]), int(match[2]), int(match[3]))
        else:
            log.info("interpreter not usable", path=path, exit=str(ended))
            if ended.code is not None:  # it said so itself; a time-out says nothing
                self._known[path] = mtime_ns, None


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return sorted(
            (entry for entry in entries if _NAME.fullmatch(entry.name)), key=lambda entry: entry.name
        )
    return []


def _is_program(path: str) -> bool:
    """A binary, not the script of a version switcher (a shim), and not a copy inside a virtual environment."""
    if not os.access(path, os.X_OK) or Path(path).parent.parent.joinpath("pyvenv.cfg").exists():
        return False
    with open(path, "rb") as file:  # noqa: PTH123 - a hot loop over strings
        return file.read(2) != b"#!"


def _unchanged(interpreter: Interpreter) -> bool:
    with contextlib.suppress(OSError):
        return interpreter.path.stat().st_mtime_ns == interpreter.mtime_ns
    return False


def _parse(wanted: str | None) -> tuple[int, int | None, int | None, str | None]:
    if wanted is None or not wanted.strip():
        return 3, None, None, None
    match = _WANTED.fullmatch(wanted)
    if match is None:
        raise errors.UnsupportedRequest(f"'{wanted[:40]}' is not a Python version such as 3, 3.11 or 3.11.7")
    major, minor, patch = (int(part) if part is not None else None for part in match.groups())
    assert major is not None
    if (major, minor, patch) == (3, 1, None):  # the JSON number 3.10
        return 3, 10, None, "Python 3.1 was read as 3.10"
    return major, minor, patch, None


def _select(found: Sequence[Interpreter], major: int, minor: int | None, patch: int | None) -> Choice | None:
    """What is asked for, from what is there; None when no such minor version is."""
    usable = [one for one in found if one.version[:2] >= OLDEST and one.version[0] == major]
    if minor is None:
        own = [one for one in usable if one.version[:2] == sys.version_info[:2]]
        usable = own or usable
    else:
        usable = [one for one in usable if one.version[1] == minor]
    if not usable:
        return None
    exact = [one for one in usable if one.version[2] == patch]
    best = max(exact or usable, key=lambda one: one.version)  # the first found wins among equals
    if patch is None or exact:
        return Choice(interpreter=best)
    return Choice(
        interpreter=best, warning=f"Python {major}.{minor}.{patch} is not on this machine; {best} was taken"
    )


def _nearest(usable: Sequence[Interpreter], wanted: tuple[int, int]) -> Interpreter:
    newer = sorted(one.version[:2] for one in usable if one.version[:2] >= wanted)
    minor = newer[0] if newer else max(one.version[:2] for one in usable)
    return max((one for one in usable if one.version[:2] == minor), key=lambda one: one.version)


def _listing(found: Sequence[Interpreter]) -> str:
    names = [
        str(one) if one.version[:2] >= OLDEST else f"{one} (too old: environments need 3.6 or newer)"
        for one in sorted(found)
    ]
    return ", ".join(dict.fromkeys(names)) or "none at all"


def _load(file: Path) -> dict[str, tuple[int, Version | None]]:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        return {
            str(path): (int(mtime), (int(version[0]), int(version[1]), int(version[2])))
            for path, (mtime, version) in json.loads(file.read_text()).items()
        }
    return {}


def _save(file: Path, known: Mapping[str, tuple[int, Version | None]]) -> None:
    """What could not be used is left out: a missing package may be installed before the next start."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}-", delete=False) as fresh:
        json.dump({path: known for path, known in known.items() if known[1] is not None}, fresh)
    Path(fresh.name).replace(file)
