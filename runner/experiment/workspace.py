"""Every path of one run.

::

    <working-dir>/runs/<id>/                 STUDIOML_HOME of the workload; removed after the run
        experiments/<id>/                    STUDIOML_EXPERIMENT is <id>
            workspace/                       working directory of the program
            output/output                    what it prints
            modeldir/ tb/ retval/ ...        one directory an artifact, siblings of the workspace (INTEROP.md 3.9)
        env/                                 the run's own Python environment
        tmp/                                 TMPDIR
        _runner/                             the runner's: builder's output, the run's log, the document, the request
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import os
import re
import secrets
import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# linux/fs.h: FS_IOC_GETFLAGS, FS_IOC_SETFLAGS; the bit of FS_TOPDIR_FL.
_GET_FLAGS, _SET_FLAGS = (
    direction | struct.calcsize("l") << 16 | 0x6600 for direction in (0x80000001, 0x40000002)
)
_TOP_DIRECTORY = 17


_NAME = re.compile(r"[0-9a-f]{16}\.[0-9]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workspace:
    """The directory of one run. All of it is private to the runner's user."""

    root: Path

    @classmethod
    def create(cls, runs: Path, key: str) -> Workspace:
        """A new directory below `runs`, named by a hash of the experiment's key and the lowest number that is free.

        Raises:
            OSError: the disk is full or read-only.
        """
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        for number in itertools.count():
            workspace = cls(root=runs / f"{digest}.{number}")
            try:
                workspace.root.mkdir(mode=0o700, parents=True)
            except FileExistsError:
                continue
            experiment = workspace._experiment  # its own class
            directories = (experiment.parent, experiment, workspace.workspace, workspace.output.parent)
            for directory in (*directories, workspace.tmp, workspace.private):
                directory.mkdir(mode=0o700)
            return workspace
        raise AssertionError  # count() does not end

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether that may be a run's directory: `runs` is also what other programs call theirs."""
        return _NAME.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()

    @property
    def run_id(self) -> str:
        """Unique among the runs of this working directory while it exists."""
        return self.root.name

    def artifact(self, tag: str) -> Path:
        """The directory of an artifact. `tag` is a safe single component: `request.decode` refuses others."""
        return self._experiment / tag

    @contextlib.contextmanager
    def held(self, tag: str) -> Iterator[Path]:
        """That directory by a path that leads nowhere else, while the context is open; the last component may be a link.

        In a container a workload may be us, and put links in the place of the directories above it. Raises OSError for those.
        """
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        above = os.open(self._experiment.parent, flags)
        try:
            directory = os.open(self._experiment.name, flags, dir_fd=above)
        finally:
            os.close(above)
        try:
            yield Path(f"/proc/self/fd/{directory}", tag)
        finally:
            os.close(directory)

    @functools.cached_property
    def _experiment(self) -> Path:
        return self.root / "experiments" / self.root.name

    @functools.cached_property
    def workspace(self) -> Path:
        """Where the program starts."""
        return self.artifact("workspace")

    @functools.cached_property
    def output(self) -> Path:
        """Where stdout and stderr of the program go."""
        return self.artifact("output") / "output"

    @property
    def tmp(self) -> Path:
        """The workload's TMPDIR."""
        return self.root / "tmp"

    @functools.cached_property
    def private(self) -> Path:
        """The runner's own files of this run; never uploaded as a directory."""
        return self.root / "_runner"

    @property
    def builder_log(self) -> Path:
        """What the environment's builder printed."""
        return self.private / "environment.log"

    @property
    def runner_log(self) -> Path:
        """The daemon's records of this run, as JSON lines; becomes `runner-host-*.log`."""
        return self.private / "runner.log"

    @property
    def document(self) -> Path:
        """The last metadata document that was written for this run."""
        return self.private / "scrape.json"

    @property
    def request(self) -> Path:
        """The message as it came, secrets included; mode 0600. Lets a restarted daemon deliver what this run left."""
        return self.private / "request.json"

    def remove(self) -> None:
        """Remove all of it. Blocking. What cannot be removed stays, and the next start of the daemon tries again."""
        try:
            _remove(os.fspath(self.root))
        except (OSError, RecursionError):
            _insist(os.fspath(self.root))


def _insist(top: str) -> None:
    """Remove what a workload has made hard to remove: by rights taken away, or by directories deeper than paths and calls go.

    Each directory is moved to the top before it is emptied, so no path grows.
    """
    with contextlib.suppress(OSError):
        os.chmod(top, 0o700)  # noqa: PTH101
    prefix, number, waiting = os.path.join(top, f".{secrets.token_hex(4)}-"), 0, [top]  # noqa: PTH118
    while waiting:
        directory = waiting.pop()
        with contextlib.suppress(OSError), os.scandir(directory) as listing:
            for entry in list(listing):
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        number += 1
                        os.chmod(entry.path, 0o700)  # noqa: PTH101 - names from scandir are text
                        os.rename(entry.path, f"{prefix}{number}")  # noqa: PTH104
                        waiting.append(f"{prefix}{number}")
                    else:
                        os.unlink(entry.path)  # noqa: PTH108
            if directory != top:
                os.rmdir(directory)  # noqa: PTH106
    with contextlib.suppress(OSError):
        os.rmdir(top)  # noqa: PTH106


def _remove(directory: str) -> None:
    """As `shutil.rmtree`, with half of its calls: nobody is left who could put a link in the way meanwhile."""
    with os.scandir(directory) as listing:
        for entry in listing:
            if entry.is_dir(follow_symlinks=False):
                _remove(entry.path)
            else:
                os.unlink(entry.path)  # noqa: PTH108 - names from scandir are text
    os.rmdir(directory)  # noqa: PTH106


def spread(runs: Path) -> None:
    """Let ext4 put each run's directory into a block group of its own; other file systems do as they like.

    Where directories come and go within one group, each new file costs up to 0.8 ms of processor time after some
    thousands: ext4 passes over the inodes that were freed in the last minutes, one by one.
    """
    descriptor = os.open(runs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = bytearray(8)
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, _GET_FLAGS, flags)
            flags[_TOP_DIRECTORY // 8] |= 1 << _TOP_DIRECTORY % 8
            fcntl.ioctl(descriptor, _SET_FLAGS, bytes(flags))
    finally:
        os.close(descriptor)
