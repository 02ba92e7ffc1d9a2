"""Requirement lines as experimenters send them, turned into lines that uv takes (INTEROP.md 1.2, 3.10; DESIGN.md 5.4).

Liberal: what cannot be installed on another machine than the sender's is replaced or left out with a warning; only a
line that nobody can make sense of is refused. Reads the workspace (local packages, `dist/studioml-*.tar.gz`), writes
nothing.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

from runner import errors
from runner.executors.digest import digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from packaging.specifiers import SpecifierSet

MAX_NESTING = 5  #: of `-r` files in the workspace
INDEX_OPTIONS = {
    "-i": "--index-url",
    "--index-url": "--index-url",
    "--extra-index-url": "--extra-index-url",
    "-f": "--find-links",
    "--find-links": "--find-links",
}
#: options that only say how pip should go about it: dropped without a word
SILENT = {
    "-U",
    "--upgrade",
    "-q",
    "--quiet",
    "-v",
    "--verbose",
    "-I",
    "--ignore-installed",
    "--force-reinstall",
}
SILENT |= {"--no-cache-dir", "--user", "--no-input", "--disable-pip-version-check", "--prefer-binary"}
#: options that are dropped with their value
WITH_VALUE = {
    "-c",
    "--constraint",
    "--trusted-host",
    "--no-binary",
    "--only-binary",
    "--platform",
    "--timeout",
}
WITH_VALUE |= {
    "--default-timeout",
    "--retries",
    "--proxy",
    "--cert",
    "--client-cert",
    "--progress-bar",
    "-t",
    "--target",
}
#: the last tensorflow whose GPU build is a package of its own; later ones hold both
LAST_TENSORFLOW_GPU = Version("2.11.99")

_URL = re.compile(r"(?:(?:git|hg|svn|bzr)\+|[A-Za-z][A-Za-z0-9+.-]*://|file:)")
_NAMED_URL = re.compile(r"\s*([A-Za-z0-9][\w.-]*\s*(?:\[[^\]]*\])?)\s*@\s*(\S.*)", re.DOTALL)
_SCP = re.compile(r"git\+(?![A-Za-z]+://)((?:[\w.-]+@)?[\w.-]+):(?!//)(.+)")
_GIT_REV = re.compile(r"@[0-9a-f]{7,40}$")
_CONDA = re.compile(r"([A-Za-z0-9][\w.-]*)=([0-9][\w.!+*]*)(?:=[\w.]+)?")
_FILE = re.compile(r"^file:(?://[^/]*)?/+")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_HASH = re.compile(r"\s+--hash[=\s]\S+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One thing to install."""

    text: str  #: as uv takes it
    identity: str  #: the same for every run that asks for the same; holds no path of this run
    pinned: bool  #: names one version for ever: `==`, a commit, a file whose name or content says so
    name: str | None = None  #: canonical, where it is known
    marker: str = ""
    specifier: SpecifierSet | None = None  #: None: a URL or a path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requirements:
    """What to install, in the order asked for."""

    lines: tuple[Line, ...] = ()
    options: tuple[str, ...] = ()  #: option lines of a requirements file; may hold credentials
    prereleases: bool = False  #: --pre
    warnings: tuple[str, ...] = ()  #: what was changed or left out; no secrets

    @property
    def pinned(self) -> bool:
        """Whether the same lines give the same environment tomorrow."""
        return all(line.pinned for line in self.lines)

    @property
    def hosts(self) -> frozenset[str]:
        """The servers that the lines themselves name, beyond the index that the operator chose."""
        texts = (*(line.text for line in self.lines if line.specifier is None), *self.options)
        found = (re.search(r"://\S+", text) for text in texts)
        return frozenset(host for match in found if match and (host := _host(match[0])))


def redacted(text: str) -> str:
    """`text` without the user information of the URLs in it."""
    return _CREDENTIALS.sub("***@", text)


def normalise(lines: Iterable[str], extra: Iterable[str], *, workspace: Path, gpus: bool) -> Requirements:
    """Reads `pythonenv` lines and then `config.pip` lines, which win where the two disagree.

    Raises `errors.UnsupportedRequest` naming the line that cannot be understood. Blocks while it reads what the lines
    name in the workspace: call it in a thread.
    """
    reader = _Reader(workspace, gpus=gpus)
    distributions = sorted(
        (path for path in workspace.glob("dist/studioml-*.tar.gz") if reader.inside(path)),
        key=lambda path: (path.stat().st_mtime_ns, path.name),
    )
    if distributions:
        reader.instead_of_studioml(distributions[-1])
    for group in (lines, extra):
        reader.read("\n".join(group).splitlines())
    return Requirements(
        lines=tuple(reader.lines),
        options=tuple(dict.fromkeys(reader.options)),
        prereleases=reader.prereleases,
        warnings=tuple(dict.fromkeys(reader.warnings)),
    )


class _Reader:
    """Collects lines. Its methods read one kind of line each."""

    def __init__(self, workspace: Path, *, gpus: bool) -> None:
        self.workspace = workspace.resolve()
        self.gpus = gpus
        self.lines: list[Line] = []
        self.options: list[str] = []
        self.warnings: list[str] = []
        self.prereleases = False
        self.own_studioml = False

    def inside(self, path: Path) -> bool:
        """Whether it is there and, links followed, in the workspace."""
        real = path.resolve()
        return real.exists() and real.is_relative_to(self.workspace)

    def instead_of_studioml(self, file: Path) -> None:
        """Installs the client's own archive, whatever version of it the lines name."""
        self._add_local(file, name="studioml", extras="")
        self.own_studioml = True

    def read(self, lines: Sequence[str], nesting: int = 0) -> None:
        """Reads raw lines, options and all."""
        for raw in lines:
            if "\0" in raw:
                raise errors.UnsupportedRequest(f"requirement line {redacted(raw)!r} holds a NUL character")
            text = re.sub(r"(^|\s)#.*", "", raw).strip().rstrip("\\").strip()
            if "${" in text:  # uv would put its own environment in, which may hold the index's password
                raise errors.UnsupportedRequest(f"requirement line '{redacted(raw.strip())}' uses a variable")
            if text.startswith("-"):
                text = self._options(text, nesting)
            if text:
                self._requirement(text, line=redacted(text))

    def _options(self, text: str, nesting: int) -> str:
        """Takes the options off the front of a line; the rest of it is a requirement, or empty."""
        while text.startswith("-"):
            word, _, rest = text.partition(" ")
            option, equals, value = word.partition("=")
            rest = rest.strip()
            if option in {"-e", "--editable"}:
                self._editable(value or rest)
                return ""
            takes_value = option in INDEX_OPTIONS or option in WITH_VALUE or option in {"-r", "--requirement"}
            if takes_value and not equals:
                value, _, rest = rest.partition(" ")
            if option in INDEX_OPTIONS:
                self._index(INDEX_OPTIONS[option], value)
            elif option in {"-r", "--requirement"}:
                self._include(value, nesting)
            elif option == "--pre":
                self.prereleases = True
            elif option not in SILENT:
                self.warnings.append(f"option '{option}' of a requirement line was left out")
            text = rest.strip()
        return text

    def _index(self, option: str, value: str) -> None:
        if value.startswith(("http://", "https://")):
            self.options.append(f"{option} {value}")
        elif option == "--find-links" and self.inside(self.workspace / value):
            self.options.append(f"{option} {(self.workspace / value).resolve()}")
        else:
            self.warnings.append(f"'{option} {redacted(value)}' was left out: not reachable from here")

    def _include(self, value: str, nesting: int) -> None:
        file = self.workspace / value
        if nesting >= MAX_NESTING or not self.inside(file) or not file.is_file():
            raise errors.UnsupportedRequest(f"requirement line '-r {value}' names no file of the workspace")
        self.read(file.read_text(errors="replace").splitlines(), nesting + 1)

    def _editable(self, text: str) -> None:
        """An editable install becomes an ordinary one."""
        if text.startswith(("/", "~")) and not self.inside(Path(text.partition("[")[0])):
            # A directory of the machine that submitted; as a rule that is what the workspace was made from.
            self.warnings.append(f"'-e {text}' was left out: a directory of another machine")
            return
        self._requirement(text, line=f"-e {redacted(text)}")

    def _requirement(self, text: str, line: str) -> None:
        scp = _SCP.fullmatch(text)
        if scp:
            text = f"git+ssh://{scp[1]}/{scp[2]}"
        named = _NAMED_URL.fullmatch(text)
        if _URL.match(text):
            self._url(text, line)
        elif named and _URL.match(named[2]):
            self._named_url(text, line)
        elif named:
            name, bracket, extras = named[1].strip().partition("[")
            path = named[2].partition(" ;")[0].strip()
            self._path(self.workspace / path, line, name=name.strip(), extras=bracket + extras)
        elif text.startswith((".", "/", "~")) or "/" in text:
            path, _, extras = text.partition("[")
            self._path(self.workspace / path.strip(), line, extras=f"[{extras}" if extras else "")
        else:
            self._plain(text, line)

    def _plain(self, text: str, line: str) -> None:
        hashes = "".join(_HASH.findall(text))
        text = _HASH.sub("", text)
        conda = _CONDA.fullmatch(text)
        if conda:
            text = f"{conda[1]}=={conda[2]}"
            self.warnings.append(f"'{line}' was read as '{text}'")
        elif len(words := text.split()) > 1 and not re.search(r"[<>=!~;@,(\[]", text):
            for word in words:  # "numpy scipy", which a shell would have taken apart
                self._plain(word, line)
            return
        try:
            wanted = Requirement(text)
        except InvalidRequirement as exc:
            raise errors.UnsupportedRequest(
                f"requirement line '{line}' is not understood: {_first_line(exc)}"
            ) from exc
        name = canonicalize_name(wanted.name)
        if name == "pkg-resources" or (name == "studioml" and self.own_studioml):
            return  # Debian's pip invents the first; the other is installed from the workspace
        self._swap_tensorflow(wanted)
        text = str(wanted)
        exact = any(
            one.operator in {"==", "==="} and not one.version.endswith("*") for one in wanted.specifier
        )
        self._add(
            Line(
                text=text + hashes,
                identity=text + hashes,
                pinned=exact,
                name=canonicalize_name(wanted.name),
                marker=str(wanted.marker or ""),
                specifier=wanted.specifier,
            )
        )

    def _swap_tensorflow(self, wanted: Requirement) -> None:
        """With cards `tensorflow-gpu`, without `tensorflow`, for the versions that have both."""
        if canonicalize_name(wanted.name) not in {"tensorflow", "tensorflow-gpu"}:
            return
        pins = [one.version.removesuffix(".*") for one in wanted.specifier if one.operator == "=="]
        separate = bool(pins) and Version(pins[0]) <= LAST_TENSORFLOW_GPU
        wanted.name = "tensorflow-gpu" if self.gpus and separate else "tensorflow"

    def _named_url(self, text: str, line: str) -> None:
        try:
            wanted = Requirement(text)
        except InvalidRequirement as exc:
            raise errors.UnsupportedRequest(
                f"requirement line '{line}' is not understood: {_first_line(exc)}"
            ) from exc
        assert wanted.url is not None
        extras = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
        self._url(wanted.url, line, name=wanted.name, extras=extras, marker=str(wanted.marker or ""))

    def _url(
        self, url: str, line: str, *, name: str | None = None, extras: str = "", marker: str = ""
    ) -> None:
        url, _, fragment = url.partition("#")
        kept = []
        for part in filter(None, fragment.split("&")):
            key, _, value = part.partition("=")
            if key == "egg":
                if name is None:
                    name, bracket, rest = value.partition("[")
                    extras = bracket + rest
            else:
                kept.append(part)
        if self.own_studioml and name is not None and canonicalize_name(name) == "studioml":
            return
        if url.startswith("file:"):
            self._path(Path(unquote(_FILE.sub("/", url))), line, name=name, extras=extras)
            return
        if not url.startswith(
            ("http://", "https://", "git+http://", "git+https://", "git+ssh://", "git+git://")
        ):
            self._elsewhere(url, line, name=name, extras=extras)
            return
        url += f"#{'&'.join(kept)}" if kept else ""
        text = f"{name}{extras} @ {url}" if name else url
        plain = url.partition("#")[0]
        pinned = (
            _GIT_REV.search(plain) is not None if plain.startswith("git+") else _release(plain) is not None
        )
        self._add(
            Line(
                text=f"{text} ; {marker}" if marker else text,
                identity=f"{text} ; {marker}",
                pinned=pinned,
                name=canonicalize_name(name) if name else None,
                marker=marker,
            )
        )

    def _path(self, path: Path, line: str, *, name: str | None = None, extras: str = "") -> None:
        if self.inside(path):
            self._add_local(path, name=name, extras=extras)
        else:
            self._elsewhere(str(path), line, name=name, extras=extras)

    def _elsewhere(self, place: str, line: str, *, name: str | None, extras: str) -> None:
        """Something only the sender's machine has: the same release from the index, or any of that name."""
        release = _release(place)
        if release is not None:
            text = f"{name or release[0]}{extras}=={release[1]}"
        elif name:
            text = f"{name}{extras}"
        else:
            raise errors.UnsupportedRequest(
                f"requirement line '{line}' names something that is not in the workspace"
            )
        self.warnings.append(f"'{line}' cannot be had here; '{text}' was taken from the package index")
        self._plain(text, line)

    def _add_local(self, path: Path, *, name: str | None, extras: str) -> None:
        real = path.resolve()
        release = _release(real.name)
        name = name or (release[0] if release else None)
        if name and self.own_studioml and canonicalize_name(name) == "studioml":
            return
        label = f"{name or ''}{extras}"
        self._add(
            Line(
                text=f"{label} @ {real.as_uri()}" if name else f"{real}{extras}",
                identity=f"{label} sha256:{digest(real)}",
                pinned=True,
                name=canonicalize_name(name) if name else None,
            )
        )

    def _add(self, line: Line) -> None:
        """Adds a line; an earlier one of the same name that it contradicts goes."""
        if any(line.identity == other.identity for other in self.lines):
            return
        for other in [other for other in self.lines if _contradict(other, line)]:
            self.lines.remove(other)
            self.warnings.append(f"'{redacted(other.text)}' gave way to the later '{redacted(line.text)}'")
        self.lines.append(line)


def _first_line(exc: Exception) -> str:
    return redacted(str(exc).partition("\n")[0])


def _contradict(one: Line, other: Line) -> bool:
    """Whether no resolver could satisfy both."""
    if one.name is None or (one.name, one.marker) != (other.name, other.marker):
        return False
    if one.specifier is None or other.specifier is None:
        return True
    for pinned, allowed in ((one.specifier, other.specifier), (other.specifier, one.specifier)):
        for pin in pinned:
            if pin.operator == "==" and not pin.version.endswith("*"):
                return not allowed.contains(pin.version, prereleases=True)
    return False


def _host(place: str) -> str | None:
    """The host in `://user@host:port/path`."""
    match = re.match(r"://(?:[^/@\s]*@)?(\[[^\]]*\]|[^/:\s]+)", place)
    return match[1].lower() if match else None


def _release(place: str) -> tuple[str, str] | None:
    """Name and version of the wheel or source archive that a path or URL ends in, if it is one."""
    file = unquote(re.split(r"[?#]", place)[0] if "://" in place else place).rpartition("/")[2]
    try:
        if file.endswith(".whl"):
            name, version, _, _ = parse_wheel_filename(file)
        elif file.endswith((".tar.gz", ".zip")):
            name, version = parse_sdist_filename(file)
        else:
            return None
    except (InvalidWheelFilename, InvalidSdistFilename):
        return None
    return name, str(version)
