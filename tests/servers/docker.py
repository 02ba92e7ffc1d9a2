"""A real container engine for the tests: a dockerd of their own, with images made of this machine's own Python.

Listed in `pytest_plugins` of tests/conftest.py. Where dockerd is not installed the tests that need it are skipped, and fail
in CI; where the machine cannot run it at all (no namespaces, no cgroups) they are skipped there too. Each test run says at
its end which of it was the case: what flags do was tested on a real engine, or only that they are given, on the double.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECS = 60.0
DRIVERS = ("overlay2", "vfs")
#: The images of the tests.
PYTHON, GREETER = "test/python:1", "test/greeter:1"
_TOOLS = ("sh", "cat", "sleep", "id", "env", "ls")
_LEFT_OUT = {
    "test",
    "idlelib",
    "tkinter",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "turtledemo",
}
# How engines word what a sandbox forbids.
_FORBIDDEN = re.compile(
    r"not permitted|permission denied|cgroup|read-only file system|namespace|mounting", re.IGNORECASE
)
_TOLD = pytest.StashKey[str]()


class Impossible(Exception):  # noqa: N818
    """This machine runs no containers: not a defect of the tests."""


class DockerServer:
    """A dockerd in a directory of its own, without networks."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.host = f"unix://{directory}/docker.sock"
        self.memory_limits = False  #: whether this kernel lets it limit memory
        self.version = ""
        self.driver = DRIVERS[0]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> dict[str, str]:
        """What a client needs to find it."""
        return {"DOCKER_HOST": self.host, "DOCKER_CONFIG": str(self.directory / "config")}

    def start(self, driver: str = "") -> None:
        """Start it and wait until it answers. Raises Impossible with its last words."""
        root = self.directory
        self.driver = driver or self.driver
        argv = ["dockerd", f"--host={self.host}", f"--data-root={root}/data", f"--exec-root={root}/exec"]
        argv += [f"--pidfile={root}/docker.pid", f"--storage-driver={self.driver}", "--iptables=false"]
        argv += ["--bridge=none", "--ip-forward=false", "--shutdown-timeout=1"]
        with (root / "dockerd.log").open("ab") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + START_SECS
        while not (answer := self.docker("version", "--format", "{{.Server.Version}}")).stdout.strip():
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise Impossible((root / "dockerd.log").read_text()[-1500:])
            time.sleep(0.1)
        self.version = answer.stdout.strip()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it with its containers; its data stays. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with contextlib.suppress(ProcessLookupError):  # its containerd
            os.killpg(process.pid, signal.SIGKILL)

    def docker(self, *arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """One command."""
        return subprocess.run(
            ["docker", *arguments],
            env=os.environ | self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=check,
        )

    def containers(self) -> list[str]:
        """Names of all that there are, running or not."""
        return self.docker("ps", "--all", "--format", "{{.Names}}", check=True).stdout.split()

    def make_images(self) -> None:
        """The two images, of this machine's own files."""
        rootfs = self.directory / "rootfs.tar"
        _write_rootfs(rootfs)
        imported = self.docker("import", str(rootfs), PYTHON)
        if _FORBIDDEN.search(imported.stderr):
            raise Impossible(imported.stderr)
        imported.check_returncode()
        entry = 'ENTRYPOINT ["/bin/sh", "-c", "echo hello from the image; echo given: $*; cat ../modeldir/in; echo x > ../modeldir/out", "me"]'
        self.docker("import", f"--change={entry}", str(rootfs), GREETER, check=True)
        rootfs.unlink()

    def probe(self) -> None:
        """Raises Impossible when containers cannot be run here."""
        flags = ("--rm", "--cap-drop=ALL", "--init", "--pids-limit=100")
        ran = self.docker("run", *flags, PYTHON, "/bin/sh", "-c", "echo it runs")
        if _FORBIDDEN.search(ran.stderr):
            raise Impossible(f"a container cannot be run: {ran.stderr.strip()[-1500:]}")
        assert "it runs" in ran.stdout, ran.stderr
        info = self.docker("info", "--format", "{{.MemoryLimit}}").stdout
        self.memory_limits = info.strip() == "true"


def _write_rootfs(target: pathlib.Path) -> None:
    program = pathlib.Path(os.path.realpath(sys.executable))
    stdlib = pathlib.Path(sysconfig.get_path("stdlib"))
    with tarfile.open(target, "w", dereference=True) as tar:
        known: set[str] = set()  # engines take no name twice

        def add(path: pathlib.Path | str, name: str | None = None) -> None:
            if (name := name or str(path)) not in known:
                known.add(name)
                tar.add(path, name, recursive=False)

        def folder(name: str, mode: int) -> None:
            if name not in known:
                known.add(name)
                member = tarfile.TarInfo(name)
                member.type, member.mode = tarfile.DIRTYPE, mode
                tar.addfile(member)

        def link(name: str, to: str) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, to
            tar.addfile(member)

        for name in ("/tmp", "/var/tmp", "/etc", "/proc", "/dev", "/sys"):
            folder(name, 0o1777)
        for parent in (*reversed(program.parents), *reversed(stdlib.parents), stdlib):
            if str(parent) != "/":
                folder(str(parent), 0o755)  # /root is 0700 here, not in an image
        libraries = {program}
        for path in sorted(stdlib.rglob("*")):
            relative = path.relative_to(stdlib)
            if not _LEFT_OUT & set(relative.parts) and not relative.parts[0].startswith("config-"):
                add(path)
                if path.suffix == ".so":
                    libraries.add(path)
        add(program)
        tools = {name: pathlib.Path(os.path.realpath(str(shutil.which(name)))) for name in _TOOLS}
        for name, path in tools.items():
            add(path, f"/bin/{name}")
        for name in ("python", "python3"):
            link(f"/usr/local/bin/{name}", str(program))
        for library in _needed([*libraries, *tools.values()]):
            add(library)
        if (wheel := pip_wheel()) is not None:
            _add_wheel(tar, wheel, stdlib / "site-packages")
            link(str(stdlib / "dist-packages"), "site-packages")  # what Debian's Python calls it


def _needed(files: list[pathlib.Path]) -> list[str]:
    """The shared libraries that these load, as the loader finds them."""
    said = subprocess.run(["ldd", *map(str, files)], capture_output=True, text=True, check=False).stdout
    words = (word for line in said.splitlines() if line.startswith("\t") for word in line.split())
    return sorted({word for word in words if word.startswith("/") and pathlib.Path(word).is_file()})


def pip_wheel() -> pathlib.Path | None:
    """The pip that Pythons bring along."""
    places = (
        pathlib.Path(sysconfig.get_path("stdlib"), "ensurepip/_bundled"),
        pathlib.Path("/usr/share/python-wheels"),
    )
    return next((wheel for place in places for wheel in sorted(place.glob("pip-*.whl"))), None)


def _add_wheel(tar: tarfile.TarFile, wheel: pathlib.Path, where: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            member = tarfile.TarInfo(str(where / info.filename))
            member.size, member.mode = info.file_size, 0o644
            with archive.open(info) as content:
                tar.addfile(member, content)


@pytest.fixture(scope="session")
def docker_server(pytestconfig: pytest.Config) -> Iterator[DockerServer]:
    """The engine, or a skip that says why there is none."""
    if os.geteuid() != 0 or not shutil.which("dockerd") or not shutil.which("docker"):
        why = "dockerd cannot be started: it needs root, and Debian's docker.io"
        pytestconfig.stash[_TOLD] = f"the recording double only: {why}"
        pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="dk", dir="/tmp", ignore_cleanup_errors=True) as directory:
        server, why = DockerServer(pathlib.Path(directory)), ""
        for driver in DRIVERS:
            try:
                server.start(driver)
                server.make_images()
                server.probe()
                break
            except Impossible as exc:
                why = f"{driver}: {exc}"
                server.stop()
                shutil.rmtree(server.directory / "data", ignore_errors=True)
        else:
            pytestconfig.stash[_TOLD] = f"the recording double only: no container runs on this machine: {why}"
            pytest.skip(f"no container runs on this machine: {why}")
        limits = "with" if server.memory_limits else "without"
        pytestconfig.stash[_TOLD] = (
            f"a real engine, dockerd {server.version} on {driver}, {limits} limits of memory"
        )
        yield server
        for name in server.containers():
            server.docker("rm", "--force", name)
        server.stop()


@pytest.fixture
def docker(docker_server: DockerServer) -> Iterator[DockerServer]:
    """The engine, with nothing in it but its images before and after each test."""
    yield docker_server
    if docker_server.docker("version").returncode:  # the test has ended it
        docker_server.start()
    for name in docker_server.containers():
        docker_server.docker("rm", "--force", name)


# -- which of the two it was


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["containers"] = session.config.stash.get(_TOLD, "")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    told = getattr(node, "workeroutput", {}).get("containers")
    if told:
        node.config.stash[_TOLD] = told


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if told := terminalreporter.config.stash.get(_TOLD, ""):
        terminalreporter.section("container tests")
        terminalreporter.line(f"containers were tested on {told}")
